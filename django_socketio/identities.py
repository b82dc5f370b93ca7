"""
Who each connection of this process is, for as long as it is that.

The handshake's request says so once: a user, a session of Django, both, or neither. When the login
behind a connection ends, the connection is closed, and its client comes back by itself as whoever
it still is. Word of such an end comes from any process (see `accounts`); what nobody sends word of,
an update by SQL, a cache that forgets, is found by asking the database about every user once per
`SOCKETIO_REAUTH_INTERVAL`.
"""

import logging
from collections import OrderedDict
from hashlib import sha256
from itertools import islice
from time import monotonic
from typing import Any, NamedTuple, Protocol

import gevent
from django.conf import settings
from django.contrib.auth import HASH_SESSION_KEY, SESSION_KEY
from django.contrib.sessions.backends import signed_cookies
from django.http import parse_cookie
from django.utils.crypto import constant_time_compare
from django.utils.functional import SimpleLazyObject, empty
from gevent.event import Event

from . import logins
from .cluster import Answer, Cluster
from .engine import Session
from .hub import Hub
from .logins import SESSION_ENDED

logger = logging.getLogger(__name__)

_SHARDS = 20
"""Parts of the users, of which one is asked about at a time, so that the interval is filled."""

_BATCH = 100
"""Users that one query asks about, between two turns of the loop."""

_PATIENCE = 30.0
"""Seconds that one round of questions may take."""

_RETRY = 5.0
"""Seconds until a question is repeated that could not be answered."""

_MEMORY, _MEMORIES = 60.0, 10_000
"""Seconds for which ended logins are remembered, in case a handshake is under way; and how many."""

_MIDDLEWARE = "django.contrib.auth.middleware"


class Identity(NamedTuple):
    """`user` is a primary key, `session` the digest of a session's; "" stands for none."""

    user: str
    session: str


class Visitor(Protocol):
    """A connection, as far as it matters who it is."""

    identity: Identity | None
    session: Session
    sockets: dict[str, Any]
    request: Any


def digest(session_key: str) -> str:
    """Return a name for a session that is none of its secrets."""
    return sha256(session_key.encode(errors="replace")).hexdigest()[:32]


_IDENTITY = "_socketio_identity"
"""The attribute of a request that tells whom a handshake is from, until it is a connection's."""


def identify_handshake(request: Any) -> None:
    """Find out whom a handshake is from, where the database may be asked."""
    setattr(request, _IDENTITY, identify(request))


def user_of_handshake(request: Any) -> str | None:
    """Return the user whom `identify_handshake()` has found; None for nobody in particular."""
    identity: Identity | None = vars(request)[_IDENTITY]
    return identity.user or None if identity is not None else None


def identify(request: Any) -> Identity | None:
    """
    Return whom a request comes from, or None for nobody in particular.

    Asks the database if the request has a session that was not looked at yet.
    """
    session = getattr(request, "session", None)
    key = None if session is None else getattr(session, "session_key", None)
    user = _user(request, key)
    known = str(user.pk) if user is not None and user.is_authenticated else ""
    if isinstance(session, signed_cookies.SessionStore):
        key = None  # the session is in the cookie, and nobody can end it
    elif session is not None and key:
        key = session.session_key  # now that it was looked for: there may be none
    return Identity(known, digest(key) if key else "") if known or key else None


def _user(request: Any, session_key: str | None) -> Any:
    """
    Return the user of a request, or None.

    Without a session Django's lazy user is nobody, which need not cost what it does to find out.
    """
    user = getattr(request, "user", None)
    if type(user) is not SimpleLazyObject:
        return user
    lazy = vars(user)
    if lazy["_wrapped"] is not empty:
        return lazy["_wrapped"]
    if not session_key and lazy["_setupfunc"].__module__ == _MIDDLEWARE:
        return None
    return user


def is_same_visitor(session: Session, environ: dict[str, Any]) -> bool:
    """Tell whether a later request of an Engine.IO session has the login of its handshake."""
    request = session.data.request
    cookies, before = environ.get("HTTP_COOKIE", ""), request.META.get("HTTP_COOKIE", "")
    if cookies == before:
        return True
    cookie, known = (
        parse_cookie(c).get(settings.SESSION_COOKIE_NAME, "") for c in (cookies, before)
    )
    store = getattr(request, "session", None)
    if store is None or constant_time_compare(cookie, known):
        return True
    if isinstance(store, signed_cookies.SessionStore):
        same = _login_in(store) == _login_in(type(store)(cookie))
    else:  # or what the answer to the handshake made of it
        same = constant_time_compare(cookie, getattr(store, "session_key", None) or "")
    if not same:
        logger.warning(
            "A request for session %s has another %s cookie than its handshake",
            session.sid,
            settings.SESSION_COOKIE_NAME,
        )
    return same


def _login_in(store: Any) -> tuple[Any, Any]:
    return store.get(SESSION_KEY), store.get(HASH_SESSION_KEY)


