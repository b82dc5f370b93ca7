"""The process: its backend and hub, starting and stopping, and the database in handlers."""

import gc
import subprocess
import sys
import textwrap
from typing import Any

import gevent
import pytest
from django.contrib.auth.models import User
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, transaction
from django.test import override_settings
from gevent.event import Event

from django_socketio import broadcast, runtime
from django_socketio.backends import BaseBackend
from django_socketio.backends.memory import MemoryBackend
from django_socketio.engine import Compression
from django_socketio.events import on_event, on_finish
from tests import clients
from tests.sites import Site, settings
from tests.support import ROOT, UNIT, wait_until


def python(source: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run some lines in the tests' project, in a process that nothing has patched."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(source)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600 * UNIT)


# The backend that the settings name


class OwnBackend(MemoryBackend):
    """A backend of the project's own."""

    def __init__(self, url: str = "", *, prefix: str = "x") -> None:
        super().__init__(url)
        self.prefix = prefix


class Unfinished(BaseBackend):
    """A backend that lacks most of what one needs."""


def no_backend() -> str:
    return "no backend"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("memory://", MemoryBackend),
        ("django_socketio.backends.memory.MemoryBackend", MemoryBackend),
        ({"BACKEND": "django_socketio.backends.memory.MemoryBackend"}, MemoryBackend),
        (f"{__name__}.OwnBackend", OwnBackend),
        ({"BACKEND": f"{__name__}.OwnBackend", "OPTIONS": {}}, OwnBackend),
    ],
)
def test_a_backend_is_made_from_the_setting(value: Any, kind: type) -> None:
    assert type(runtime.make_backend(value)) is kind


def test_options_are_the_backends_arguments() -> None:
    value = {"BACKEND": f"{__name__}.OwnBackend", "OPTIONS": {"prefix": "mine"}}
    backend = runtime.make_backend(value)
    assert isinstance(backend, OwnBackend) and backend.prefix == "mine"


INVALID_BACKENDS = [
    ("carrier-pigeon://", "carrier-pigeon:// is none of memory://"),
    ("memory", "memory"),
    ("", "must be a URL"),
    (None, "must be a URL"),
    (5, "must be a URL"),
    ({}, "must be a URL"),
    ({"OPTIONS": {}}, "must be a URL"),
    ({"BACKEND": "x.Y", "OPTIONS": []}, "must be a URL"),
    ({"BACKEND": "x.Y", "OPTION": {}}, "unknown key(s) OPTION"),
    ("no.such.module.Backend", "no"),
    (f"{__name__}.NoSuchBackend", "NoSuchBackend"),
    (f"{__name__}.no_backend", f"{__name__}.no_backend is no BaseBackend"),
    (f"{__name__}.INVALID_BACKENDS", "INVALID_BACKENDS"),
    (f"{__name__}.Unfinished", "Unfinished"),
    (
        {
            "BACKEND": "django_socketio.backends.memory.MemoryBackend",
            "OPTIONS": {"speed": 1, "colour": 2},
        },
        "MemoryBackend does not know the option(s) colour, speed",
    ),
    ({"BACKEND": f"{__name__}.OwnBackend", "OPTIONS": {"prefx": 1}}, "prefx"),
]


@pytest.mark.parametrize(("value", "named"), INVALID_BACKENDS)
def test_a_backend_that_cannot_be_made_is_one_sentence(value: Any, named: str) -> None:
    with pytest.raises(ImproperlyConfigured) as error:
        runtime.make_backend(value)
    sentence = str(error.value)
    assert sentence.startswith("SOCKETIO_BACKEND")
    assert named in sentence and "\n" not in sentence


# One hub per process


def test_there_is_one_hub_whoever_asks() -> None:
    try:
        hubs = [gevent.spawn(runtime.get_hub) for _ in range(10)]
        pool = gevent.get_hub().threadpool
        hubs += [pool.spawn(runtime.get_hub) for _ in range(10)]
        assert {id(hub.get()) for hub in hubs} == {id(runtime.get_hub())}
    finally:
        runtime.stop()


def test_a_child_process_makes_its_own() -> None:
    run = python("""
        import os
        import django
        django.setup()
        from django_socketio import runtime
        hub = runtime.get_hub()
        pid = os.fork()
        if not pid:
            os._exit(17 if runtime.get_hub() is not hub else 18)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 17
        assert runtime.get_hub() is hub
    """)
    assert (run.returncode, run.stderr) == (0, "")


