"""Configuration of Sphinx."""

import re
from pathlib import Path

_package = Path(__file__).parent.parent / "django_socketio" / "__init__.py"
_version = re.search(r'^__version__ = "(.+)"$', _package.read_text(), re.MULTILINE)
assert _version, "django_socketio.__version__ is not a literal"

project = "django-socketio"
author = "django-socketio contributors"
copyright = author
release = _version[1]
version = ".".join(release.split(".")[:2])

exclude_patterns = ["_build"]
html_title = f"{project} {release}"
nitpicky = True
