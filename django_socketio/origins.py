"""Which pages may talk to the server: one decision for every request of every transport."""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from http import HTTPStatus
from typing import Any

from django.conf import settings
from django.core.exceptions import DisallowedHost
from django.core.signals import setting_changed
from django.dispatch import receiver
from django.http import HttpRequest
from django.utils.http import is_same_domain

from . import conf
from .engine import Headers, Refused
from .protocol.engineio import ErrorCode

logger = logging.getLogger(__name__)

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
    `CSRF_TRUSTED_ORIGINS`. Without Origin it is no page of another site's that asks.
    """
    try:
        own = _own_origin(*(environ.get(key) for key in _own_keys()))
    except DisallowedHost as error:
        logger.warning("%s", error)
        raise Refused(ErrorCode.BAD_REQUEST, "this host is not in ALLOWED_HOSTS") from None
    origin = environ.get("HTTP_ORIGIN")
    if origin is None or origin == own or _same(origin, own):
        return []
    allowed = conf.get("ALLOWED_ORIGINS")
    setting = "SOCKETIO_ALLOWED_ORIGINS"
    if allowed is None:
        allowed, setting = settings.CSRF_TRUSTED_ORIGINS, "CSRF_TRUSTED_ORIGINS"
    if _in(origin, allowed):
        headers = [
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Allow-Credentials", "true"),
            ("Vary", "Origin"),
        ]
    elif "*" in allowed and _parse(origin) is not None:
        # Whoever lets all pages in does not show them the answers to the user's cookies.
        headers = [("Access-Control-Allow-Origin", "*")]
    else:
        logger.warning("Origin %r refused: it is not %s, nor in %s", origin, own, setting)
        raise Refused(ErrorCode.FORBIDDEN, "this origin is not allowed", HTTPStatus.FORBIDDEN)
    if environ["REQUEST_METHOD"] == "OPTIONS":
        asked = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
        headers += [
            ("Access-Control-Allow-Methods", "GET, POST"),
            ("Access-Control-Allow-Headers", asked or "Content-Type"),
            ("Access-Control-Max-Age", "600"),
        ]
    return headers


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