# Starting and stopping


def test_starting_unpatched_is_one_sentence() -> None:
    run = python("""
        import django
        django.setup()
        from django_socketio import runtime
        runtime.start()
    """)
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert "ImproperlyConfigured: gevent has not patched the standard library" in last
    assert "runserver_socketio" in last and "gevent.monkey.patch_all()" in last


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"SOCKETIO_PING_INTERVAL": "often"}, "SOCKETIO_PING_INTERVAL must be a number"),
        ({"SOCKETIO_PINGS": 1}, "SOCKETIO_PINGS is no setting"),
        ({"SOCKETIO_BACKEND": "pigeon://"}, "SOCKETIO_BACKEND: pigeon://"),
    ],
)
def test_starting_with_a_wrong_setting_is_one_sentence(
    settings: dict[str, Any], sentence: str
) -> None:
    with override_settings(**settings), pytest.raises(ImproperlyConfigured) as error:
        runtime.start()
    assert str(error.value).startswith(sentence)
    assert runtime.get_dispatcher() is None
    with Site() as site:  # and nothing is left of the attempt
        assert site.connect().fence() == []


def test_serving_without_the_url_conf_is_one_sentence() -> None:
    dispatcher = runtime.start()
    try:
        with override_settings(ROOT_URLCONF="tests.test_runtime"):
            with pytest.raises(ImproperlyConfigured, match=r'include\("django_socketio.urls"\)'):
                runtime.Application(lambda environ, start_response: [], dispatcher)
    finally:
        runtime.stop()


urlpatterns: list[Any] = []


@pytest.mark.parametrize(
    ("value", "compression"),
    [
        (None, None),
        (False, None),
        (True, Compression()),
        ({}, Compression()),
        ({"threshold": 5, "level": 1}, Compression(threshold=5, level=1)),
        ({"limit": 5000}, Compression(limit=5000)),
    ],
)
def test_compression_is_what_the_setting_says(value: Any, compression: Any) -> None:
    with Site(SOCKETIO_COMPRESSION=value) as site:
        assert site.dispatcher.engine.config.compression == compression


def test_stopping_what_was_not_started_is_fine() -> None:
    runtime.stop()
    runtime.stop()


def test_a_process_may_serve_again(site: Site) -> None:
    before = site.connect()
    site.stop()
    before.connection.wait_for_end()
    with Site() as again:
        client = again.connect()
        broadcast("hello")
        assert client.fence() == [["message", "hello"]]


def test_stopping_waits_for_handlers_but_not_forever() -> None:
    begun, hangs = Event(), Event()
    ended: list[str] = []
    with Site() as site:

        @on_event("hang")
        def hang(request: Any, socket: Any, context: Any) -> None:
            begun.set()
            hangs.wait()

        @on_event("be slow")
        def be_slow(request: Any, socket: Any, context: Any) -> None:
            gevent.sleep(2 * UNIT)
            ended.append("slow")

        on_finish(lambda request, socket, context: ended.append("finish"))
        slow, hanging = site.connect_several(2)
        slow.emit("be slow")
        hanging.emit("hang")
        assert begun.wait(clients.TIMEOUT)
        started = gevent.get_hub().loop.now()
        runtime.stop(timeout=6 * UNIT)
        gevent.sleep(0)
        assert gevent.get_hub().loop.now() - started < 20 * UNIT
        assert ended == ["slow", "finish"]
        site.dispatcher.connections.clear()  # the one that hung


def test_stopping_lets_go_of_every_connection(site: Site) -> None:
    """Also of one that was closed, and has not answered that yet."""
    closed, open_ = site.connect_several(2)
    polling = site.connect(transport="polling")
    closed.connection.transport.send("42nonsense")
    wait_until(lambda: site.dispatcher.engine.counters["closed: parse error"])
    site.stop()
    for client in (closed, open_):
        client.connection.wait_for_end()
        assert client.connection.transport.socket.recv(1) == b""
    with pytest.raises((OSError, clients.Lost)):
        polling.send("x")
    gc.collect()  # a socket that was not closed is a warning, and so an error


# The database


def held(opened: list[Any]) -> int:
    return sum(1 for wrapper in opened if wrapper.connection is not None)


