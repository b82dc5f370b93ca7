"""Which pages may talk to the server: one decision for every request of every transport."""

import logging
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from django.conf import settings
from django.core.exceptions import DisallowedHost
from django.core.signals import setting_changed
from django.dispatch import receiver
from django.http import HttpRequest
from django.utils.http import is_same_domain
from django.utils.module_loading import import_string

from . import conf
from .engine import Headers, Refused
from .protocol.engineio import ErrorCode

logger = logging.getLogger(__name__)

Decider = Callable[[str, dict[str, Any]], bool]
"""`decide(origin, environ)`: whether pages of another origin than our own may connect."""

_DEFAULT_PORTS = {"http": 80, "https": 443}


class _Head(HttpRequest):
    """A request that knows its host and scheme as Django's settings say, and nothing else."""

    def __init__(self, environ: dict[str, Any]) -> None:
        self.META = environ

    def _get_scheme(self) -> str:
        scheme: str = self.META["wsgi.url_scheme"]
        return scheme


def allow(environ: dict[str, Any]) -> Headers:
    """
    Return the CORS headers for the answer; raise `Refused` if the page may not have one.

    The Host must be allowed. An Origin must be the server's own, as the browser sees it (proxies
    through Django's settings alone), or one of `SOCKETIO_ALLOWED_ORIGINS`, by default
    `CSRF_TRUSTED_ORIGINS`. Without Origin it is no page of another site's that asks, unless the
    browser says that it is.
    """
    try:
        own = _own_origin(*(environ.get(key) for key in _own_keys()))
    except DisallowedHost as error:
        logger.warning("%s", error)
        raise Refused(ErrorCode.BAD_REQUEST, "this host is not in ALLOWED_HOSTS") from None
    origin = environ.get("HTTP_ORIGIN")
    if origin is None:
        _check_site(environ, own)
        return []
    if origin == own or _same(origin, own):
        return []
    headers = _others(origin, own, environ)
    if environ["REQUEST_METHOD"] == "OPTIONS":
        asked = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
        headers += [
            ("Access-Control-Allow-Methods", "GET, POST"),
            ("Access-Control-Allow-Headers", asked or "Content-Type"),
            ("Access-Control-Max-Age", "600"),
        ]
    return headers


def _check_site(environ: dict[str, Any], own: str) -> None:
    """
    Refuse a request without Origin that a browser makes for another site's page.

    A browser sends Origin with every WebSocket, POST and cross-origin request whose answer the page
    may read. What is left is a GET for an image, a script or a link: no page of ours, and no client
    of Socket.IO, sends that, but a native client, whose GET says nothing of sites.
    """
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site in _OTHER_SITES:
        logger.warning(
            "Refused a page without Origin: it is of another site than %s (Sec-Fetch-Site: %s), for"
            " which there is no setting: SOCKETIO_ALLOWED_ORIGINS needs an Origin",
            own,
            site,
        )
        raise _refused()


_OTHER_SITES = ("cross-site", "same-site")


def _others(origin: str, own: str, environ: dict[str, Any]) -> Headers:
    """Return the CORS headers for another origin than our own, or raise `Refused`."""
    allowed = conf.get("ALLOWED_ORIGINS")
    setting = "SOCKETIO_ALLOWED_ORIGINS"
    if allowed is None:
        allowed, setting = settings.CSRF_TRUSTED_ORIGINS, "CSRF_TRUSTED_ORIGINS"
    decide = _decider(allowed)
    if _ask(decide, origin, environ) if decide is not None else _in(origin, allowed):
        return [
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Allow-Credentials", "true"),
            ("Vary", "Origin"),
        ]
    if decide is None and "*" in allowed and _parse(origin) is not None:
        # Whoever lets all pages in does not show them the answers to the user's cookies.
        return [("Access-Control-Allow-Origin", "*")]
    logger.warning(
        "Origin %.300r refused: it is not %s, nor %s %s%s",
        origin,
        own,
        "in" if decide is None else "allowed by",
        setting,
        _advice(origin, own),
    )
    raise _refused()


