"""
Whether logins still hold: what Django would find for the next request of each, asked in bulk.

Everything here asks databases or caches, and raises what they raise.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from django.conf import settings
from django.contrib.auth import (
    BACKEND_SESSION_KEY,
    HASH_SESSION_KEY,
    SESSION_KEY,
    get_user_model,
    load_backend,
)
from django.contrib.sessions.backends import cache, cached_db, db
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, router
from django.utils import timezone
from django.utils.crypto import constant_time_compare

SESSION_ENDED = "session ended"
"""The reason where Django's session is gone: by logout, a new login, its expiry."""

LOGIN_REVOKED = "login revoked"
"""The reason where the session may be there, but no longer speaks for its user."""


@contextmanager
def database() -> Iterator[None]:
    """Let go of the greenlet's database connections at the end of the block."""
    try:
        yield
    finally:
        connections.close_all()


def fresh_users(requests: Iterable[Any]) -> dict[str, Any]:
    """Return the users as the database that they are written to has them, by primary key."""
    users = [request.user for request in requests if _has_row(request.user)]
    by_database: dict[str, set[Any]] = {}
    for user in users:
        alias = router.db_for_write(user.__class__, instance=user)
        by_database.setdefault(alias, set()).add(user.pk)
    rows = {}
    for alias, keys in by_database.items():
        for row in get_user_model()._base_manager.using(alias).filter(pk__in=keys):
            rows[str(row.pk)] = row
    return rows


def _has_row(user: Any) -> bool:
    """Tell whether a user comes from the database, and no middleware has made it up."""
    try:
        model = get_user_model()
    except ImproperlyConfigured:
        return False
    return isinstance(user, model) and user.pk is not None and not user._state.adding


def live_sessions(requests: Iterable[Any]) -> set[str]:
    """Return those of the session keys of logins that stand for a session."""
    stores = [each.session for each in requests if _is_logged_in_by_session(each)]
    keys = {store.session_key for store in stores if store.session_key}
    kind = import_module(settings.SESSION_ENGINE).SessionStore
    if kind in (db.SessionStore, cached_db.SessionStore):
        model = kind.get_model_class()
        found = model.objects.using(router.db_for_write(model))
        found = found.filter(session_key__in=keys, expire_date__gt=timezone.now())
        return set(found.values_list("session_key", flat=True))
    return {key for key in keys if _exists(kind, key)}


def _exists(kind: Any, key: str) -> bool:
    if issubclass(kind, cache.SessionStore):
        return bool(kind(key).exists(key))  # load() takes a cache that is down for an empty one
    return bool(kind(key).load())


def _is_logged_in_by_session(request: Any) -> bool:
    """Tell whether the session says who the user is; a token may have, and the session nothing."""
    user: Any = request.user
    session: Any = getattr(request, "session", None)
    if not _has_row(user) or not getattr(session, "accessed", False) or SESSION_KEY not in session:
        return False
    return bool(user._meta.pk.to_python(session[SESSION_KEY]) == user.pk)


def end_of_login(request: Any, rows: dict[str, Any], alive: set[str]) -> str:
    """Return why the user of a request is no longer logged in, or ""."""
    user, by_session = request.user, _is_logged_in_by_session(request)
    if by_session and request.session.session_key not in alive:
        return SESSION_ENDED
    if not _has_row(user):
        return ""
    row = rows.get(str(user.pk))
    if row is None or not _may_log_in(row, request.session if by_session else None):
        return LOGIN_REVOKED
    return ""


def _may_log_in(row: Any, session: Any) -> bool:
    """Tell what Django would for the next request, of a user and what its session holds."""
    path = "" if session is None else session.get(BACKEND_SESSION_KEY)
    if path not in settings.AUTHENTICATION_BACKENDS:
        return bool(getattr(row, "is_active", True))
    may = getattr(load_backend(path), "user_can_authenticate", lambda user: user.is_active)
    if not may(row):  # some let users in who are not active
        return False
    known = session.get(HASH_SESSION_KEY, "")
    return any(constant_time_compare(known, value) for value in _hashes(row))


def _hashes(row: Any) -> Iterator[str]:
    if hasattr(row, "get_session_auth_hash"):
        yield row.get_session_auth_hash()
        yield from row.get_session_auth_fallback_hash()
    else:
        yield ""


def refresh(request: Any, rows: dict[str, Any]) -> None:
    """Have handlers see the user's rights of now, not those of the handshake."""
    user = request.user
    if not _has_row(user) or user.__class__ is not get_user_model():
        return
    fresh = copy.copy(rows[str(user.pk)])
    if hasattr(user, "backend"):
        fresh.backend = user.backend
    request.user = fresh
    if hasattr(request, "_cached_user"):  # or the old one would be kept for nothing
        request._cached_user = fresh