def bind_database_handlers() -> None:
    @on_event("add")
    def add(request: Any, socket: Any, context: Any, name: str) -> int:
        User.objects.create(username=name)
        return User.objects.count()

    @on_event("fail")
    def fail(request: Any, socket: Any, context: Any, name: str) -> None:
        with transaction.atomic():
            User.objects.create(username=name)
            raise LookupError(name)


def test_a_connection_is_closed_after_the_handler(site: Site, opened: list[Any]) -> None:
    bind_database_handlers()
    crowd = site.connect_several(5)
    opened.clear()
    for number, client in enumerate(crowd):
        assert client.call("add", f"user {number}") == [number + 1]
        wait_until(lambda: held(opened) == 0)
    assert len(opened) == 5  # for CONN_MAX_AGE is 0


def test_idle_sockets_hold_no_connection(site: Site, opened: list[Any]) -> None:
    """Not even those whose handshake asked the database who is there."""
    bind_database_handlers()
    crowd = site.connect_several(10)
    crowd += [site.connect(transport="polling") for _ in range(3)]
    for client in crowd:
        client.call("add", client.sid)
    wait_until(lambda: held(opened) == 0)
    for client in crowd:
        assert client.fence() == []
    assert held(opened) == 0


def querying(get_response: Any) -> Any:
    """A middleware that asks the database before the view."""

    def middleware(request: Any) -> Any:
        User.objects.count()
        return get_response(request)

    return middleware


@settings(MIDDLEWARE=[f"{__name__}.querying"])
def test_polls_hold_no_connection(
    site: Site, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a persistent one, which the handshake has left on the poll's way."""
    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", None)
    crowd = [site.connect(transport="polling") for _ in range(5)]
    polls = [gevent.spawn(client.event) for client in crowd]
    sessions = site.dispatcher.engine.sessions
    wait_until(lambda: all(session.transport.polled for session in sessions.values()))
    assert len(opened) >= len(sessions) == 5
    assert held(opened) == 0
    broadcast("hello")
    assert [poll.get() for poll in polls] == [["message", "hello"]] * 5


def test_there_are_as_many_connections_as_handlers_that_run(site: Site, opened: list[Any]) -> None:
    go_on = Event()

    @on_event("hold")
    def hold(request: Any, socket: Any, context: Any) -> int:
        User.objects.count()
        go_on.wait()
        return User.objects.count()

    crowd = site.connect_several(12)
    ids = [client.request("hold") for client in crowd]
    wait_until(lambda: held(opened) == 12)
    go_on.set()
    assert [client.acked(id_) for client, id_ in zip(crowd, ids, strict=True)] == [[0]] * 12
    wait_until(lambda: held(opened) == 0)


def test_a_persistent_connection_serves_many_handlers(
    site: Site, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bind_database_handlers()
    monkeypatch.setitem(connections.settings["default"], "CONN_MAX_AGE", None)
    crowd = site.connect_several(3)
    opened.clear()
    for number in range(9):
        assert crowd[number % 3].call("add", f"user {number}") == [number + 1]
    assert len(opened) == held(opened) == 1
    site.stop()
    wait_until(lambda: held(opened) == 0)


def test_a_handler_that_fails_rolls_back_and_the_next_works(site: Site, opened: list[Any]) -> None:
    bind_database_handlers()
    client = site.connect()
    for _ in range(3):
        client.emit("fail", "nobody")
    assert client.call("add", "somebody") == [1]
    assert not User.objects.filter(username="nobody").exists()


def test_a_transaction_that_a_handler_leaves_open_does_not_reach_the_next(
    site: Site, opened: list[Any]
) -> None:
    bind_database_handlers()

    @on_event("forget")
    def forget(request: Any, socket: Any, context: Any) -> None:
        transaction.set_autocommit(False)
        User.objects.create(username="forgotten")

    @on_event("autocommit")
    def autocommit(request: Any, socket: Any, context: Any) -> bool:
        return transaction.get_autocommit()

    client = site.connect()
    assert client.call("forget") == []
    assert client.call("autocommit") == [True]
    assert client.call("add", "somebody") == [1]


def test_the_last_handlers_may_use_the_database(site: Site, opened: list[Any]) -> None:
    counts: list[int] = []
    on_finish(lambda request, socket, context: counts.append(User.objects.count()))
    for client in site.connect_several(3):
        client.close()
    wait_until(lambda: counts == [0, 0, 0])
    wait_until(lambda: held(opened) == 0)
