"""
What ends a login, in any process that runs the project: each node is told once it is committed.

Django sends signals for users, but none for the end of a session: its store is watched instead.
A node that word does not reach, since the carrier is down, finds out by itself; see `identities`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from importlib import import_module
from typing import Any

from asgiref.sync import sync_to_async
from django.apps import apps
from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.signals import user_logged_out
from django.contrib.sessions.backends.signed_cookies import SessionStore as SignedCookies
from django.core.exceptions import ImproperlyConfigured, ValidationError
from django.core.signals import setting_changed
from django.db import router
from django.db.models.signals import post_delete, post_save
from django.db.transaction import TransactionManagementError, on_commit
from django.dispatch import receiver

from . import runtime
from .exceptions import BackendError
from .identities import digest
from .logins import LOGIN_REVOKED, SESSION_ENDED

logger = logging.getLogger(__name__)

_IRRELEVANT = frozenset(("last_login",))
"""Fields of a user that may change, as at every login, without anybody being asked about."""


def watch() -> None:
    """Begin to notice; called once all models are there."""
    user_logged_out.connect(_logged_out, dispatch_uid=__name__)
    try:
        user_model = get_user_model()
    except ImproperlyConfigured:
        user_model = None
    for model in apps.get_models():
        if user_model is not None and issubclass(model, user_model):  # its proxies, too
            post_save.connect(_user_saved, sender=model, dispatch_uid=__name__)
            post_delete.connect(_user_deleted, sender=model, dispatch_uid=__name__)
    watch_sessions()


def name_of(user: Any) -> str:
    """Return what `identities` calls a user, of which there may be the primary key alone."""
    key = getattr(user, "pk", user)
    try:
        return str(get_user_model()._meta.pk.to_python(key))
    except (ImproperlyConfigured, ValidationError):
        return str(key)  # of a user that is none of the database's


# Users


def _user_saved(
    instance: Any, created: bool, using: str, update_fields: frozenset[str] | None, **kwargs: Any
) -> None:
    if not created and (update_fields is None or not update_fields <= _IRRELEVANT):
        _when_committed(using, "check user", name_of(instance))


def _user_deleted(instance: Any, using: str, **kwargs: Any) -> None:
    _when_committed(using, "end user", name_of(instance), LOGIN_REVOKED)


def _logged_out(request: Any, user: Any, **kwargs: Any) -> None:
    """Close what a session cannot, since it is in its cookie: all connections of the user."""
    if user is not None and isinstance(getattr(request, "session", None), SignedCookies):
        _tell("end user", name_of(user), SESSION_ENDED)


# Sessions: logout() and login() delete what there was, by whichever store


def watch_sessions() -> None:
    """Watch the session store that the settings name."""
    try:
        store = import_module(settings.SESSION_ENGINE).SessionStore
    except (ImportError, AttributeError):
        return  # without sessions nobody needs to name a store that there is
    if not issubclass(store, SignedCookies):
        _watch_store(store)
    if apps.is_installed("django.contrib.sessions") and hasattr(store, "get_model_class"):
        # Not by post_delete: it would have every clearsessions load the rows that it deletes.
        _watch_model(store.get_model_class())


def _watch_store(store: Any) -> None:
    delete, adelete = store.delete, store.adelete
    if hasattr(delete, "is_watched"):
        return

    @wraps(delete)
    def watched(self: Any, session_key: str | None = None) -> None:
        key = session_key or self.session_key
        with _outermost() as tells:
            delete(self, session_key)
        if tells:
            _session_deleted(key, _database_of(self))

    @wraps(adelete)
    async def watched_async(self: Any, session_key: str | None = None) -> None:
        key = session_key or self.session_key
        with _outermost() as tells:
            await adelete(self, session_key)
        if tells:
            await sync_to_async(_session_deleted)(key, _database_of(self))

    watched.is_watched = True  # type: ignore[attr-defined]
    store.delete, store.adelete = watched, watched_async


def _watch_model(model: Any) -> None:
    delete = model.delete
    if hasattr(delete, "is_watched"):
        return

    @wraps(delete)
    def watched(self: Any, using: str | None = None, *args: Any, **kwargs: Any) -> Any:
        key, using = self.session_key, using or router.db_for_write(model, instance=self)
        with _outermost() as tells:
            deleted = delete(self, using, *args, **kwargs)
        if tells:
            _session_deleted(key, using)
        return deleted

    watched.is_watched = True  # type: ignore[attr-defined]
    model.delete = watched


_inside: ContextVar[bool] = ContextVar("inside of a delete", default=False)


@contextmanager
def _outermost() -> Iterator[bool]:
    """Yield whether no other delete calls this one, as a store that of its row."""
    outermost = not _inside.get()
    token = _inside.set(True)
    try:
        yield outermost
    finally:
        _inside.reset(token)


def _database_of(store: Any) -> str | None:
    model = getattr(store, "model", None)
    return None if model is None else router.db_for_write(model)


def _session_deleted(key: str | None, using: str | None) -> None:
    if key:
        _when_committed(using, "end session", digest(key))


@receiver(setting_changed)
def _setting_changed(setting: str, **kwargs: Any) -> None:
    if setting == "SESSION_ENGINE":
        watch_sessions()


# Word


def _when_committed(using: str | None, name: str, *args: Any) -> None:
    tell = partial(_tell, name, *args)
    try:
        if using is not None:
            on_commit(tell, using=using)
            return
    except TransactionManagementError:
        pass  # the project commits by hand, and nobody says when
    tell()


def _tell(name: str, *args: Any) -> None:
    """Tell every node; if that fails, it is no failure of the project's save() or logout()."""
    try:
        cluster = runtime.get_cluster()
        try:
            cluster.tell_all(name, *args)
        except BackendError as error:
            cluster.counters["failed: word of ended logins"] += 1
            logger.error("Nobody was told to %s, for the backend is down: %s", name, error)
    except Exception:
        logger.exception("Nobody was told to %s", name)
