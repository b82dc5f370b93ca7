"""The handshake as a request to Django: middleware, session, signals, and what is left of it."""

import gc
import json
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django import urls
from django.contrib.auth.models import User
from django.core.signals import got_request_exception, request_finished, request_started
from django.http import HttpRequest, HttpResponse
from django.test import Client as Browser, override_settings

from django_socketio import runtime
from django_socketio.engine import FRONT
from django_socketio.events import on_connect, on_event
from tests import clients
from tests.carrier import Carrier, Net
from tests.clients import PATH, UPGRADE, HandshakeFailed
from tests.sites import Site, settings
from tests.support import UNIT, wait_until

TRANSPORTS = pytest.mark.parametrize("transport", ["websocket", "polling"])
SESSIONS = (
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
)

View = Callable[[HttpRequest], HttpResponse]


def refusing(get_response: View) -> View:
    """A middleware that lets nobody in."""
    return lambda request: HttpResponse("members only", status=401)


def regretting(get_response: View) -> View:
    """A middleware that changes its mind behind the view."""

    def middleware(request: HttpRequest) -> HttpResponse:
        get_response(request)
        return HttpResponse("members only", status=401)

    return middleware


def failing(get_response: View) -> View:
    def middleware(request: HttpRequest) -> HttpResponse:
        raise ArithmeticError("in a middleware")

    return middleware


def baking(get_response: View) -> View:
    """A middleware that sets cookies and headers, and writes into the session."""

    def middleware(request: HttpRequest) -> HttpResponse:
        request.session["visits"] = request.session.get("visits", 0) + 1
        response = get_response(request)
        response.set_cookie("flavour", "chocolate chip", httponly=True)
        response["X-Probe"] = "probe"
        return response

    return middleware


fronts: list[weakref.ref[Any]] = []


def watching(get_response: View) -> View:
    """A middleware that notes the connection of each request."""

    def middleware(request: HttpRequest) -> HttpResponse:
        fronts.append(weakref.ref(request.META[FRONT]))
        return get_response(request)

    return middleware


@pytest.fixture
def user() -> Iterator[User]:
    user = User.objects.create_user("ada")
    yield user
    user.delete()


def login(user: User, **session: Any) -> dict[str, str]:
    """Return the headers of a browser that is logged in."""
    browser = Browser()
    browser.force_login(user)
    stored = browser.session
    stored.update(session)
    stored.save()
    return {"Cookie": f"sessionid={browser.cookies['sessionid'].value}; other=1"}


# The middleware


@TRANSPORTS
def test_handlers_know_the_user_and_the_session(site: Site, transport: str, user: User) -> None:
    @on_event("who")
    def who(request: Any, socket: Any, context: Any) -> tuple[Any, ...]:
        return request.user.username, request.user.is_authenticated, request.session.get("basket")

    client = site.connect(transport=transport, headers=login(user, basket=[1, 2]))
    assert client.call("who") == ["ada", True, [1, 2]]
    stranger = site.connect(transport=transport)
    assert stranger.call("who") == ["", False, None]
    forged = site.connect(transport=transport, headers={"Cookie": "sessionid=" + "x" * 32})
    assert forged.call("who") == ["", False, None]


def test_a_handler_may_write_into_the_session(site: Site, user: User) -> None:
    @on_event("buy")
    def buy(request: Any, socket: Any, context: Any, what: str) -> None:
        request.session["basket"] = what
        request.session.save()

    headers = login(user)
    assert site.connect(headers=headers).call("buy", "tea") == []
    on_event("basket")(lambda request, socket, context: request.session["basket"])
    assert site.connect(headers=headers).call("basket") == ["tea"]


@settings(MIDDLEWARE=[*SESSIONS, f"{__name__}.baking"])
@TRANSPORTS
def test_what_middleware_adds_is_on_the_answer(site: Site, transport: str) -> None:
    connection = site.open(transport)
    cookies = connection.transport.headers("Set-Cookie")
    assert connection.transport.headers("X-Probe") == ["probe"]
    assert len(cookies) == 2
    assert any(cookie.startswith('flavour="chocolate chip"; HttpOnly') for cookie in cookies)
    (session,) = [cookie for cookie in cookies if cookie.startswith("sessionid=")]
    on_event("visits")(lambda request, socket, context: request.session["visits"])
    assert connection.connect().call("visits") == [1]
    headers = {"Cookie": session.partition(";")[0]}
    assert site.connect(transport=transport, headers=headers).call("visits") == [2]


