"""Which pages may talk to the server: every kind of Origin, on every kind of request."""

from collections.abc import Iterator
from typing import Any

import pytest
from django.core.exceptions import DisallowedHost
from django.test import override_settings

from django_socketio.engine import Frame, Refused
from django_socketio.origins import allow
from tests import clients
from tests.clients import UPGRADE, HandshakeFailed
from tests.sites import Site, settings
from tests.test_gunicorn import GunicornSite

HOST = "example.com"
HOSTS = {"ALLOWED_HOSTS": [HOST, ".example.com", "xn--bcher-kva.example", "[::1]", "proxy.test"]}
LISTED = {
    "SOCKETIO_ALLOWED_ORIGINS": [
        "https://shop.test",
        "http://dev.test:3000",
        "https://*.apps.test",
        "http://*.lab.test:8080",
        "http://[2001:db8::1]:8000",
        "https://xn--bcher-kva.test",
        "HTTPS://Upper.test",
    ]
}


def ask(origin: str | None, host: str = HOST, scheme: str = "http", **environ: str) -> Any:
    """
    Return what is decided about an origin: its CORS headers, or None for a refusal. Raise
    `DisallowedHost` if the host was refused rather than the origin.
    """
    environ = {
        "REQUEST_METHOD": "GET",
        "wsgi.url_scheme": scheme,
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "HTTP_HOST": host,
        **environ,
    }
    if origin is not None:
        environ["HTTP_ORIGIN"] = origin
    try:
        return dict(allow(environ))
    except Refused as refused:
        if refused.status == 400:
            raise DisallowedHost(refused.hint) from None
        assert refused.status == 403
        return None


def cors(origin: str) -> dict[str, str]:
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Credentials": "true",
        "Vary": "Origin",
    }


# What no browser sends for a page of ours, whatever the settings are
NEVER = [
    "",
    " ",
    "null",
    "*",
    "example.com",
    "//example.com",
    "file://",
    "file:///etc/passwd",
    "data:text/html,x",
    "ftp://example.com",
    "ws://example.com",
    "chrome-extension://abcdef",
    "http://",
    "http:///",
    "http://example.com/",
    "http://example.com/path",
    "http://example.com?x",
    "http://example.com#x",
    "http://user@example.com",
    "http://user:password@example.com",
    "http://example.com@evil.test",
    "http://example.com,http://example.com",
    "http://example.com, http://evil.test",
    "http://example.com http://evil.test",
    "http://exam\tple.com",
    "http://example.com\x00",
    "http://example.com:port",
    "http://example.com:99999",
    "http://example.com:0",
    "http://[::1",
    "http://b\xfccher.example",
    "http://example.com:",
    "http://example.com:+80",
    "http://example.com%2eevil.test",
    "http://\u017fhop.test",
    "http://" + "x" * 8192,
    "http://example.com" + "," * 8192,
]
FOREIGN = [
    "http://evil.test",
    "https://example.com",
    "http://example.com:8000",
    "http://www.example.com",
    "http://example.com.evil.test",
    "http://evilexample.com",
    "http://evil.test:80",
    "http://example.com.",
    "http://example.co",
    "http://xn--bcher-kva.example",
    "http://127.0.0.1",
    "http://[::1]",
]


