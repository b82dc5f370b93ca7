"""Request heads: what could be read in two ways is refused, and the rest is a WSGI environ."""

import string

import pytest
from hypothesis import example, given, strategies as st

from django_socketio.engine import head
from django_socketio.engine.head import BadRequest, Head


def parse(*headers: bytes, line: bytes = b"POST /a HTTP/1.1", host: bool = True) -> Head:
    """Parse a head with these header lines, and a Host unless told otherwise."""
    return head.parse(b"\r\n".join([line, *[b"Host: example.org"] * host, *headers]))


def refused(*headers: bytes, line: bytes = b"POST /a HTTP/1.1", host: bool = True) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(*headers, line=line, host=host)
    assert caught.value.status == 400
    assert str(caught.value)  # what the log says


# Where a body ends (RFC 9112, 6): each was read by pywsgi in a way of its own


@pytest.mark.parametrize(
    "headers",
    [
        [b"Transfer-Encoding: gzip, chunked", b"Content-Length: 4"],
        [b"Transfer-Encoding: chunked", b"Content-Length: 4"],
        [b"Content-Length: 4", b"Transfer-Encoding: chunked"],
        [b"Content-Length: 0", b"Transfer-Encoding: chunked"],
        [b"Content-Length: 5", b"Content-Length: 30"],
        [b"Content-Length: 5", b"Content-Length: 5"],
        [b"Content-Length: 5", b"content-length: 5"],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"],
        [b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"],
        [b"Transfer-Encoding: identity"],
        [b"Transfer-Encoding: gzip"],
        [b"Transfer-Encoding: gzip, chunked"],
        [b"Transfer-Encoding: chunked, chunked"],
        [b"Transfer-Encoding: chunked, identity"],
        [b"Transfer-Encoding: xchunked"],
        [b"Transfer-Encoding: chunked;q=1"],
        [b'Transfer-Encoding: "chunked"'],
        [b"Transfer-Encoding:"],
        [b"Transfer-Encoding: \x0bchunked"],
    ],
)
def test_an_ambiguous_body(headers: list[bytes]) -> None:
    refused(*headers)
    refused(*headers, line=b"GET /a HTTP/1.1")


def test_http_1_0_has_no_chunks() -> None:
    """RFC 9112, 6.1: one who says so does not know what it says."""
    refused(b"Transfer-Encoding: chunked", line=b"POST /a HTTP/1.0")


@pytest.mark.parametrize(
    "length",
    [b"1_0", b"+5", b"-5", b"-0", b"5 5", b"5,5", b"5, 5", b"5;", b"0x5", b"5.0", b"5e0", b"five"]
    + [b"", b"\xb2", b"\xd9\xa3", b"5\xa0", b"9" * 16, b"9" * 5000],
)
def test_a_malformed_content_length(length: bytes) -> None:
    """It is digits and no more: what int() takes is not the measure."""
    refused(b"Content-Length: " + length)
    refused(b"Content-Length:" + length)


@pytest.mark.parametrize(
    ("headers", "length", "chunked"),
    [
        ([], None, False),
        ([b"Content-Length: 0"], 0, False),
        ([b"Content-Length: 5"], 5, False),
        ([b"content-length:\t 0005 \t"], 5, False),
        ([b"Content-Length: 999999999999999"], 10**15 - 1, False),
        ([b"Transfer-Encoding: chunked"], None, True),
        ([b"transfer-encoding:CHUNKED"], None, True),
    ],
)
def test_a_body(headers: list[bytes], length: int | None, chunked: bool) -> None:
    request = parse(*headers)
    assert (request.content_length, request.chunked) == (length, chunked)


# Header lines (RFC 9112, 5)


@pytest.mark.parametrize(
    "line",
    [
        b"Content-Length : 5",
        b"Content-Length\t: 5",
        b"X : y",
        b" X: y",
        b"\tX: y",
        b"X y",
        b"X",
        b": y",
        b"",
        b"X\x00: y",
        b"X\xe9: y",
        b"X(y): z",
        b"X Y: z",
        b'"X": y',
    ],
)
def test_a_malformed_header(line: bytes) -> None:
    """5.1: "No whitespace is allowed between the field name and colon"; and no line without one."""
    refused(line)
    refused(b"Accept: */*", line, b"Content-Length: 5")


@pytest.mark.parametrize("fold", [b" ", b"\t", b"  \t "])
def test_a_folded_line(fold: bytes) -> None:
    """5.2: it put a line break into the environ, and from there into logs and answers."""
    refused(b"X: y", fold + b"z")
    refused(b"X: y", fold + b"Transfer-Encoding: chunked")
    refused(fold + b"X: y")


CONTROLS = [*range(9), *range(10, 32), 0x7F, 0x85]


@pytest.mark.parametrize("control", CONTROLS, ids=hex)
def test_a_control_character(control: int) -> None:
    """
    A bare CR made a new header, and so did others with str.splitlines() (CVE-2026-44546).

    NUL ends a string elsewhere.
    """
    byte = bytes([control])
    refused(b"X: a" + byte + b"Y: b")
    refused(b"X:" + byte)
    refused(b"X: a" + byte)
    refused(b"X: " + byte + b"a")
    refused(b"X" + byte + b": a")


def test_every_line_break_that_python_knows_is_refused() -> None:
    breaks = [byte for byte in range(256) if len(f"a{chr(byte)}b".splitlines()) > 1]
    assert breaks and set(breaks) <= set(CONTROLS)


def test_other_bytes_are_a_value() -> None:
    value = bytes(byte for byte in range(256) if byte not in CONTROLS)
    request = parse(b"X: a" + value + b"b")
    assert request.environ["HTTP_X"] == ("a" + value.decode("latin-1") + "b")


@pytest.mark.parametrize(
    "data",
    [
        b"GET /a HTTP/1.1\nHost: example.org",
        b"GET /a HTTP/1.1\r\nHost: example.org\nX: y",
        b"GET /a HTTP/1.1\r\nHost: example.org\n\nGET /b HTTP/1.1",
        b"GET /a HTTP/1.1\rHost: example.org",
        b"GET /a HTTP/1.1\r\nHost: example.org\r",
        b"\nGET /a HTTP/1.1\r\nHost: example.org",
    ],
)
def test_a_bare_line_end(data: bytes) -> None:
    """2.2: a recipient may take LF alone for the end of a line, and so two may disagree."""
    with pytest.raises(BadRequest):
        head.parse(data)


@pytest.mark.parametrize("count", [101, 3000])
def test_too_many_headers(count: int) -> None:
    """Host is one of them; CVE-2024-37890 took 3,000 to crash `ws`."""
    refused(*[b"X: y"] * (count - 1))


def test_as_many_headers_as_there_may_be() -> None:
    assert parse(*[b"X: y"] * 99).environ["HTTP_X"] == ",".join("y" * 99)


@pytest.mark.parametrize("name", [b"X_Auth", b"Content_Length", b"_", b"Host_", b"X-Auth_Token"])
def test_an_underscore_is_no_dash(name: bytes) -> None:
    """CVE-2015-0219: in an environ `X_Auth` would pass for `X-Auth`, so it is dropped."""
    assert parse(name + b": forged", b"X-Auth: real").environ == parse(b"X-Auth: real").environ


@pytest.mark.parametrize("name", [b"Host", b"Content-Type", b"content-type", b"Content-Length"])
def test_what_may_stand_once_only(name: bytes) -> None:
    refused(name + b": 5", name.title() + b": 5")


@pytest.mark.parametrize(
    ("lines", "key", "value"),
    [
        ([b"X-Forwarded-For: a", b"x-forwarded-for: b"], "HTTP_X_FORWARDED_FOR", "a,b"),
        # Two Origins make one that nobody allows.
        ([b"Origin: http://a", b"Origin: http://b"], "HTTP_ORIGIN", "http://a,http://b"),
        # RFC 9113, 8.2.3: "concatenated into a single octet string using [...] ; "
        ([b"Cookie: a=1", b"cookie: b=2; c=3"], "HTTP_COOKIE", "a=1; b=2; c=3"),
        ([b"X:y"], "HTTP_X", "y"),
        ([b"X: \t y z\t "], "HTTP_X", "y z"),
        ([b"X:"], "HTTP_X", ""),
        ([b"X:  \t"], "HTTP_X", ""),
        ([b"X: a:b: c"], "HTTP_X", "a:b: c"),
        ([b"X: \xe9"], "HTTP_X", "é"),
        ([b"Content-Type: text/plain"], "CONTENT_TYPE", "text/plain"),
        ([b"Content-Length: 5"], "CONTENT_LENGTH", "5"),
        ([b"Sec-WebSocket-Key: k"], "HTTP_SEC_WEBSOCKET_KEY", "k"),
        ([b"!#$%&'*+-.^`|~09azAZ: y"], "HTTP_!#$%&'*+_.^`|~09AZAZ", "y"),
    ],
)
def test_headers_in_the_environ(lines: list[bytes], key: str, value: str) -> None:
    assert parse(*lines).environ[key] == value


@pytest.mark.parametrize("name", [b"Request-Method", b"Path-Info", b"Query-String", b"REMOTE-ADDR"])
def test_a_header_is_never_another_key_of_the_environ(name: bytes) -> None:
    plain, forged = parse().environ, parse(name + b": forged").environ
    added = f"HTTP_{name.decode().upper().replace('-', '_')}"
    assert forged == {**plain, added: "forged"}


@pytest.mark.parametrize("fill", [b" ", b"\t", b",", b'"', b", ", b"a ", b"\xa0"])
@pytest.mark.parametrize("end", [b"\x00", b"", b"x"])
def test_a_head_full_of_white_space(fill: bytes, end: bytes) -> None:
    """CVE-2021-32640's kind: an expression that tries all divisions of a run would take hours."""
    line = b"X: a" + fill * (head.MAX_HEAD // len(fill)) + end
    if end == b"\x00":
        refused(line)
        refused(b"X:" + line[4:])
    else:
        expected = line[3:].strip(b" \t").decode("latin-1")
        assert parse(line).environ["HTTP_X"] == expected


# Request lines (RFC 9112, 3)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET",
        b"GET /a",  # HTTP/0.9
        b"GET /a ",
        b"GET  /a HTTP/1.1",
        b"GET /a  HTTP/1.1",
        b"GET /a HTTP/1.1 ",
        b" GET /a HTTP/1.1",
        b"GET\t/a\tHTTP/1.1",
        b"GET /a b HTTP/1.1",
        b"GET /a\x00 HTTP/1.1",
        b"GET /\xe9 HTTP/1.1",
        b"GET /\x7f HTTP/1.1",
        b"GET /a HTTP/1.1\x00",
        b"GET /a http/1.1",
        b"GET /a HTTP/1.2",
        b"GET /a HTTP/1.10",
        b"GET /a HTTP/2.0",
        b"GET /a HTTP/0.9",
        b"GET /a HTTPS/1.1",
        b"GET /a HTTP/1",
        b"G\x00T /a HTTP/1.1",
        b"G(T /a HTTP/1.1",
        b"PRI * HTTP/2.0",
    ],
)
def test_a_malformed_request_line(line: bytes) -> None:
    refused(line=line)