@settings(MIDDLEWARE=[*SESSIONS, f"{__name__}.baking"])
def test_only_the_handshake_passes_the_middleware(site: Site) -> None:
    client = site.connect(transport="polling")
    assert client.fence() == []
    transport = client.connection.transport
    assert transport.headers("Set-Cookie") == transport.headers("X-Probe") == []


@settings(MIDDLEWARE=[f"{__name__}.refusing"])
@TRANSPORTS
def test_a_middleware_may_refuse(site: Site, transport: str) -> None:
    asked: list[Any] = []
    on_connect(lambda *args: asked.append(args))
    with pytest.raises(HandshakeFailed) as failed:
        site.connect(transport=transport)
    assert (failed.value.status, failed.value.body) == (401, b"members only")
    assert not site.dispatcher.engine.sessions
    assert site.dispatcher.engine.counters["opened"] == 0
    assert not asked


@settings(MIDDLEWARE=[f"{__name__}.regretting"])
@TRANSPORTS
def test_a_middleware_may_refuse_behind_the_view(site: Site, transport: str) -> None:
    asked: list[Any] = []
    on_connect(lambda *args: asked.append(args))
    with pytest.raises(HandshakeFailed) as failed:
        site.connect(transport=transport)
    assert (failed.value.status, failed.value.body) == (401, b"members only")
    assert "sid" not in str(failed.value.headers)
    if transport == "websocket":
        assert site.dispatcher.engine.counters["opened"] == 0
    assert not site.dispatcher.engine.sessions
    assert not asked


@settings(MIDDLEWARE=[f"{__name__}.failing"])
@TRANSPORTS
def test_a_middleware_that_crashes_is_djangos_error(site: Site, transport: str) -> None:
    errors: list[Any] = []
    note = lambda **kwargs: errors.append(kwargs)  # noqa: E731
    got_request_exception.connect(note)
    try:
        with pytest.raises(HandshakeFailed) as failed:
            site.connect(transport=transport)
    finally:
        got_request_exception.disconnect(note)
    assert failed.value.status == 500
    assert len(errors) == 1
    assert not site.dispatcher.engine.sessions


@settings(MIDDLEWARE=["django.middleware.gzip.GZipMiddleware"])
@TRANSPORTS
def test_a_middleware_may_compress(site: Site, transport: str) -> None:
    client = site.connect(transport=transport, headers={"X-Probe": "x"})
    assert client.fence() == []


# The request in handlers


@TRANSPORTS
def test_the_request_is_of_use_in_handlers(site: Site, transport: str) -> None:
    found: dict[str, Any] = {}

    @on_event("look")
    def look(request: HttpRequest, socket: Any, context: Any) -> None:
        found["method"] = request.method
        found["path"] = request.path
        found["room"] = request.GET.getlist("room")
        found["transport"] = request.GET["transport"]
        found["cookies"] = request.COOKIES
        found["agent"] = request.META["HTTP_USER_AGENT"]
        found["probe"] = request.headers["X-Probe"]
        found["address"] = request.META["REMOTE_ADDR"]
        found["host"] = request.get_host()
        found["uri"] = request.build_absolute_uri("/x/")
        found["secure"] = request.is_secure()
        found["body"] = request.body
        found["read"] = request.read()
        found["post"] = (dict(request.POST), dict(request.FILES))
        found["route"] = request.resolver_match and request.resolver_match.url_name

    headers = {"Cookie": "a=1; b=2", "X-Probe": "probe", "User-Agent": "tests"}
    query = {"room": "räume & more"}
    client = site.connect(transport=transport, headers=headers, query=query)
    for _ in range(2):  # and it stays so
        client.call("look")
        assert found == {
            "method": "GET",
            "path": PATH,
            "room": ["räume & more"],
            "transport": transport,
            "cookies": {"a": "1", "b": "2"},
            "agent": "tests",
            "probe": "probe",
            "address": "127.0.0.1",
            "host": site.address,
            "uri": f"http://{site.address}/x/",
            "secure": False,
            "body": b"",
            "read": b"",
            "post": ({}, {}),
            "route": "socketio",
        }


def test_a_handshake_with_a_body_leaves_none(site: Site) -> None:
    body: list[bytes] = []
    on_connect(lambda request, socket, context: body.append(request.body))
    target = f"{PATH}?EIO=4&transport=polling"
    answer = clients.request(site.address, "GET", target, body=b"x" * 1000)
    assert answer.status == 200
    sid = json.loads(answer.body[1:])["sid"]
    clients.request(site.address, "POST", f"{target}&sid={sid}", body=b"40")
    wait_until(lambda: body)
    assert body == [b""]


