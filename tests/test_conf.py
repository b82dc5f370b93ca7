"""The settings: what each may be, and what is said of those that may not."""

import re
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from django_socketio import conf
from tests.support import ROOT

DEFAULTS = {
    "HOST": "127.0.0.1",
    "PORT": 9000,
    "BACKEND": "memory://",
    "MESSAGE_LOG_FORMAT": conf.LOG_FORMAT,
    "PING_INTERVAL": 25,
    "PING_TIMEOUT": 20,
    "CONNECT_TIMEOUT": 45,
    "DRAIN": 3,
    "MAX_PAYLOAD": 1_000_000,
    "MAX_BUFFER": 2**20,
    "WRITE_TIMEOUT": 10,
    "SLOW_CONSUMERS": (),
    "COMPRESSION": None,
    "ALLOWED_ORIGINS": None,
    "REAUTH_INTERVAL": 60,
    "BLOCKING_THRESHOLD": 0.2,
    "THREADS": 10,
    "MAX_DATABASE_CONNECTIONS": None,
    "RUNTIME_DIR": None,
    "MAX_PACKETS": 10_000,
    "MAX_FRAGMENTS": 1024,
    "MESSAGE_TIMEOUT": 30,
    "MAX_ATTACHMENTS": 10,
    "MAX_ATTACHMENT_BYTES": None,
    "MAX_JSON_DEPTH": 64,
    "MAX_NAME": 255,
    "MAX_CHANNELS": 1024,
    "MAX_NAMESPACES": 32,
    "UPGRADE_TIMEOUT": 10,
    "EVENT_RATE": None,
    "MAX_CONNECTIONS_PER_ADDRESS": None,
    "MAX_CONNECTIONS_PER_USER": None,
    "HANDSHAKE_RATE_PER_ADDRESS": None,
    "EVENT_RATE_PER_USER": None,
    "MAX_CONNECTIONS": 20_000,
    "HANDSHAKE_RATE": None,
    "MAX_HANDLERS": 1000,
    "HEAD_TIMEOUT": 10,
    "MAX_HEAD": 16_384,
}
SECONDS = (
    "PING_INTERVAL",
    "PING_TIMEOUT",
    "CONNECT_TIMEOUT",
    "WRITE_TIMEOUT",
    "MESSAGE_TIMEOUT",
    "UPGRADE_TIMEOUT",
    "HEAD_TIMEOUT",
)
SIZES = ("MAX_PAYLOAD", "MAX_BUFFER")
COUNTS = ("MAX_PACKETS", "MAX_FRAGMENTS", "MAX_CHANNELS", "MAX_NAMESPACES", "MAX_CONNECTIONS")
COUNTS_OR_NONE = ("MAX_CONNECTIONS_PER_ADDRESS", "MAX_CONNECTIONS_PER_USER")
RATES = ("HANDSHAKE_RATE", "HANDSHAKE_RATE_PER_ADDRESS", "EVENT_RATE", "EVENT_RATE_PER_USER")
NO_COUNTS = [0, -1, 0.5, 1.5, "10", True, float("nan"), float("inf"), 10**12]