def _refused() -> Refused:
    return Refused(ErrorCode.FORBIDDEN, "this origin is not allowed", HTTPStatus.FORBIDDEN)


def _advice(origin: str, own: str) -> str:
    """Name the setting that is missing where a proxy ends TLS."""
    parts, ours = _parse(origin), _parse(own)
    if parts is None or ours is None or parts[1] != ours[1] or parts[0] == ours[0]:
        return ""
    return ". If a proxy ends TLS here, Django learns of it by SECURE_PROXY_SSL_HEADER"


def _decider(allowed: Any) -> Decider | None:
    """Return the callable that `SOCKETIO_ALLOWED_ORIGINS` is or names, if it is no list."""
    if isinstance(allowed, str) and allowed != "*":
        allowed = _import(allowed)
    return allowed if callable(allowed) else None


def _ask(decide: Decider, origin: str, environ: dict[str, Any]) -> bool:
    """Ask a callable about what is one origin at least; if it fails, that is a no."""
    if not _ONE.match(origin):
        return False
    try:
        return bool(decide(origin, environ))
    except Exception:
        logger.exception("SOCKETIO_ALLOWED_ORIGINS could not decide about %r", origin)
        return False


_import = lru_cache(1)(import_string)

_KEYS = (
    "wsgi.url_scheme",
    "HTTP_HOST",
    "HTTP_X_FORWARDED_HOST",
    "HTTP_X_FORWARDED_PORT",
    "SERVER_NAME",
    "SERVER_PORT",
)
"""All of the environ that Django's `get_host()` and `scheme` read, but for the proxy's header."""


@lru_cache(1)
def _own_keys() -> tuple[str, ...]:
    header = settings.SECURE_PROXY_SSL_HEADER
    return _KEYS if header is None else (*_KEYS, header[0])


@lru_cache(1024)
def _own_origin(*values: str | None) -> str:
    """Return the server's own origin; raise `DisallowedHost` if the Host header is not allowed."""
    present = zip(_own_keys(), values, strict=True)
    head = _Head({key: value for key, value in present if value is not None})
    return f"{head.scheme}://{head.get_host()}"


@receiver(setting_changed)
def _forget(**kwargs: Any) -> None:
    _own_keys.cache_clear()
    _own_origin.cache_clear()
    _import.cache_clear()


def _same(origin: str, other: str) -> bool:
    parts = _parse(origin)
    return parts is not None and parts == _parse(other)


def _in(origin: str, allowed: Sequence[str]) -> bool:
    parts = _parse(origin)
    if parts is None:
        return False
    scheme, host, port = parts
    for item in allowed:
        pattern = _parse(item.replace("://*.", "://.", 1))
        if pattern is None or (pattern[0], pattern[2]) != (scheme, port):
            continue
        if is_same_domain(host, pattern[1]) and (pattern[1][0] != "." or host != pattern[1][1:]):
            return True
    return False


def _parse(origin: str) -> tuple[str, str, int] | None:
    """Return scheme, host and port, or None for what is no origin of a page (RFC 6454, 6.2)."""
    match = _ORIGIN.match(origin)
    if match is None:
        return None
    scheme, host, port = match[1].lower(), match[2].lower(), int(match[3] or 0)
    return (scheme, host, port or _DEFAULT_PORTS[scheme]) if port < 65536 else None


# No path, no user, and no character that a browser does not send: a host of others is in Punycode.
_ORIGIN = re.compile(
    r"(https?)://([a-z0-9._-]{1,255}|\[[0-9a-f:.]{1,45}\])(?::([1-9][0-9]{0,4}))?\Z", re.I | re.A
)

# Whatever any browser or web view may call one: "null", "capacitor://localhost", "file://".
_ONE = re.compile(
    r"(null|[a-z][a-z0-9+.-]{0,40}://([a-z0-9._-]{0,255}|\[[0-9a-f:.]{1,45}\])(:[1-9][0-9]{0,4})?)\Z",
    re.I | re.A,
)
