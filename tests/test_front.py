"""A Django site behind the package's front: what its views return arrives, whatever they return."""

import hashlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from typing import Any

import pytest
from django.contrib.staticfiles.views import serve
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import include, path
from django.views.decorators.csrf import csrf_exempt

from tests import clients
from tests.clients import PATH
from tests.engine.clients import Http, chunked, request
from tests.sites import Site, settings
from tests.support import wait_until

pytestmark = settings(ROOT_URLCONF=__name__)

LAST = {"Connection": "close"}
LARGE = bytes(range(256)) * 20_480  # 5 MB
ENGINE = f"{PATH}?EIO=4&transport=polling"

ends: list[str] = []
"""What the views note at the end of their streams."""


@pytest.fixture(autouse=True)
def forget() -> None:
    ends.clear()


def page(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"page {request.GET.get('number', '')}")


def pieces() -> Iterator[bytes]:
    try:
        yield from (b"one ", b"", b"two ", b"three")
    finally:
        ends.append("pieces")


def endless() -> Iterator[bytes]:
    try:
        while True:
            yield b"x" * 10_000
    finally:
        ends.append("endless")


def broken() -> Iterator[bytes]:
    yield b"one "
    raise ArithmeticError("a secret")


def leaving() -> Iterator[bytes]:
    yield b"one "
    sys.exit("a secret")


def stream(of: Callable[[], Iterator[bytes]]) -> Callable[[HttpRequest], StreamingHttpResponse]:
    return lambda request: StreamingHttpResponse(of())


def large(request: HttpRequest) -> FileResponse:
    return FileResponse(io.BytesIO(LARGE), filename="large.bin")


def fail(request: HttpRequest) -> HttpResponse:
    raise ArithmeticError("a secret")


def leave(request: HttpRequest) -> HttpResponse:
    sys.exit("a secret")


@csrf_exempt
def form(request: HttpRequest) -> HttpResponse:
    return HttpResponse("|".join(f"{key}={value}" for key, value in request.POST.items()))


@csrf_exempt
def upload(request: HttpRequest) -> HttpResponse:
    file = request.FILES["file"]
    return HttpResponse(f"{file.name} {hashlib.sha256(file.read()).hexdigest()}")


urlpatterns: list[Any] = [
    path("", include("django_socketio.urls")),
    path("page/", page),
    path("pieces/", stream(pieces)),
    path("endless/", stream(endless)),
    path("broken/", stream(broken)),
    path("leaving/", stream(leaving)),
    path("large/", large),
    path("fail/", fail),
    path("leave/", leave),
    path("form/", form),
    path("upload/", upload),
    path("static/<path:path>", serve, {"insecure": True}),
]


@pytest.fixture
def connect(site: Site) -> Iterator[Callable[[], Http]]:
    """Return a function that returns a connection to the site."""
    with ExitStack() as stack:

        def connect() -> Http:
            client = Http(("127.0.0.1", site.server.server_port))
            return stack.enter_context(closing(client))

        yield connect


def ask(site: Site, method: str, target: str, **options: Any) -> tuple[int, bytes]:
    """Send a request on a connection of its own, and return the answer's status and body."""
    with closing(HTTPConnection(site.address, timeout=clients.TIMEOUT)) as connection:
        connection.request(method, target, **options)
        with connection.getresponse() as answer:
            return answer.status, answer.read()


def alive(site: Site) -> None:
    """Check that the server serves others."""
    assert ask(site, "GET", "/page/?number=1") == (200, b"page 1")
    assert site.connect().fence() == []


# HEAD


@pytest.mark.parametrize(
    "target", ["/page/", "/pieces/", "/large/", "/static/django_socketio/socketio.js", "/none/"]
)
def test_head_is_the_head_of_a_get_and_no_more(connect: Callable[[], Http], target: str) -> None:
    """RFC 9110, 9.3.2: or the next answer begins in the middle of this one."""
    client = connect().request("HEAD", target).request("GET", "/page/?number=2", headers=LAST)
    head, next_head, body = client.rest().split(b"\r\n\r\n")
    assert next_head.startswith(b"HTTP/1.1 200 ") and body == b"page 2"
    got, _, _ = connect().request("GET", target, headers=LAST).rest().partition(b"\r\n\r\n")
    assert fields(head) == fields(got)


def fields(head: bytes) -> list[bytes]:
    """Return the lines of a head, but for those that differ from answer to answer."""
    lines = head.split(b"\r\n")
    return [line for line in lines if not line.startswith((b"Date:", b"Connection:"))]


def test_head_of_an_endless_stream(site: Site, connect: Callable[[], Http]) -> None:
    client = connect().request("HEAD", "/endless/").request("GET", "/page/", headers=LAST)
    assert client.rest().endswith(b"\r\n\r\npage ")
    assert ends == ["endless"]
    alive(site)


def test_head_of_a_view_that_calls_for_the_end(site: Site, connect: Callable[[], Http]) -> None:
    answer = connect().request("HEAD", "/leave/").rest()
    assert answer.startswith(b"HTTP/1.1 500 ") and answer.endswith(b"\r\n\r\n")
    alive(site)


# What comes in


def test_a_form_arrives_whole(site: Site) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    value = "y" * 500_000
    body = f"name=%C3%BC+x&empty=&long={value}"
    answer = ask(site, "POST", "/form/", body=body, headers=headers)
    assert answer == (200, f"name=ü x|empty=|long={value}".encode())