@pytest.mark.parametrize(
    "target",
    [
        b"a",
        b"?a",
        b"a:80",
        b"example.org:443",
        b"ftp://example.org/a",
        b"ws://example.org/a",
        b"http:/a",
        b"http://",
        b"http:///a",
        b"http://?a",
        b"http://example.org?a",
        b"http://example.org#a",
        b"http://example.org/a#b",
        b"/a#b",
        b"/#",
        b"#",
        b"*",
        b"*a",
        b"javascript:alert(1)",
    ],
)
def test_a_malformed_target(target: bytes) -> None:
    """3.2: a path, an http address, or the asterisk of OPTIONS; and never with a fragment."""
    refused(line=b"GET " + target + b" HTTP/1.1")


def test_the_asterisk_of_options() -> None:
    """3.2.4."""
    assert parse(line=b"OPTIONS * HTTP/1.1").environ["PATH_INFO"] == "*"


@pytest.mark.parametrize(
    ("target", "host", "path", "query"),
    [
        (b"http://other.org/a?b", "other.org", "/a", "b"),
        (b"https://other.org:81/", "other.org:81", "/", ""),
        (b"HTTP://other.org", "other.org", "/", ""),
        (b"http://[::1]:80/a", "[::1]:80", "/a", ""),
        (b"http://other.org//a", "other.org", "//a", ""),
        (b"/http://other.org/", "example.org", "/http://other.org/", ""),
    ],
)
def test_an_absolute_target(target: bytes, host: str, path: str, query: str) -> None:
    """3.2.2: "a server MUST accept the absolute-form", and its host counts, not the header's."""
    environ = parse(line=b"GET " + target + b" HTTP/1.1").environ
    assert (environ["HTTP_HOST"], environ["PATH_INFO"], environ["QUERY_STRING"]) == (
        host,
        path,
        query,
    )