class Identities:
    """
    The connections of this process by user and by session.

    Belongs to the hub's thread. `interval` is in seconds; None checks only upon word.
    """

    def __init__(self, hub: Hub, cluster: Cluster, interval: float | None) -> None:
        self._hub = hub
        self._pause = None if interval is None else interval / _SHARDS
        self._users: list[dict[str, set[Visitor]]] = [{} for _ in range(_SHARDS)]
        self._sessions: dict[str, set[Visitor]] = {}
        self._ended: OrderedDict[str, float] = OrderedDict()
        self._changed: OrderedDict[str, float] = OrderedDict()
        self._due: set[str] = set()
        self._word = Event()
        self._fails = False
        self._checker: gevent.Greenlet[..., Any] | None = None
        cluster.answerers["end session"] = self._end_session
        cluster.answerers["end user"] = self._end_user
        cluster.answerers["check user"] = self._check_user
        cluster.answerers["disconnect user"] = self._disconnect_user

    def start(self) -> None:
        self._checker = gevent.spawn(self._live)

    def stop(self) -> None:
        if self._checker is not None:
            self._checker.kill(timeout=1.0)

    def __len__(self) -> int:
        """Return how many users and sessions are known, for whoever looks for leaks."""
        return sum(map(len, self._users)) + len(self._sessions)

    # Who is here

    def add(self, visitor: Visitor) -> None:
        """Note whom the visitor's request is from, now; again if that has changed."""
        request = visitor.request
        try:
            known = vars(request)
            identity = known.pop(_IDENTITY) if _IDENTITY in known else identify(request)
        except Exception:
            logger.exception("Could not tell who %s is", visitor.session.sid)
            return  # and it stays who it was
        if identity == visitor.identity or visitor.session.reason is not None:
            return
        self.discard(visitor)
        visitor.identity = identity
        if identity is None:
            return
        if identity.user:
            self._shard(identity.user).setdefault(identity.user, set()).add(visitor)
            if identity.user in self._changed:
                self._ask_about(identity.user)
        if identity.session:
            self._sessions.setdefault(identity.session, set()).add(visitor)
            if identity.session in self._ended:  # while the handshake was under way
                gevent.spawn(visitor.session.close, SESSION_ENDED)

    def discard(self, visitor: Visitor) -> None:
        """Forget a visitor; one that is not known is fine."""
        identity, visitor.identity = visitor.identity, None
        if identity is None:
            return
        if identity.user:
            _remove(self._shard(identity.user), identity.user, visitor)
        if identity.session:
            _remove(self._sessions, identity.session, visitor)

    def of_user(self, user: str) -> list[Visitor]:
        return list(self._shard(user).get(user, ()))

    def _shard(self, user: str) -> dict[str, set[Visitor]]:
        return self._users[hash(user) % _SHARDS]

    # Word of an end; see Cluster

    def _end_session(self, session: str, attachments: Any) -> Answer:
        _remember(self._ended, session)
        for visitor in list(self._sessions.get(session, ())):
            key = visitor.request.session.session_key
            if key and digest(key) != session:
                self.add(visitor)  # a handler of its own has logged it in, with a new key
            else:
                visitor.session.close(SESSION_ENDED)
        return Answer(None)

    def _end_user(self, user: str, reason: str, attachments: Any) -> Answer:
        _remember(self._changed, user)
        for visitor in self.of_user(user):
            visitor.session.close(reason)
        return Answer(None)

    def _check_user(self, user: str, attachments: Any) -> Answer:
        _remember(self._changed, user)
        if user in self._shard(user):
            self._ask_about(user)
        return Answer(None)

    def _disconnect_user(self, user: str, namespace: str, attachments: Any) -> Answer:
        visitors = self.of_user(user)
        found = [socket for v in visitors if (socket := v.sockets.get(namespace)) is not None]
        for socket in found:
            self._hub.at_home(socket.disconnect)
        return Answer(len(found))

    def _ask_about(self, user: str) -> None:
        self._due.add(user)
        self._word.set()

    # Questions to the database, one greenlet's

    def _live(self) -> None:
        turn, due = 0, monotonic() + (self._pause or 0.0)
        while True:
            self._word.wait(None if self._pause is None else max(due - monotonic(), 0.001))
            self._word.clear()
            users, self._due = self._due, set()
            if self._pause is not None and monotonic() >= due:
                users = users.union(self._users[turn])
                turn, due = (turn + 1) % _SHARDS, max(due + self._pause, monotonic())
            if users and not self._check(users):
                self._due.update(users)
                self._word.set()
                gevent.sleep(_RETRY)

    def _check(self, users: set[str]) -> bool:
        """Check the connections of some users; return False if the database cannot be asked."""
        try:
            with gevent.Timeout(_PATIENCE), logins.database():
                pending = iter(users)
                while batch := list(islice(pending, _BATCH)):
                    self._check_batch([v for user in batch for v in self.of_user(user)])
                    gevent.sleep(0)
        except (Exception, gevent.Timeout) as error:
            self._hub.counters["failed: checks of logins"] += 1
            if not self._fails:
                logger.error("Logins cannot be checked, and nobody is disconnected: %r", error)
            self._fails = True
            return False
        if self._fails:
            logger.warning("Logins can be checked again")
        self._fails = False
        return True

    def _check_batch(self, visitors: list[Visitor]) -> None:
        """Close those whose login has ended; give the others their user as the database has it."""
        requests = [visitor.request for visitor in visitors]
        rows, alive = logins.fresh_users(requests), logins.live_sessions(requests)
        self._hub.counters["checked logins"] += len(visitors)
        for visitor in visitors:
            if visitor.identity is None or visitor.session.reason is not None:
                continue  # it went while we asked
            try:
                reason = logins.end_of_login(visitor.request, rows, alive)
                if not reason:
                    logins.refresh(visitor.request, rows)
            except Exception:  # what a project makes of users is its own: the others go on
                self._hub.counters["failed: checks of logins"] += 1
                logger.exception("Could not check the login of %s", visitor.session.sid)
                continue
            if reason:
                visitor.session.close(reason)


def _remove(index: dict[str, set[Visitor]], name: str, visitor: Visitor) -> None:
    found = index[name]
    found.discard(visitor)
    if not found:
        del index[name]


def _remember(memory: "OrderedDict[str, float]", name: str) -> None:
    """Keep `name` for a while, and as many as are kept at most."""
    now = monotonic()
    memory[name] = now
    memory.move_to_end(name)
    while len(memory) > _MEMORIES or next(iter(memory.values())) < now - _MEMORY:
        memory.popitem(last=False)
