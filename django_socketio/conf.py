"""The settings: names, defaults, what each may be. Read when the server starts, never at import."""

import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from django.conf import settings as django_settings
from django.utils.module_loading import import_string

from .slow import POLICIES

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


def _a_drain(value: Any) -> str:
    good = _is_number(value) and 0 <= value <= 3600
    return "" if good else "must be a number of seconds, from 0 to an hour"


def _size(value: Any) -> str:
    good = _is_number(value) and 1 <= value < 2**31
    return "" if good else "must be a number of bytes, from 1 to 2 GiB"


def _a_compression(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return ""
    if not isinstance(value, dict):
        return f"must be True, None for none, or a dictionary of {_KEYS}"
    unknown = sorted(str(key) for key in value if key not in _COMPRESSION)
    if unknown:
        return f"has the unknown key(s) {', '.join(unknown)}; it takes {_KEYS}"
    for key, number in value.items():
        least, most = _COMPRESSION[key]
        if type(number) is not int or not least <= number <= most:
            return f"must have a whole number from {least} to {most} as its {key}"
    return ""


_COMPRESSION = {"threshold": (0, 2**31 - 1), "level": (1, 9), "limit": (1, 2**31 - 1)}
_KEYS = ", ".join(_COMPRESSION)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and value == int(value)


def _number(least: int, most: int) -> Callable[[Any], str]:
    def problem(value: Any) -> str:
        good = _is_whole(value) and least <= value <= most
        return "" if good else f"must be a whole number, from {least:,} to {most:,}"

    return problem


_a_count = _number(1, 1_000_000_000)


def _or_none(problem: Callable[[Any], str]) -> Callable[[Any], str]:
    def either(value: Any) -> str:
        wrong = "" if value is None else problem(value)
        return f"{wrong}, or None" if wrong else ""

    return either


def _a_rate(value: Any) -> str:
    rate, burst = value if isinstance(value, list | tuple) and len(value) == 2 else (value, 1)
    good = _is_number(rate) and rate > 0 and _is_number(burst) and 1 <= burst < 2**31
    return "" if good else "must be a number a second, or (a number a second, how many at once)"


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


def _slow_consumers(value: Any) -> str:
    if not isinstance(value, list | tuple):
        return "must be a list of pairs: a regular expression for channels, and a policy"
    for rule in value:
        if not isinstance(rule, list | tuple) or [type(part) for part in rule] != [str, str]:
            return f"has {rule!r}, which is no pair of a regular expression and a policy"
        if rule[1] not in POLICIES:
            return f"has the policy {rule[1]!r}; there are {', '.join(POLICIES)}"
        try:
            re.compile(rule[0])
        except re.error as error:
            return f"has {rule[0]!r}, which is no regular expression: {error}"
    return ""


class AnyField(dict[str, Any]):
    """Every field there could be, to try a format with."""

    def __missing__(self, key: str) -> str:
        return ""


_ORIGIN = re.compile(
    r"https?://(\*\.)?([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[1-9][0-9]{0,4})?\Z", re.I | re.A
)


def _origins(value: Any) -> str:
    if value is None or value == "*" or callable(value):
        return ""
    if isinstance(value, str):
        return _a_path_of_a_callable(value)
    if not isinstance(value, list | tuple):
        return 'must be a list of origins, "*" for all, or a callable that decides, or its path'
    for origin in value:
        if not (origin == "*" or isinstance(origin, str) and _ORIGIN.match(origin)):
            return f'has {origin!r}, which is no origin such as "https://example.com"'
    return ""


def _a_path_of_a_callable(value: str) -> str:
    if "://" in value:
        return "must be a list, even if of one origin"
    try:
        found = import_string(value)
    except ImportError as error:
        return f"is the path of nothing: {error}"
    return "" if callable(found) else "is the path of something that cannot be called"


SETTINGS = {
    "HOST": Setting("127.0.0.1", _a_string),
    "PORT": Setting(9000, _a_port),
    "BACKEND": Setting("memory://", _a_backend),
    "MESSAGE_LOG_FORMAT": Setting(LOG_FORMAT, _a_log_format),
    "PING_INTERVAL": Setting(25.0, _seconds),
    "PING_TIMEOUT": Setting(20.0, _seconds),
    "CONNECT_TIMEOUT": Setting(45.0, _seconds),
    "DRAIN": Setting(3.0, _a_drain),
    "MAX_PAYLOAD": Setting(1_000_000, _size),
    "MAX_BUFFER": Setting(1_048_576, _size),
    "WRITE_TIMEOUT": Setting(10.0, _seconds),
    "SLOW_CONSUMERS": Setting((), _slow_consumers),
    "COMPRESSION": Setting(None, _a_compression),
    "ALLOWED_ORIGINS": Setting(None, _origins),
    "REAUTH_INTERVAL": Setting(60.0, _or_none(_seconds)),
    "BLOCKING_THRESHOLD": Setting(0.2, _or_none(_seconds)),
    "THREADS": Setting(10, _a_count),
    "MAX_DATABASE_CONNECTIONS": Setting(None, _or_none(_a_count)),
    "RUNTIME_DIR": Setting(None, _a_directory),
    # Limits of one message
    "MAX_PACKETS": Setting(10_000, _a_count),
    "MAX_FRAGMENTS": Setting(1024, _a_count),
    "MESSAGE_TIMEOUT": Setting(30.0, _seconds),
    "MAX_ATTACHMENTS": Setting(10, _number(1, 10_000)),
    "MAX_ATTACHMENT_BYTES": Setting(None, _or_none(_size)),
    "MAX_JSON_DEPTH": Setting(64, _number(1, 1000)),
    "MAX_NAME": Setting(255, _number(1, 255)),
    # of one client
    "MAX_CHANNELS": Setting(1024, _a_count),
    "MAX_NAMESPACES": Setting(32, _a_count),
    "UPGRADE_TIMEOUT": Setting(10.0, _seconds),
    "EVENT_RATE": Setting(None, _or_none(_a_rate)),
    # of one address or user
    "MAX_CONNECTIONS_PER_ADDRESS": Setting(None, _or_none(_a_count)),
    "MAX_CONNECTIONS_PER_USER": Setting(None, _or_none(_a_count)),
    "HANDSHAKE_RATE_PER_ADDRESS": Setting(None, _or_none(_a_rate)),
    "EVENT_RATE_PER_USER": Setting(None, _or_none(_a_rate)),
    # of a process
    "MAX_CONNECTIONS": Setting(20_000, _a_count),
    "HANDSHAKE_RATE": Setting(None, _or_none(_a_rate)),
    "MAX_HANDLERS": Setting(1000, _number(1, 100_000)),
    # of an HTTP request
    "HEAD_TIMEOUT": Setting(10.0, _seconds),
    "MAX_HEAD": Setting(16_384, _number(1024, 1_048_576)),
}


def get(name: str) -> Any:
    """Return a setting by its name without the prefix."""
    return getattr(django_settings, PREFIX + name, SETTINGS[name].default)


def get_rate(name: str) -> tuple[float, float] | None:
    """Return a setting that is a rate: so many a second, so many at once; None if it is not set."""
    value = get(name)
    if value is None or isinstance(value, list | tuple):
        return None if value is None else (value[0], value[1])
    return value, max(value, 1)


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