@pytest.mark.parametrize("target", [b"/a", b"http://other.org/a"])
def test_http_1_1_names_its_host(target: bytes) -> None:
    """3.2: "MUST respond with a 400 [...] to any HTTP/1.1 request message that lacks" it."""
    refused(line=b"GET " + target + b" HTTP/1.1", host=False)
    refused(b"Host : a", line=b"GET " + target + b" HTTP/1.1", host=False)
    assert parse(line=b"GET " + target + b" HTTP/1.0", host=False).version == "HTTP/1.0"


def test_http_1_0_may_have_no_host() -> None:
    assert "HTTP_HOST" not in parse(line=b"GET /a HTTP/1.0", host=False).environ


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/", "/", ""),
        (b"//", "//", ""),
        (b"/a/b?c=d&e", "/a/b", "c=d&e"),
        (b"/a??b?", "/a", "?b?"),
        (b"/a%20b", "/a b", ""),
        (b"/%C3%A9", "/\xc3\xa9", ""),  # WSGI's bytes as latin-1
        (b"/%e9", "/\xe9", ""),
        (b"/%2F%3F%23", "//?#", ""),
        (b"/%00%0d%0a", "/\x00\r\n", ""),
        (b"/a%", "/a%", ""),
        (b"/%zz%4", "/%zz%4", ""),
        (b"/%2541", "/%41", ""),  # once only
        (b"/a+b", "/a+b", ""),
        (b"/?a=%41%zz+b", "/", "a=%41%zz+b"),  # a query is left to its readers
    ],
)
def test_paths_are_percent_decoded(target: bytes, path: str, query: str) -> None:
    request = parse(line=b"GET " + target + b" HTTP/1.1")
    assert request.environ["PATH_INFO"] == path
    assert request.environ["QUERY_STRING"] == query
    assert request.target == target.decode()


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "get", "X!#$%&'*+-.^_`|~9"])
def test_any_token_is_a_method(method: str) -> None:
    """9110, 9.1: it is case-sensitive, and whether it is known is not for the parser to say."""
    request = parse(line=f"{method} /a HTTP/1.1".encode())
    assert request.method == request.environ["REQUEST_METHOD"] == method


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
def test_the_whole_environ(version: str) -> None:
    request = parse(line=f"GET /a?b {version}".encode())
    assert request.environ == {
        "HTTP_HOST": "example.org",
        "PATH_INFO": "/a",
        "QUERY_STRING": "b",
        "REQUEST_METHOD": "GET",
        "SERVER_PROTOCOL": version,
    }
    assert request.version == version