class TestByDefault:
    @pytest.fixture(autouse=True)
    def configured(self) -> Iterator[None]:
        with override_settings(**HOSTS):
            yield

    def test_no_origin_is_no_page(self) -> None:
        assert ask(None) == {}

    @pytest.mark.parametrize(
        ("origin", "host", "scheme"),
        [
            ("http://example.com", "example.com", "http"),
            ("https://example.com", "example.com", "https"),
            ("http://example.com:80", "example.com", "http"),
            ("http://example.com", "example.com:80", "http"),
            ("https://example.com", "example.com:443", "https"),
            ("https://example.com:443", "example.com", "https"),
            ("http://example.com:8000", "example.com:8000", "http"),
            ("HTTP://EXAMPLE.com", "example.com", "http"),
            ("http://example.com", "EXAMPLE.COM", "http"),
            ("http://www.example.com", "www.example.com", "http"),
            ("http://[::1]:8000", "[::1]:8000", "http"),
            ("http://[::1]", "[::1]", "http"),
            ("http://xn--bcher-kva.example", "xn--bcher-kva.example", "http"),
        ],
    )
    def test_its_own_origin_is_allowed(self, origin: str, host: str, scheme: str) -> None:
        assert ask(origin, host, scheme) == {}  # a browser needs no header for that

    @pytest.mark.parametrize("origin", NEVER + FOREIGN, ids=lambda origin: origin[:40])
    def test_everybody_else_is_refused(self, origin: str) -> None:
        assert ask(origin) is None

    def test_a_port_of_its_own_is_another_origin(self) -> None:
        assert ask("http://example.com", "example.com:8000") is None
        assert ask("https://example.com", "example.com:80", "http") is None

    def test_the_trusted_origins_of_django_are_trusted(self) -> None:
        trusted = ["https://shop.test", "https://*.apps.test"]
        with override_settings(CSRF_TRUSTED_ORIGINS=trusted):
            for origin in ("https://shop.test", "https://a.apps.test", "https://a.b.apps.test"):
                assert ask(origin) == cors(origin)
            for origin in ("http://shop.test", "https://apps.test", "https://evilapps.test"):
                assert ask(origin) is None
            with override_settings(SOCKETIO_ALLOWED_ORIGINS=["https://other.test"]):
                assert ask("https://shop.test") is None
                assert ask("https://other.test") == cors("https://other.test")

    def test_a_host_that_is_not_allowed_is_refused(self, caplog: pytest.LogCaptureFixture) -> None:
        for origin in (None, "http://evil.test"):
            with pytest.raises(DisallowedHost):
                ask(origin, host="evil.test")
        assert "evil.test" in caplog.text and "ALLOWED_HOSTS" in caplog.text


class TestWithAList:
    @pytest.fixture(autouse=True)
    def configured(self) -> Iterator[None]:
        with override_settings(**HOSTS, **LISTED):
            yield

    @pytest.mark.parametrize(
        "origin",
        [
            "https://shop.test",
            "https://shop.test:443",
            "https://SHOP.test",
            "http://dev.test:3000",
            "https://a.apps.test",
            "https://a.b.apps.test",
            "http://a.lab.test:8080",
            "http://[2001:db8::1]:8000",
            "https://xn--bcher-kva.test",
            "https://upper.test",
        ],
    )
    def test_what_it_has_is_allowed(self, origin: str) -> None:
        assert ask(origin) == cors(origin)

    @pytest.mark.parametrize(
        "origin",
        [
            "http://shop.test",
            "https://shop.test:8443",
            "https://shop.test.",
            "https://shop.test.evil.test",
            "https://evilshop.test",
            "https://sub.shop.test",
            "https://user@shop.test",
            "http://dev.test",
            "https://apps.test",
            "http://a.apps.test",
            "https://a.apps.test:8443",
            "https://evilapps.test",
            "https://a.apps.test.evil.test",
            "http://a.lab.test",
            "http://[2001:db8::1]",
            "https://b\xfccher.test",
            *NEVER,
            *FOREIGN,
        ],
        ids=lambda origin: origin[:40],
    )
    def test_all_else_is_refused(self, origin: str) -> None:
        assert ask(origin) is None

    def test_its_own_origin_needs_no_place_in_it(self) -> None:
        assert ask("http://example.com") == ask(None) == {}


@pytest.mark.parametrize("star", ["*", ["*"], ["https://shop.test", "*"]], ids=repr)
class TestWithAStar:
    @pytest.mark.parametrize("origin", FOREIGN)
    def test_every_page_is_allowed_but_not_as_its_user(self, star: Any, origin: str) -> None:
        with override_settings(**HOSTS, SOCKETIO_ALLOWED_ORIGINS=star):
            assert ask(origin) == {"Access-Control-Allow-Origin": "*"}

    @pytest.mark.parametrize("origin", NEVER, ids=lambda origin: origin[:40])
    def test_what_is_no_page_is_not(self, star: Any, origin: str) -> None:
        with override_settings(**HOSTS, SOCKETIO_ALLOWED_ORIGINS=star):
            assert ask(origin) is None