def test_the_request_stays_the_same_through_an_upgrade(site: Site) -> None:
    requests: list[Any] = []

    @on_connect
    @on_event("look")
    def look(request: Any, socket: Any, context: Any) -> str:
        requests.append(request)
        return str(request.GET["transport"])

    client = site.connect(transport="polling", headers={"Cookie": "a=1"})
    query = {"sid": client.connection.sid}
    headers = {"Cookie": "a=2"}
    websocket = clients.WebSocket(site.address, query=query, headers=headers)
    client.connection.upgrade(websocket)
    assert client.call("look") == ["polling"]
    assert requests[0] is requests[1]
    assert requests[1].COOKIES == {"a": "1"}


# Its end


@TRANSPORTS
def test_the_request_ends_with_the_handshake(site: Site, transport: str) -> None:
    signals: list[str] = []
    begun = lambda **kwargs: signals.append("started")  # noqa: E731
    ended = lambda **kwargs: signals.append("finished")  # noqa: E731
    request_started.connect(begun)
    request_finished.connect(ended)
    try:
        client = site.connect(transport=transport)
        assert signals == ["started", "finished"]
        client.send("x")
        assert client.fence() == []
        if transport == "polling":
            query = {"sid": client.connection.sid}
            client.connection.upgrade(clients.WebSocket(site.address, query=query))
            assert client.fence() == []
        clients.request(site.address, "OPTIONS", PATH)
        client.close()
        wait_until(lambda: all(s.reason for s in site.dispatcher.engine.sessions.values()))
    finally:
        request_started.disconnect(begun)
        request_finished.disconnect(ended)
    assert signals == ["started", "finished"]


@settings(MIDDLEWARE=[f"{__name__}.watching"])
@TRANSPORTS
def test_the_request_keeps_nothing_of_its_connection(site: Site, transport: str) -> None:
    """Handlers hold it for days; what parsed it need not stay for as long."""
    fronts.clear()
    requests: list[HttpRequest] = []
    on_connect(lambda request, socket, context: requests.append(request))
    client = site.connect(transport=transport)
    if transport == "polling":
        client.close()
    (front,) = fronts
    wait_until(lambda: gc.collect() >= 0 and front() is None)
    assert "wsgi.input" not in requests[0].META


def test_a_poll_is_answered_at_once(site: Site) -> None:
    """Head and body of an answer must not wait for the client's delayed ACK, 40 ms each time."""
    client = site.connect(transport="polling")
    times = []
    for _ in range(20):
        started = time.perf_counter()
        client.fence()
        times.append(time.perf_counter() - started)
    assert statistics.median(times) < 0.03


# Without the server, and beside it


def test_django_alone_says_what_is_missing() -> None:
    answer = Browser().get(PATH, {"EIO": "4", "transport": "polling"})
    assert answer.status_code == 503
    assert answer["Content-Type"] == "text/plain"
    assert answer.content.startswith(b"Socket.IO is not served here")
    assert b"runserver_socketio" in answer.content


def test_a_server_that_cannot_give_its_socket_away_says_so_too(site: Site) -> None:
    """In the process of the server, but not through it."""
    assert Browser().get(PATH, {"EIO": "4", "transport": "websocket"}).status_code == 503
    assert not site.dispatcher.engine.sessions


@pytest.mark.parametrize("method", ["post", "put", "options", "head"])
def test_any_method_is_answered_without_a_server(method: str) -> None:
    assert getattr(Browser(enforce_csrf_checks=True), method)(PATH).status_code == 503


def test_the_rest_of_the_project_is_served_by_django(site: Site) -> None:
    login_page = clients.request(site.address, target="/admin/login/")
    assert login_page.status == 200 and b"csrfmiddlewaretoken" in login_page.body
    assert clients.request(site.address, target="/nowhere/").status == 404
    body = b"username=x&password=y"
    headers = [("Content-Type", "application/x-www-form-urlencoded")]
    posted = clients.request(site.address, "POST", "/admin/login/", headers, body)
    assert posted.status == 403  # for want of a CSRF token: the middleware is there