# Whether the connection stays (RFC 9112, 9.3)


@pytest.mark.parametrize(
    ("version", "headers", "stays"),
    [
        (b"1.1", [], True),
        (b"1.1", [b"Connection: close"], False),
        (b"1.1", [b"Connection: Close"], False),
        (b"1.1", [b"Connection: keep-alive"], True),
        (b"1.1", [b"Connection: keep-alive, close"], False),
        (b"1.1", [b"Connection: keep-alive", b"Connection: close"], False),
        (b"1.1", [b"Connection: Upgrade"], True),
        (b"1.1", [b"Connection:"], True),
        (b"1.0", [], False),
        (b"1.0", [b"Connection: keep-alive"], True),
        (b"1.0", [b"Connection: Keep-Alive"], True),
        (b"1.0", [b"Connection: close"], False),
        (b"1.0", [b"Connection: keep-alive, close"], False),
    ],
)
def test_keep_alive(version: bytes, headers: list[bytes], stays: bool) -> None:
    assert parse(*headers, line=b"GET /a HTTP/" + version).keep_alive is stays


# Properties

_tokens = st.text(string.ascii_letters + string.digits + "!#$%&'*+-.^`|~", min_size=1)
_values = st.text(st.characters(codec="latin-1", exclude_characters="".join(map(chr, CONTROLS))))
_pieces = st.sampled_from(
    [b"GET", b" ", b"/", b"/a?b", b"http://a", b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\r", b"\n"]
    + [b"Host", b": ", b":", b"a", b"Content-Length", b"5", b"Transfer-Encoding", b"chunked"]
    + [b"\x00", b"\xe9", b"%", b"_", b"\t", b"#", b"*", b"GET / HTTP/1.1\r\nHost: a\r\n"]
)


@given(st.binary() | st.lists(_pieces, max_size=12).map(b"".join))
@example(b"")
@example(b"GET / HTTP/1.1\r\nHost: a\r\n")
def test_any_bytes_are_a_head_or_a_bad_request(data: bytes) -> None:
    try:
        request = head.parse(data)
    except BadRequest as error:
        assert error.status == 400
        return
    # What passed is one reading: nothing in it can start a line elsewhere.
    for key, value in request.environ.items():
        if key != "PATH_INFO":
            assert len(f"{value}.".splitlines()) == 1
    assert not (request.chunked and request.content_length is not None)
    assert request.version == "HTTP/1.0" or "HTTP_HOST" in request.environ


@given(st.dictionaries(_tokens.map(str.lower), _values, max_size=10))
def test_headers_round_trip(headers: dict[str, str]) -> None:
    special = {"host", "content-length", "content-type", "transfer-encoding"}
    headers = {name: value for name, value in headers.items() if name not in special}
    lines = [f"{name}: {value}".encode("latin-1") for name, value in headers.items()]
    environ = parse(*lines).environ
    for name, value in headers.items():
        assert environ[f"HTTP_{name.upper().replace('-', '_')}"] == value.strip(" \t")


@given(st.binary())
def test_every_path_can_be_percent_encoded(path: bytes) -> None:
    encoded = "".join(f"%{byte:02x}" for byte in path)
    environ = parse(line=f"GET /{encoded} HTTP/1.1".encode()).environ
    assert environ["PATH_INFO"].encode("latin-1") == b"/" + path