class TestBehindAProxy:
    TLS = ("HTTP_X_FORWARDED_PROTO", "https")

    @override_settings(**HOSTS, SECURE_PROXY_SSL_HEADER=TLS)
    def test_the_scheme_is_what_the_setting_trusts(self) -> None:
        forwarded = {"HTTP_X_FORWARDED_PROTO": "https"}
        assert ask("https://example.com", **forwarded) == {}
        assert ask("http://example.com", **forwarded) is None
        assert ask("https://example.com") is None
        assert ask("https://example.com", HTTP_X_FORWARDED_PROTO="http") is None

    @override_settings(**HOSTS)
    def test_the_log_names_the_setting_that_is_missing(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert ask("https://example.com", HTTP_X_FORWARDED_PROTO="https") is None
        assert "SECURE_PROXY_SSL_HEADER" in caplog.text
        caplog.clear()
        assert ask("https://evil.test") is None
        assert "SECURE_PROXY_SSL_HEADER" not in caplog.text

    @override_settings(**HOSTS)
    def test_without_the_setting_a_client_may_say_what_it_wants(self) -> None:
        assert ask("https://example.com", HTTP_X_FORWARDED_PROTO="https") is None
        assert ask("http://proxy.test", HTTP_X_FORWARDED_HOST="proxy.test") is None
        assert ask("http://example.com:8000", HTTP_X_FORWARDED_PORT="8000") is None

    @override_settings(**HOSTS, USE_X_FORWARDED_HOST=True, USE_X_FORWARDED_PORT=True)
    def test_the_host_is_what_the_setting_trusts(self) -> None:
        assert ask("http://proxy.test", HTTP_X_FORWARDED_HOST="proxy.test") == {}
        assert ask("http://example.com", HTTP_X_FORWARDED_HOST="proxy.test") is None
        assert ask("http://example.com") == {}
        with pytest.raises(DisallowedHost):
            ask("http://evil.test", HTTP_X_FORWARDED_HOST="evil.test")

    @override_settings(**HOSTS)
    def test_a_change_of_the_settings_is_noticed(self) -> None:
        forwarded = {"HTTP_X_FORWARDED_PROTO": "https"}
        assert ask("https://example.com", **forwarded) is None
        with override_settings(SECURE_PROXY_SSL_HEADER=self.TLS):
            assert ask("https://example.com", **forwarded) == {}
        assert ask("https://example.com", **forwarded) is None


class TestWithACallable:
    def test_it_decides_about_all_but_our_own(self) -> None:
        asked = []

        def decide(origin: str, environ: dict[str, Any]) -> bool:
            asked.append((origin, environ["HTTP_HOST"]))
            return origin in ("https://shop.test", "capacitor://localhost", "null")

        with override_settings(**HOSTS, SOCKETIO_ALLOWED_ORIGINS=decide):
            assert ask(None) == ask("http://example.com") == {}
            assert asked == []
            for origin in ("https://shop.test", "capacitor://localhost", "null"):
                assert ask(origin) == cors(origin)
            assert ask("https://evil.test") is None
        assert asked[0] == ("https://shop.test", "example.com")
        assert asked[-1] == ("https://evil.test", "example.com")

    @pytest.mark.parametrize("origin", ["null", "file://", *FOREIGN, *NEVER], ids=lambda o: o[:40])
    def test_it_is_asked_about_one_origin_at_a_time_and_what_looks_like_one(
        self, origin: str
    ) -> None:
        asked: list[str] = []

        def decide(origin: str, environ: dict[str, Any]) -> bool:
            asked.append(origin)
            return False

        with override_settings(**HOSTS, SOCKETIO_ALLOWED_ORIGINS=decide):
            assert ask(origin) is None
        for seen in asked:
            assert not set(seen) & set(" ,@?#%\t\x00\\") and len(seen) < 400
            assert seen == "null" or "/" not in seen.partition("://")[2]

    def test_it_may_be_named_by_its_path(self) -> None:
        with override_settings(**HOSTS, SOCKETIO_ALLOWED_ORIGINS=f"{__name__}.is_a_shop"):
            assert ask("https://a.shop.test") == cors("https://a.shop.test")
            assert ask("https://evil.test") is None

    def test_if_it_fails_that_is_a_no(self, caplog: pytest.LogCaptureFixture) -> None:
        def decide(origin: str, environ: dict[str, Any]) -> bool:
            raise ValueError("a bug")

        with override_settings(**HOSTS, SOCKETIO_ALLOWED_ORIGINS=decide):
            assert ask("https://shop.test") is None
        assert "a bug" in caplog.text
        assert "'https://shop.test' refused: it is not http://example.com, nor" in caplog.text
        assert "SOCKETIO_ALLOWED_ORIGINS" in caplog.text


def is_a_shop(origin: str, environ: dict[str, Any]) -> bool:
    return origin.endswith(".shop.test")


class TestWithoutAnOrigin:
    """No Origin: a native client, our own page's GET, or what the browser says of the page."""

    @pytest.fixture(autouse=True, params=[None, ["https://shop.test"], "*", is_a_shop], ids=str)
    def configured(self, request: pytest.FixtureRequest) -> Iterator[None]:
        with override_settings(**HOSTS, SOCKETIO_ALLOWED_ORIGINS=request.param):
            yield

    @pytest.mark.parametrize("cookie", ["", "sessionid=abc"], ids=["stranger", "user"])
    @pytest.mark.parametrize("site", [None, "same-origin", "none", ""])
    def test_a_native_client_and_our_own_page(self, site: str | None, cookie: str) -> None:
        said = {} if site is None else {"HTTP_SEC_FETCH_SITE": site}
        assert ask(None, HTTP_COOKIE=cookie, **said) == {}

    @pytest.mark.parametrize("site", ["cross-site", "same-site"])
    def test_the_image_or_script_of_another_page(
        self, site: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert ask(None, HTTP_SEC_FETCH_SITE=site) is None
        for part in ("without Origin", site, "http://example.com", "SOCKETIO_ALLOWED_ORIGINS"):
            assert part in caplog.text

    @pytest.mark.parametrize("site", ["cross-site", "same-site"])
    def test_with_an_origin_that_alone_decides(self, site: str) -> None:
        assert ask("http://example.com", HTTP_SEC_FETCH_SITE=site) == {}


# Every request of every transport

EVIL = ("Origin", "http://evil.test")
SHOP = ("Origin", "https://shop.test")
KINDS = ("polling handshake", "websocket handshake", "poll", "post", "upgrade", "options")


def perform(site: Site, kind: str, *headers: tuple[str, str]) -> clients.Answer:
    """Make a request of some kind; a session that it needs is opened by somebody honest."""
    query = "EIO=4&transport=" + ("websocket" if kind.split()[0] in UPGRADING else "polling")
    if kind in ("poll", "post", "upgrade"):
        query += f"&sid={site.open('polling').sid}"
    method = {"post": "POST", "options": "OPTIONS"}.get(kind, "GET")
    body = b"40" if kind == "post" else b""
    if kind.split()[0] in UPGRADING:
        headers = (*UPGRADE, *headers)
    if kind == "poll" and EVIL not in headers:
        # Something to fetch, or it would wait.
        site.dispatcher.engine.close_all("for the poll")
    return clients.request(site.address, method, f"{clients.PATH}?{query}", headers, body)


UPGRADING = ("websocket", "upgrade")


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_page_is_refused_by_each(
    site: Site, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    answer = perform(site, kind, EVIL)
    assert answer.status == 403
    assert b'"code":4,"message":"Forbidden"' in answer.body
    assert b"origin" in answer.body
    assert answer.header("Access-Control-Allow-Origin") is None
    assert answer.header("Content-Type") == "application/json"
    refusal = " ".join(r.getMessage() for r in caplog.records if r.name.endswith(".origins"))
    assert "http://evil.test" in refusal
    assert f"http://{site.address}" in refusal
    assert "CSRF_TRUSTED_ORIGINS" in refusal or "SOCKETIO_ALLOWED_ORIGINS" in refusal
    assert len(site.dispatcher.engine.sessions) == (kind in ("poll", "post", "upgrade"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [True, False], ids=["own origin", "no origin"])
def test_its_own_page_is_served_by_each(site: Site, kind: str, own: bool) -> None:
    headers = [("Origin", f"http://{site.address}")] if own else []
    answer = perform(site, kind, *headers)
    expected = {"options": 204}.get(kind, 101 if kind.split()[0] in UPGRADING else 200)
    assert answer.status == expected
    assert answer.header("Access-Control-Allow-Origin") is None


@settings(SOCKETIO_ALLOWED_ORIGINS=["https://shop.test"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_allowed_page_is_served_by_each_and_may_read_the_answer(site: Site, kind: str) -> None:
    answer = perform(site, kind, SHOP)
    expected = {"options": 204}.get(kind, 101 if kind.split()[0] in UPGRADING else 200)
    assert answer.status == expected
    assert answer.header("Access-Control-Allow-Origin") == "https://shop.test"
    assert answer.header("Access-Control-Allow-Credentials") == "true"
    assert "Origin" in (answer.header("Vary") or "")


@settings(SOCKETIO_ALLOWED_ORIGINS=["https://shop.test"])
def test_an_allowed_page_may_read_why_it_failed(site: Site) -> None:
    target = f"{clients.PATH}?EIO=4&transport=polling&sid=unknown"
    answer = clients.request(site.address, "GET", target, [SHOP])
    assert answer.status == 400
    assert answer.header("Access-Control-Allow-Origin") == "https://shop.test"


@settings(SOCKETIO_ALLOWED_ORIGINS=["https://shop.test"])
def test_a_preflight_says_what_is_allowed(site: Site) -> None:
    asked = ("Access-Control-Request-Headers", "content-type,x-probe")
    answer = perform(site, "options", SHOP, asked)
    assert answer.header("Access-Control-Allow-Methods") == "GET, POST"
    assert answer.header("Access-Control-Allow-Headers") == "content-type,x-probe"


@settings(SOCKETIO_ALLOWED_ORIGINS="*")
@pytest.mark.parametrize("kind", KINDS)
def test_two_origins_are_none(site: Site, kind: str) -> None:
    own = ("Origin", f"http://{site.address}")
    assert perform(site, kind, own, own).status == 403
    assert perform(site, kind, own, EVIL).status == 403


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_host_is_refused_by_each(site: Site, kind: str) -> None:
    host = ("Host", "evil.test")
    assert perform(site, kind, host, EVIL).status == 400
    assert perform(site, kind, host, ("Origin", "http://evil.test")).status == 400


def test_a_session_stays_whole_when_a_foreign_page_guesses_it(site: Site) -> None:
    client = site.connect(transport="polling")
    target = f"{clients.PATH}?EIO=4&transport=polling&sid={client.connection.sid}"
    for method, body in (("GET", b""), ("POST", b"41")):
        assert clients.request(site.address, method, target, [EVIL], body).status == 403
    assert client.fence() == []


def test_the_log_of_a_refusal_stays_one_line(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    origin = "http://evil.test\xa0\xadx"
    with pytest.raises(HandshakeFailed) as failed:
        site.open("polling", headers={"Origin": origin})
    assert failed.value.status == 403
    (record,) = [record for record in caplog.records if record.name.endswith(".origins")]
    assert record.getMessage().isprintable()


# The whole matrix, over real sockets, on both fronts

OWN = "http://example.com"
LIST, WILD, STAR, CALL = "list", "wildcard", "star", "callable"
CONFIGURATIONS: dict[str, Any] = {
    "default": None,
    LIST: ["https://shop.test", "http://[2001:db8::1]:8000", "https://xn--bcher-kva.test"],
    WILD: ["https://*.shop.test"],
    STAR: "*",
    CALL: f"{__name__}.is_one_of_ours",
}
EVERYWHERE = set(CONFIGURATIONS)

MATRIX: dict[str, tuple[list[str], set[str]]] = {
    # What the page's Origin headers are, and with which settings it may connect
    "missing": ([], EVERYWHERE),
    "own": ([OWN], EVERYWHERE),
    "own with its port": ([OWN + ":80"], EVERYWHERE),
    "upper case": (["HTTP://EXAMPLE.COM"], EVERYWHERE),
    "listed": (["https://shop.test"], {LIST, STAR, CALL}),
    "listed, upper case": (["HTTPS://SHOP.TEST"], {LIST, STAR}),
    "listed, its port": (["https://shop.test:443"], {LIST, STAR}),
    "listed, a user": (["https://me@shop.test"], set()),
    "sub of listed": (["https://a.shop.test"], {WILD, STAR, CALL}),
    "sub of sub of listed": (["https://b.a.shop.test"], {WILD, STAR, CALL}),
    "IPv6": (["http://[2001:db8::1]:8000"], {LIST, STAR}),
    "IPv6 without its port": (["http://[2001:db8::1]"], {STAR}),
    "punycode": (["https://xn--bcher-kva.test"], {LIST, STAR}),
    "IDN": (["https://b\xfccher.test"], set()),
    "own, other port": ([OWN + ":8000"], {STAR}),
    "https of http": (["https://example.com"], {STAR}),
    "sub of own": (["http://www.example.com"], {STAR}),
    "own as a sub of evil": (["http://example.com.evil.test"], {STAR}),
    "own as the end of evil": (["http://evilexample.com"], {STAR}),
    "listed as the end of evil": (["https://evilshop.test"], {STAR}),
    "trailing dot": (["http://example.com."], {STAR}),
    "null": (["null"], set()),
    "file": (["file://"], set()),
    "a web view": (["capacitor://localhost"], {CALL}),
    "user@host": (["http://me@example.com"], set()),
    "own@evil": (["http://example.com@evil.test"], set()),
    "own, twice": ([OWN, OWN], set()),
    "own and evil": ([OWN, "http://evil.test"], set()),
    "evil and listed": (["http://evil.test", "https://a.shop.test"], set()),
    "empty": ([""], set()),
    "8 KB": (["http://" + "x" * 8192], set()),
    "8 KB of listed": (["https://shop.test" + "/" * 8192], set()),
}


def is_one_of_ours(origin: str, environ: dict[str, Any]) -> bool:
    return origin in ("https://shop.test", "capacitor://localhost") or is_a_shop(origin, environ)


def is_let_in(site: Site, kind: str, sid: str, origins: list[str]) -> bool:
    """Make a request of some kind for the page; tell whether it was served."""
    websocket = kind.split()[0] in UPGRADING
    query = f"EIO=4&transport={'websocket' if websocket else 'polling'}"
    if kind in ("poll", "post", "upgrade"):
        query += f"&sid={sid}"
    if kind == "poll":
        site.dispatcher.engine.sessions[sid].send(Frame.message(b"so that it ends"))
    headers = [("Host", "example.com"), *(("Origin", origin) for origin in origins)]
    answer = clients.request(
        site.address,
        {"post": "POST", "options": "OPTIONS"}.get(kind, "GET"),
        f"{clients.PATH}?{query}",
        [*headers, *UPGRADE] if websocket else headers,
        b"3" if kind == "post" else b"",
    )
    assert answer.status in (403, {"options": 204}.get(kind, 101 if websocket else 200))
    if answer.status == 403:
        assert answer.header("Access-Control-Allow-Origin") is None
    return answer.status != 403


@pytest.mark.parametrize("front", [Site, GunicornSite], ids=["one process", "gunicorn"])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_matrix(front: type[Site], configuration: str, kind: str) -> None:
    allowed = CONFIGURATIONS[configuration]
    with front(ALLOWED_HOSTS=["*"], SOCKETIO_ALLOWED_ORIGINS=allowed) as site:
        sid = site.open("polling").sid
        let_in = {
            name for name, (origins, _) in MATRIX.items() if is_let_in(site, kind, sid, origins)
        }
        assert sid in site.dispatcher.engine.sessions
    assert let_in == {name for name, (_, where) in MATRIX.items() if configuration in where}


@pytest.mark.parametrize("kind", KINDS)
def test_another_page_without_an_origin_is_refused_by_each(site: Site, kind: str) -> None:
    session = site.open("polling")
    page = {name: value for name, value in UPGRADE if kind.split()[0] in UPGRADING}
    query = f"EIO=4&transport={'websocket' if page else 'polling'}"
    target = f"{clients.PATH}?{query}" + (f"&sid={session.sid}" if kind in ("poll", "post") else "")
    method = {"post": "POST", "options": "OPTIONS"}.get(kind, "GET")
    answer = clients.request(
        site.address, method, target, {**page, "Sec-Fetch-Site": "cross-site"}, b""
    )
    assert answer.status == 403
    assert list(site.dispatcher.engine.sessions) == [session.sid]