def test_forms_on_one_connection(connect: Callable[[], Http]) -> None:
    client = connect()
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    for number in range(5):
        assert client.post("/form/", b"n=%d" % number, headers).body == b"n=%d" % number


def test_an_upload_arrives_whole(site: Site) -> None:
    content = LARGE[:1_000_000]
    body = (
        b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" + content + b"\r\n--edge--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    answer = ask(site, "POST", "/upload/", body=body, headers=headers)
    assert answer == (200, f"a.bin {hashlib.sha256(content).hexdigest()}".encode())


def test_a_view_takes_no_chunks(connect: Callable[[], Http]) -> None:
    """Django reads by Content-Length, and would take the body for empty."""
    head = request("POST", "/form/", headers={"Transfer-Encoding": "chunked"})
    client = connect().send(head + chunked(b"GET /page/ HTTP/1.1\r\n\r\n"))
    client.send(request("GET", "/nowhere/"))
    assert [client.answer().status for _ in range(2)] == [411, 404]


def test_the_engine_takes_chunks(site: Site, connect: Callable[[], Http]) -> None:
    client = site.connect(transport="polling")
    target = f"{ENGINE}&sid={client.connection.sid}"
    head = request("POST", target, headers={"Transfer-Encoding": "chunked"})
    packet = clients.encode(clients.EVENT, "/", 7, ["fence"])[0].encode()
    answer = connect().send(head + chunked(packet[:3], packet[3:])).answer()
    assert (answer.status, answer.body) == (200, b"ok")
    assert client.acked(7) == []


# What goes out


def test_a_stream_is_sent_in_chunks(connect: Callable[[], Http]) -> None:
    client = connect().request("GET", "/pieces/").request("GET", "/page/", headers=LAST)
    head, body, rest = client.rest().partition(b"HTTP/1.1 200 OK\r\n")[2].split(b"\r\n\r\n", 2)
    assert b"Transfer-Encoding: chunked" in head and b"Content-Length" not in head
    assert body == b"4\r\none \r\n4\r\ntwo \r\n5\r\nthree\r\n0"
    assert rest.endswith(b"page ")
    assert ends == ["pieces"]


def test_a_large_file_arrives_whole(site: Site) -> None:
    status, body = ask(site, "GET", "/large/")
    assert status == 200
    assert hashlib.sha256(body).digest() == hashlib.sha256(LARGE).digest()


def test_a_static_file_arrives_whole(site: Site) -> None:
    status, body = ask(site, "GET", "/static/django_socketio/socket.io.min.js")
    assert status == 200
    assert body.rstrip().endswith(b"//# sourceMappingURL=socket.io.min.js.map")


def test_a_stream_in_http_1_0_ends_with_its_connection(connect: Callable[[], Http]) -> None:
    data = request("GET", "/pieces/", headers={"Connection": "keep-alive"})
    client = connect().send(data.replace(b"HTTP/1.1", b"HTTP/1.0") + request("GET", "/page/"))
    head, _, body = client.rest().partition(b"\r\n\r\n")
    assert b"Connection: close" in head and b"keep-alive" not in head
    assert b"chunked" not in head
    assert body == b"one two three"


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_goes_in_mid_stream_harms_nobody(
    site: Site, connect: Callable[[], Http], how: str
) -> None:
    client = connect().request("GET", "/endless/")
    assert client.receive()
    assert not ends
    getattr(client, how)()
    wait_until(lambda: ends == ["endless"], what="the end of the generator")
    alive(site)


def test_the_answer_to_options_has_no_length(connect: Callable[[], Http]) -> None:
    """RFC 9110, 8.6: not in a 204."""
    client = connect().request("OPTIONS", ENGINE)
    answer = client.answer()
    assert (answer.status, answer.body) == (204, b"")
    assert not {"content-length", "transfer-encoding"} & answer.headers.keys()
    assert client.get("/page/?number=3").body == b"page 3"


# Views that fail


def test_a_view_that_raises_is_a_500_without_a_word_about_it(
    connect: Callable[[], Http], caplog: pytest.LogCaptureFixture
) -> None:
    client = connect()
    answer = client.get("/fail/")
    assert answer.status == 500
    assert not any(word in answer.body for word in (b"secret", b"Traceback", b"Arithmetic"))
    assert client.get("/page/?number=4").body == b"page 4"
    assert "a secret" in caplog.text


def test_a_view_that_calls_for_the_end_ends_nothing(
    site: Site, connect: Callable[[], Http], caplog: pytest.LogCaptureFixture
) -> None:
    client = connect()
    answer = client.get("/leave/")
    assert (answer.status, answer.headers["connection"]) == (500, "close")
    assert b"secret" not in answer.body
    assert client.gone()
    alive(site)
    (record,) = [r for r in caplog.records if r.name == "django_socketio.engine.pywsgi"]
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None and record.exc_info[0] is SystemExit


@pytest.mark.parametrize(("target", "errors"), [("/broken/", [ArithmeticError]), ("/leaving/", [])])
def test_a_stream_that_fails_is_seen_to_be_cut(
    site: Site,
    connect: Callable[[], Http],
    target: str,
    errors: list[type],
    greenlet_errors: list[BaseException],
) -> None:
    """Without the last chunk, and never with an error in the middle of what was begun."""
    client = connect().request("GET", target).request("GET", "/page/")
    assert client.rest().endswith(b"\r\n\r\n4\r\none \r\n")
    alive(site)
    assert [type(error) for error in greenlet_errors] == errors
    greenlet_errors.clear()