VALID: dict[str, list[Any]] = {
    "HOST": ["0.0.0.0", "::1", "localhost"],
    "PORT": [0, 80, 65535, 9000.0],
    "BACKEND": ["memory://", "redis://host/1", "a.b.C", {"BACKEND": "a.b.C", "OPTIONS": {"x": 1}}],
    "MESSAGE_LOG_FORMAT": [None, "", "%(TIME)s %(TYPE)s %(MESSAGE)s", "%(HTTP_COOKIE)s 100 %%"],
    **dict.fromkeys(SECONDS, [1, 0.3, 25.5, 3600]),
    **dict.fromkeys(SIZES, [1, 1000, 1e6, 2.5e5, 2**30]),
    "COMPRESSION": [None, False, True, {}, {"threshold": 0, "level": 9, "limit": 2**20}],
    "ALLOWED_ORIGINS": [
        None,
        "*",
        [],
        ["*"],
        ("https://example.com", "http://[::1]:8000", "https://*.example.com:8443"),
        lambda origin, environ: True,
        "django_socketio.origins.allow",
    ],
    "SLOW_CONSUMERS": [[], (), [("ticks-", "volatile"), [".*", "coalesce"]], [("", "disconnect")]],
    "REAUTH_INTERVAL": [None, 0.5, 60, 3600],
    "BLOCKING_THRESHOLD": [None, 0.05, 1, 60],
    "THREADS": [1, 10, 64.0],
    "MAX_DATABASE_CONNECTIONS": [None, 1, 15, 20.0],
    "DRAIN": [0, 0.5, 25, 3600],
    "RUNTIME_DIR": [None, "/run/chat", Path("/run/chat")],
    **dict.fromkeys(COUNTS, [1, 5000, 1e6]),
    **dict.fromkeys(COUNTS_OR_NONE, [None, 1, 5000, 1e6]),
    **dict.fromkeys(RATES, [None, 0.1, 100, 5.5, (100, 200), [0.5, 1], (1000, 1)]),
    "MAX_ATTACHMENTS": [1, 10, 10_000],
    "MAX_ATTACHMENT_BYTES": [None, 1, 5e6],
    "MAX_JSON_DEPTH": [1, 64, 1000],
    "MAX_NAME": [1, 255],
    "MAX_HANDLERS": [1, 100_000],
    "MAX_HEAD": [1024, 16_384, 2**20],
}
INVALID: dict[str, list[Any]] = {
    "HOST": ["", None, 5],
    "PORT": [-1, 65536, "9000", None, True, 80.5, float("nan"), float("inf")],
    "BACKEND": ["", None, 5, [], {}, {"BACKEND": 1}, {"BACKEND": "a.B", "OPTION": {}}],
    "MESSAGE_LOG_FORMAT": [5, "%(MESSAGE)", "%s %s", "%(TIME)d", b"%(TIME)s"],
    **dict.fromkeys(SECONDS, [0, -1, "25", None, True, float("nan"), float("inf"), 86400]),
    **dict.fromkeys(SIZES, [0, 0.5, -1, "1000000", None, True, float("nan"), float("inf"), 2**31]),
    "SLOW_CONSUMERS": [
        None,
        "volatile",
        {"ticks-": "volatile"},
        ["ticks-", "volatile"],
        [("ticks-",)],
        [("ticks-", "volatile", 1)],
        [(None, "volatile")],
        [("ticks-", "drop")],
        [("ticks-(", "volatile")],
    ],
    "COMPRESSION": [
        6,
        "on",
        {"treshold": 1},
        {1: 1},
        {"threshold": -1},
        {"level": 0},
        {"level": 10},
        {"level": 6.0},
        {"level": True},
        {"limit": 0},
        {"limit": None},
        {"limit": 2**31},
    ],
    "ALLOWED_ORIGINS": [
        "https://example.com",
        5,
        True,
        ["example.com"],
        ["https://example.com/"],
        ["https://example.com/path"],
        ["ftp://example.com"],
        ["https://user@example.com"],
        ["https://a.*.example.com"],
        ["https://"],
        ["https://bücher.example"],  # a browser sends Punycode
        ["https://example.com:port"],
        ["https://example.com:"],
        ["null"],
        [None],
        {"https://example.com": 1},
        "",
        "django_socketio.origins.nothing",
        "django_socketio.origins.logger",
    ],
    "REAUTH_INTERVAL": [0, -1, "60", True, float("nan"), float("inf"), 86400],
    "BLOCKING_THRESHOLD": [0, -1, "0.2", True, False, float("nan"), 86400],
    "THREADS": [0, -1, 1.5, "10", None, True, float("inf")],
    "MAX_DATABASE_CONNECTIONS": [0, -1, 1.5, "10", True, float("inf")],
    "DRAIN": [-1, "3", None, True, float("nan"), float("inf"), 3601],
    "RUNTIME_DIR": ["", "run", 5, Path("run"), "/" + 80 * "x"],
    **dict.fromkeys(COUNTS, [*NO_COUNTS, None]),
    **dict.fromkeys(COUNTS_OR_NONE, NO_COUNTS),
    **dict.fromkeys(RATES, [0, -1, "5", True, float("inf"), (), (1,), (1, 0.5), (0, 5), (1, None)]),
    "MAX_ATTACHMENTS": [*NO_COUNTS, None, 10_001],
    "MAX_ATTACHMENT_BYTES": [0, 0.5, -1, "1000000", True, 2**31],
    "MAX_JSON_DEPTH": [*NO_COUNTS, None, 1001],
    "MAX_NAME": [*NO_COUNTS, None, 256],
    "MAX_HANDLERS": [*NO_COUNTS, None, 100_001],
    "MAX_HEAD": [*NO_COUNTS, None, 1023, 2**20 + 1],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


def test_every_setting_is_in_these_tables() -> None:
    assert set(conf.SETTINGS) == set(DEFAULTS) == set(VALID) == set(INVALID)


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_the_defaults_are_the_contracts(name: str, default: Any) -> None:
    assert conf.get(name) == default


def test_the_defaults_are_valid() -> None:
    assert conf.problems() == []


def test_the_default_log_format_is_the_one_of_old() -> None:
    fields = {"REMOTE_ADDR": "1.2.3.4", "TIME": "now", "TYPE": "message", "MESSAGE": "hello"}
    assert conf.LOG_FORMAT % fields == '1.2.3.4 - - [now] "Socket.IO message: hello"'


@pytest.mark.parametrize(("name", "value"), cases(VALID))
def test_what_is_valid(name: str, value: Any) -> None:
    with override_settings(**{f"SOCKETIO_{name}": value}):
        assert conf.problems() == []
        assert conf.get(name) == value


@pytest.mark.parametrize(("name", "value"), cases(INVALID), ids=repr)
def test_what_is_not_is_one_sentence_about_it(name: str, value: Any) -> None:
    with override_settings(**{f"SOCKETIO_{name}": value}):
        ((setting, sentence),) = conf.problems()
    assert setting == f"SOCKETIO_{name}"
    assert sentence.startswith(f"SOCKETIO_{name} ") and sentence.endswith(".")
    assert repr(value) in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("SOCKETIO_PING_INTERVALL", "did you mean SOCKETIO_PING_INTERVAL?"),
        ("SOCKETIO_ALLOWED_ORIGIN", "did you mean SOCKETIO_ALLOWED_ORIGINS?"),
        ("SOCKETIO_BACKENDS", "did you mean SOCKETIO_BACKEND?"),
        ("SOCKETIO_XYZZY", "there are SOCKETIO_HOST, SOCKETIO_PORT,"),
    ],
)
def test_a_setting_that_does_not_exist_has_a_suggestion(name: str, suggestion: str) -> None:
    with override_settings(**{name: 1}):
        ((setting, sentence),) = conf.problems()
    assert setting == name
    assert sentence.startswith(f"{name} is no setting of django-socketio: {suggestion}")


def test_all_that_is_wrong_is_told_at_once() -> None:
    wrong = {"SOCKETIO_PORT": "x", "SOCKETIO_PING_TIMEOUT": 0, "SOCKETIO_PROT": 1}
    with override_settings(**wrong):
        assert {setting for setting, _ in conf.problems()} == set(wrong)


@pytest.mark.parametrize(
    ("value", "rate"),
    [(None, None), (100, (100, 100)), (0.5, (0.5, 1)), ((5, 20), (5, 20)), ([5, 20], (5, 20))],
)
def test_a_rate_is_a_number_or_has_a_burst(value: Any, rate: Any) -> None:
    with override_settings(SOCKETIO_EVENT_RATE=value):
        assert conf.get_rate("EVENT_RATE") == rate


def test_the_documentation_has_every_setting() -> None:
    text = (ROOT / "docs" / "settings.rst").read_text()
    documented = re.findall(r"^``SOCKETIO_(\w+)``$", text, re.MULTILINE)
    assert sorted(documented) == sorted(conf.SETTINGS)


def test_other_peoples_settings_are_their_own() -> None:
    with override_settings(SOCKET_TIMEOUT=5, MY_SOCKETIO_PORT="x"):
        assert conf.problems() == []