@pytest.mark.parametrize(
    ("method", "query", "code", "message"),
    [
        ("GET", "", 0, "Transport unknown"),
        ("GET", "EIO=4&transport=carrier-pigeon", 0, "Transport unknown"),
        ("GET", "transport=polling", 5, "Unsupported protocol version"),
        ("GET", "EIO=3&transport=polling", 5, "Unsupported protocol version"),
        ("GET", "EIO=4&transport=websocket", 3, "Bad request"),
        ("GET", "EIO=4&EIO=4&transport=polling", 3, "Bad request"),
        ("POST", "EIO=4&transport=polling", 2, "Bad handshake method"),
        ("PUT", "EIO=4&transport=polling", 2, "Bad handshake method"),
        ("GET", "EIO=4&transport=polling&sid=unknown", 1, "Session ID unknown"),
        ("POST", "EIO=4&transport=polling&sid=unknown", 1, "Session ID unknown"),
    ],
)
def test_what_is_no_handshake_is_refused_as_the_protocol_says(
    site: Site, method: str, query: str, code: int, message: str
) -> None:
    answer = clients.request(site.address, method, f"{PATH}?{query}")
    assert answer.status == 400
    assert answer.header("Content-Type") == "application/json"
    assert answer.header("Content-Length") == str(len(answer.body))
    error = json.loads(answer.body)
    assert (error["code"], error["message"]) == (code, message)
    assert not site.dispatcher.engine.sessions


@TRANSPORTS
@pytest.mark.parametrize("name", ["s%69d", "%73id", "%73%69%64"])
def test_a_session_id_is_spelled_plainly(site: Site, transport: str, name: str) -> None:
    """Else a poll would wait inside of the middleware, for as long as nothing is sent."""
    client = site.connect(transport="polling")
    for sid in (client.connection.sid, ""):
        target = f"{PATH}?EIO=4&transport={transport}&{name}={sid}"
        answer = clients.request(site.address, "GET", target, UPGRADE)
        assert (answer.status, answer.body) == (400, b"sid is to be spelled plainly")
    assert client.fence() == []
    assert len(site.dispatcher.engine.sessions) == 1


