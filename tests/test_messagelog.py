"""The log of the messages that clients send."""

import datetime
import logging
import re
from typing import Any

import pytest

from django_socketio.events import on_message
from tests.sites import Site, settings

EVERYTHING = "%(REMOTE_ADDR)s|%(TYPE)s|%(MESSAGE)s|%(HTTP_X_PROBE)s|%(NO_SUCH_KEY)s"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """Return a function that returns what was logged since the last call, fences left out."""
    caplog.set_level(logging.INFO, "django_socketio.messagelog")

    def lines() -> list[str]:
        records = [r for r in caplog.records if r.name == "django_socketio.messagelog"]
        caplog.clear()
        return [text for r in records if "fence" not in (text := r.getMessage())]

    return lines


def test_the_default_is_a_line_for_each_message(site: Site, lines: Any) -> None:
    client = site.connect()
    client.send("hello")
    client.fence()
    (line,) = lines()
    pattern = r'127\.0\.0\.1 - - \[([\d-]+ [\d:]+)\] "Socket\.IO message: hello"'
    match = re.fullmatch(pattern, line)
    assert match is not None, line
    assert datetime.datetime.fromisoformat(match[1])


@settings(SOCKETIO_MESSAGE_LOG_FORMAT=EVERYTHING)
def test_the_format_takes_the_meta_of_the_request(site: Site, lines: Any) -> None:
    client = site.connect(headers={"X-Probe": "probe"})
    client.send("hello", 2)
    client.emit("move", {"x": 1})
    client.subscribe("room")
    client.unsubscribe("room")
    client.fence()
    assert lines() == [
        "127.0.0.1|message|('hello', 2)|probe|-",
        "127.0.0.1|move|{'x': 1}|probe|-",
        "127.0.0.1|subscribe|room|probe|-",
        "127.0.0.1|unsubscribe|room|probe|-",
    ]


@settings(SOCKETIO_MESSAGE_LOG_FORMAT=None)
def test_none_turns_it_off(site: Site, lines: Any) -> None:
    client = site.connect()
    client.send("hello")
    client.subscribe("room")
    client.fence()
    assert lines() == []


@settings(SOCKETIO_MESSAGE_LOG_FORMAT=EVERYTHING)
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("message", ["one\ntwo"]),
        ("message", ["one\r\n127.0.0.1 - - forged"]),
        ("message", ["\x1b[31mred"]),
        ("message", ["\u2028\u2029\x85\x0b\x0c"]),
        ("message", [{"a\nb": ["c\nd"]}]),
        ("na\nme", ["x"]),
        ("%(TIME)s %s %d", ["%(MESSAGE)s %s"]),
        ("message", [b"\n\x00"]),
        ("message", ["x" * 100_000]),
        ("x" * 255, []),
        ("message", [["y" * 100_000]]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_message_stays_one_line(site: Site, lines: Any, name: str, args: list[Any]) -> None:
    client = site.connect()
    client.emit(name, *args)
    client.fence()
    (line,) = lines()
    assert line.isprintable()
    assert len(line) < 3000
    assert line.startswith("127.0.0.1|")


def test_a_deep_message_is_logged_shortly(site: Site, lines: Any) -> None:
    """And reaches the handler: no more of it is rendered than is kept."""
    heard: list[Any] = []
    on_message(lambda request, socket, context, message: heard.append(message))
    client = site.connect()
    client.connection.transport.send(f'42["message",{"[" * 60}{"]" * 60}]')
    client.fence()
    (line,) = lines()
    assert line.endswith(': [[[[[[[[[...]]]]]]]]]"') and len(line) < 200
    for _ in range(60):
        (heard,) = heard
    assert heard == []


@pytest.mark.parametrize("wrap", [str, lambda text: [text], lambda text: {text: 1}])
def test_a_long_message_is_logged_shortly(site: Site, lines: Any, wrap: Any) -> None:
    heard: list[Any] = []
    on_message(lambda request, socket, context, message: heard.append(message))
    client = site.connect()
    message = wrap("x" * 999_000)
    client.send(message)
    client.fence()
    (line,) = lines()
    assert line.isprintable() and len(line) < 1100
    assert heard == [message]


@settings(SOCKETIO_MESSAGE_LOG_FORMAT="%(TYPE)s")
def test_what_is_refused_is_logged_too(site: Site, lines: Any) -> None:
    client = site.connect()
    client.emit("nobody hears this")
    client.fence()
    assert lines() == ["nobody hears this"]


def test_the_log_is_the_only_place_that_shows_messages(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = site.connect(auth={"token": "a secret"})
    client.send("a secret")
    client.subscribe("a secret")
    client.fence()
    client.close()
    site.stop()
    for record in caplog.records:
        if record.name != "django_socketio.messagelog":
            assert "a secret" not in record.getMessage()


@settings(SOCKETIO_MESSAGE_LOG_FORMAT="%(TYPE)s")
def test_a_logger_that_shows_nothing_costs_no_formatting(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "django_socketio.messagelog")
    formatted: list[Any] = []
    monkeypatch.setattr("django_socketio.messagelog._one_line", formatted.append)
    site.connect().fence()
    assert formatted == []
