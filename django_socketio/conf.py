"""The settings: names, defaults, what each may be. Read when the server starts, never at import."""

import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from django.conf import settings as django_settings

PREFIX = "SOCKETIO_"
LOG_FORMAT = '%(REMOTE_ADDR)s - - [%(TIME)s] "Socket.IO %(TYPE)s: %(MESSAGE)s"'


class Setting(NamedTuple):
    """`problem(value)` returns what is wrong with a value, as the end of a sentence, or ""."""

    default: Any
    problem: Callable[[Any], str]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _a_string(value: Any) -> str:
    return "" if isinstance(value, str) and value else "must be a string that is not empty"


def _a_port(value: Any) -> str:
    good = _is_number(value) and value == int(value) and 0 <= value <= 65535
    return "" if good else "must be a port number, 0 to 65535"


def _seconds(value: Any) -> str:
    good = _is_number(value) and 0 < value < 86400
    return "" if good else "must be a number of seconds, above 0 and below a day"


def _size(value: Any) -> str:
    good = _is_number(value) and 1 <= value < 2**31
    return "" if good else "must be a number of bytes, from 1 to 2 GiB"


def _a_backend(value: Any) -> str:
    if isinstance(value, str) and value:
        return ""
    if isinstance(value, dict) and isinstance(value.get("BACKEND"), str):
        unknown = sorted(set(value) - {"BACKEND", "OPTIONS"})
        if unknown:
            return f"has the unknown key(s) {', '.join(unknown)}; it takes BACKEND and OPTIONS"
        if isinstance(value.get("OPTIONS", {}), dict):
            return ""
    return 'must be a URL, a dotted path, or {"BACKEND": path, "OPTIONS": {…}}'


def _a_log_format(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        return "must be a format string, or None for no log"
    try:
        value % AnyField()
    except (TypeError, ValueError) as error:
        return f"is no format for a mapping: {error}"
    return ""


def _a_directory(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str | Path) or not Path(value).is_absolute():
        return "must be the absolute path of a directory"
    # A Unix socket's address has 107 bytes, and ours are in there.
    return "" if len(os.fsencode(value)) <= 80 else "must be a path of at most 80 bytes"


class AnyField(dict[str, Any]):
    """Every field there could be, to try a format with."""

    def __missing__(self, key: str) -> str:
        return ""


_ORIGIN = re.compile(
    r"https?://(\*\.)?([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?\Z", re.I | re.A
)


def _origins(value: Any) -> str:
    if value is None or value == "*":
        return ""
    if not isinstance(value, list | tuple):
        return 'must be a list of origins, or "*" for all'
    for origin in value:
        if not (origin == "*" or isinstance(origin, str) and _ORIGIN.match(origin)):
            return f'has {origin!r}, which is no origin such as "https://example.com"'
    return ""


SETTINGS = {
    "HOST": Setting("127.0.0.1", _a_string),
    "PORT": Setting(9000, _a_port),
    "BACKEND": Setting("memory://", _a_backend),
    "MESSAGE_LOG_FORMAT": Setting(LOG_FORMAT, _a_log_format),
    "PING_INTERVAL": Setting(25.0, _seconds),
    "PING_TIMEOUT": Setting(20.0, _seconds),
    "CONNECT_TIMEOUT": Setting(45.0, _seconds),
    "MAX_PAYLOAD": Setting(1_000_000, _size),
    "MAX_BUFFER": Setting(1_048_576, _size),
    "ALLOWED_ORIGINS": Setting(None, _origins),
    "RUNTIME_DIR": Setting(None, _a_directory),
}


def get(name: str) -> Any:
    """Return a setting by its name without the prefix."""
    return getattr(django_settings, PREFIX + name, SETTINGS[name].default)


def problems() -> list[tuple[str, str]]:
    """Return what is wrong, as (setting, sentence)."""
    found = []
    for name, setting in SETTINGS.items():
        problem = setting.problem(get(name))
        if problem:
            found.append((PREFIX + name, f"{PREFIX}{name} {problem}, not {get(name)!r}."))
    known = [PREFIX + name for name in SETTINGS]
    for name in dir(django_settings):
        if name.startswith(PREFIX) and name not in known:
            close = get_close_matches(name.removeprefix(PREFIX), SETTINGS, 1)
            there_are = f"there are {', '.join(known)}."
            hint = f"did you mean {PREFIX}{close[0]}?" if close else there_are
            found.append((name, f"{name} is no setting of django-socketio: {hint}"))
    return found