def test_the_answer_to_an_upgrade_has_the_headers_of_one(site: Site) -> None:
    target = f"{PATH}?EIO=4&transport=websocket"
    answer = clients.request(site.address, "GET", target, UPGRADE)
    assert answer.status == 101
    assert answer.header("Sec-WebSocket-Accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert answer.header("Upgrade") == "websocket"
    assert answer.header("Connection") == "Upgrade"
    assert answer.header("Content-Length") is answer.header("Content-Type") is None
    assert answer.header("Transfer-Encoding") is None


def test_a_polling_handshake_must_not_be_cached(site: Site) -> None:
    answer = clients.request(site.address, target=f"{PATH}?EIO=4&transport=polling")
    assert answer.header("Cache-Control") == "no-store"
    assert (answer.header("Content-Type") or "").lower() == "text/plain; charset=utf-8"
    opened = json.loads(answer.body[1:])
    assert answer.body[:1] == b"0"
    assert opened["upgrades"] == ["websocket"]
    assert (opened["pingInterval"], opened["pingTimeout"]) == (25000, 20000)
    assert opened["maxPayload"] == 1000000


@settings(SOCKETIO_PING_INTERVAL=1.5, SOCKETIO_PING_TIMEOUT=0.25, SOCKETIO_MAX_PAYLOAD=2e5)
@TRANSPORTS
def test_the_settings_are_told_to_the_client(site: Site, transport: str) -> None:
    opened = site.open(transport).opened
    assert (opened["pingInterval"], opened["pingTimeout"]) == (1500, 250)
    assert opened["maxPayload"] == 200000


@settings(SOCKETIO_MAX_PAYLOAD=2000.5)
@TRANSPORTS
def test_more_than_the_maximal_payload_ends_the_client(site: Site, transport: str) -> None:
    client, other = site.connect(transport=transport), site.connect()
    client.send("x" * 1900)
    assert client.fence() == []
    try:
        client.send("x" * 2000)
        lost = client.connection.wait_for_end()
    except clients.Lost as error:
        lost = error
    assert lost.code == (1009 if transport == "websocket" else None)
    assert other.fence() == []


def test_the_path_may_be_anywhere() -> None:
    with override_settings(ROOT_URLCONF="tests.templatetags.test_socketio_tags"):
        with Site() as site:
            path = "/realtime/%22quoted%22/socket.io/"
            assert site.connect(path=path).fence() == []
            assert site.connect(path=path, transport="polling").fence() == []
            assert clients.request(site.address, target=PATH).status == 404


@pytest.mark.parametrize(
    ("place", "prefix"),
    [("", "/app"), ('realtime/"quoted"/', ""), ("räume/", ""), ("räume/", "/app")],
)
def test_only_the_handshake_passes_django_wherever_the_path_is(place: str, prefix: str) -> None:
    """A proxy that serves the project below a prefix takes the prefix off."""
    requests: list[Any] = []
    note = lambda environ, **kwargs: requests.append(environ["REQUEST_METHOD"])  # noqa: E731
    patterns = [urls.path(place, urls.include("django_socketio.urls"))]
    urlconf = type("urlconf", (), {"urlpatterns": patterns})
    with override_settings(ROOT_URLCONF=urlconf, FORCE_SCRIPT_NAME=prefix or None):
        before = urls.get_script_prefix()
        urls.set_script_prefix(f"{prefix}/")  # as django.setup() does
        try:
            path = urls.reverse("socketio")
            with Site() as site:
                request_started.connect(note)
                client = site.connect(path=path.removeprefix(prefix), transport="polling")
                assert client.fence() == []
        finally:
            request_started.disconnect(note)
            urls.set_script_prefix(before)
    assert path.startswith(f"{prefix}/")
    assert requests == ["GET"]


# Health, as load balancers ask for it


HEALTH = f"{PATH}health"


def test_health(site: Site) -> None:
    wait_until(lambda: Browser().get(HEALTH).status_code == 200)
    answer = clients.request(site.address, target=HEALTH)
    assert answer.status == 200
    state = json.loads(answer.body)
    assert state == {"ok": True, "reason": "", "node": runtime.get_cluster().node}
    assert {"no-store", "private"} <= set((answer.header("Cache-Control") or "").split(", "))
    assert answer.header("Content-Type") == "application/json"


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_health_is_for_reading(site: Site, method: str) -> None:
    wait_until(lambda: Browser().get(HEALTH).status_code == 200)
    answer = clients.request(site.address, method, HEALTH)
    assert answer.status == 200 if method == "HEAD" else answer.status in (403, 405)
    assert b"node" not in answer.body


class WorkingBackend(Carrier):
    """A backend of which a test has hold."""

    def __init__(self) -> None:
        super().__init__(Net())


class FaultyBackend(WorkingBackend):
    """One that is down to begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.net.down = True


def test_health_while_a_worker_starts_and_is_deaf_and_stops() -> None:
    with Site(SOCKETIO_BACKEND=f"{__name__}.FaultyBackend") as site:
        cluster, backend = runtime.get_cluster(), runtime.get_hub().backend
        assert isinstance(backend, FaultyBackend)
        cluster._beat, cluster._silence = 2 * UNIT, 12 * UNIT

        def health() -> tuple[int, str]:
            answer = clients.request(site.address, target=HEALTH)
            assert "no-store" in (answer.header("Cache-Control") or "")
            state = json.loads(answer.body)
            assert state["ok"] is (answer.status == 200)
            return answer.status, state["reason"]

        not_heard = (503, "the backend cannot be heard")
        assert health() == not_heard
        backend.net.down = False
        wait_until(lambda: health() == (200, ""), what="the first echo")
        backend.deaf, backend.refuses = True, 1000
        wait_until(lambda: health() == not_heard, what="its loss")
        backend.refuses = 0
        wait_until(lambda: health() == (200, ""), what="another echo")
        assert backend.starts > 1
        site.dispatcher.engine.stop_accepting()
        assert health() == (503, "stopping")


@pytest.mark.parametrize(
    ("backend", "ok", "reason"),
    [
        ("memory://", False, "no sockets here"),
        (f"{__name__}.FaultyBackend", False, "the backend cannot be reached"),
        (f"{__name__}.WorkingBackend", True, ""),
    ],
)
def test_health_of_a_process_that_serves_no_sockets(backend: str, ok: bool, reason: str) -> None:
    """Nothing of what the backend said comes out: it may name hosts and users."""
    runtime.stop()
    try:
        with override_settings(SOCKETIO_BACKEND=backend):
            answer = Browser().get(HEALTH)
            runtime.stop()
    finally:
        runtime.stop()
    assert answer.status_code == (200 if ok else 503)
    state = answer.json()
    assert state["ok"] is ok and state["reason"].startswith(reason)
    assert set(state) == {"ok", "reason", "node"} and "down" not in state["reason"]
    assert "no-store" in answer["Cache-Control"]
