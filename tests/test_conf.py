"""The settings: what each may be, and what is said of those that may not."""

from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from django_socketio import conf

DEFAULTS = {
    "HOST": "127.0.0.1",
    "PORT": 9000,
    "BACKEND": "memory://",
    "MESSAGE_LOG_FORMAT": conf.LOG_FORMAT,
    "PING_INTERVAL": 25,
    "PING_TIMEOUT": 20,
    "CONNECT_TIMEOUT": 45,
    "MAX_PAYLOAD": 1_000_000,
    "MAX_BUFFER": 2**20,
    "ALLOWED_ORIGINS": None,
    "RUNTIME_DIR": None,
}
SECONDS = ("PING_INTERVAL", "PING_TIMEOUT", "CONNECT_TIMEOUT")
SIZES = ("MAX_PAYLOAD", "MAX_BUFFER")

VALID: dict[str, list[Any]] = {
    "HOST": ["0.0.0.0", "::1", "localhost"],
    "PORT": [0, 80, 65535, 9000.0],
    "BACKEND": ["memory://", "redis://host/1", "a.b.C", {"BACKEND": "a.b.C", "OPTIONS": {"x": 1}}],
    "MESSAGE_LOG_FORMAT": [None, "", "%(TIME)s %(TYPE)s %(MESSAGE)s", "%(HTTP_COOKIE)s 100 %%"],
    **dict.fromkeys(SECONDS, [1, 0.3, 25.5, 3600]),
    **dict.fromkeys(SIZES, [1, 1000, 1e6, 2.5e5, 2**30]),
    "ALLOWED_ORIGINS": [
        None,
        "*",
        [],
        ["*"],
        ("https://example.com", "http://[::1]:8000", "https://*.example.com:8443"),
    ],
    "RUNTIME_DIR": [None, "/run/chat", Path("/run/chat")],
}
INVALID: dict[str, list[Any]] = {
    "HOST": ["", None, 5],
    "PORT": [-1, 65536, "9000", None, True, 80.5, float("nan"), float("inf")],
    "BACKEND": ["", None, 5, [], {}, {"BACKEND": 1}, {"BACKEND": "a.B", "OPTION": {}}],
    "MESSAGE_LOG_FORMAT": [5, "%(MESSAGE)", "%s %s", "%(TIME)d", b"%(TIME)s"],
    **dict.fromkeys(SECONDS, [0, -1, "25", None, True, float("nan"), float("inf"), 86400]),
    **dict.fromkeys(SIZES, [0, 0.5, -1, "1000000", None, True, float("nan"), float("inf"), 2**31]),
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
    ],
    "RUNTIME_DIR": ["", "run", 5, Path("run"), "/" + 80 * "x"],
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


def test_other_peoples_settings_are_their_own() -> None:
    with override_settings(SOCKET_TIMEOUT=5, MY_SOCKETIO_PORT="x"):
        assert conf.problems() == []
