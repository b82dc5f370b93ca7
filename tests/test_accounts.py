"""Who a connection is, for as long as it is that: what ends a login ends its connections."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import gevent
import pytest
from asgiref.sync import async_to_sync
from django.conf import settings as django_settings
from django.contrib.auth import get_user_model, update_session_auth_hash
from django.contrib.auth.middleware import AuthenticationMiddleware
from django.contrib.auth.models import Group, Permission
from django.contrib.sessions.backends.file import SessionStore as FileStore
from django.contrib.sessions.middleware import SessionMiddleware
from django.contrib.sessions.models import Session
from django.core.cache import caches
from django.core.exceptions import PermissionDenied
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse
from django.test import Client as Browser, RequestFactory, override_settings
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from django.utils.functional import SimpleLazyObject

import django_socketio
from django_socketio import accounts, identities, runtime
from django_socketio.engine import Frame
from django_socketio.events import (
    on_connect,
    on_disconnect,
    on_event,
    on_finish,
    on_subscribe,
    on_unsubscribe,
)
from django_socketio.exceptions import BackendError, NoSocket
from django_socketio.identities import Identities, Identity, digest, identify
from django_socketio.logins import LOGIN_REVOKED, SESSION_ENDED
from tests import clients
from tests.clients import PATH, UPGRADE, Client
from tests.sites import Site, settings
from tests.support import UNIT, wait_until
from tests.test_gunicorn import GunicornSite

User: Any = get_user_model()

NEVER = 3600
"""An interval at which nobody is asked about: word alone must do."""

STORES = ("db", "cached_db", "cache", "file", "signed_cookies")
SIGNED = "django.contrib.sessions.backends.signed_cookies"


@pytest.fixture
def users() -> Iterator[Callable[..., Any]]:
    """Return a function that makes a user, who is gone after the test."""
    yield lambda name="mole", **fields: User.objects.create_user(name, password="old", **fields)
    User.objects.all().delete()
    Session.objects.all().delete()
    runtime.stop()  # whoever tells of an end needs a backend


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Have the project keep its sessions in each of Django's stores."""
    engine = f"django.contrib.sessions.backends.{request.param}"
    with override_settings(SESSION_ENGINE=engine, SESSION_FILE_PATH=str(tmp_path)):
        yield request.param
    if hasattr(FileStore, "_storage_path"):
        del FileStore._storage_path


@pytest.fixture
def ends(site: Site) -> list[tuple[str, str]]:
    """Return who has gone, and why, as `on_disconnect` hears of it."""
    found: list[tuple[str, str]] = []

    @on_disconnect
    def gone(request: Any, socket: Any, context: Any) -> None:
        found.append((request.user.get_username(), socket.disconnect_reason))

    @on_event("who")
    def who(request: Any, socket: Any, context: Any) -> Any:
        return [request.user.get_username(), getattr(request.user, "is_staff", None)]

    return found


def log_in(user: Any) -> Browser:
    browser = Browser()
    browser.force_login(user, django_settings.AUTHENTICATION_BACKENDS[0])
    return browser


def key_of(browser: Browser) -> str:
    return str(browser.cookies[django_settings.SESSION_COOKIE_NAME].value)


def cookie(browser: Browser) -> dict[str, str]:
    return {"Cookie": f"{django_settings.SESSION_COOKIE_NAME}={key_of(browser)}"}


def connect(site: Site, browser: Browser, transport: str = "websocket") -> Client:
    return site.connect(transport=transport, headers=cookie(browser))


def is_closed(client: Client) -> bool:
    """Wait for the end of the connection, which the official client comes back from by itself."""
    client.connection.wait_for_end()
    return True


def store_of(key: str) -> Any:
    return __import__(django_settings.SESSION_ENGINE, fromlist=["x"]).SessionStore(key)


def known(site: Site) -> int:
    return len(site.dispatcher.identities)


# What ends a login

quiet = settings(SOCKETIO_REAUTH_INTERVAL=NEVER)


@quiet
@pytest.mark.parametrize("transport", ["websocket", "polling"])
def test_logout(store: str, site: Site, users: Any, ends: list[Any], transport: str) -> None:
    """It closes the connections of this session; with a session in its cookie, of the user."""
    mole, rat = users("mole"), users("rat")
    here, there, other = log_in(mole), log_in(mole), log_in(rat)
    gone = [connect(site, here, transport), connect(site, here)]
    stays, others = connect(site, there), connect(site, other)
    stranger = site.connect()
    here.logout()
    assert all(map(is_closed, gone))
    if store == "signed_cookies":
        assert is_closed(stays)
    else:
        assert stays.call("who") == [["mole", False]]
    assert others.call("who") == [["rat", False]]
    assert stranger.fence() == []
    wait_until(lambda: len(ends) == (3 if store == "signed_cookies" else 2))
    assert set(ends) == {("mole", SESSION_ENDED)}


@quiet
def test_the_client_comes_back_as_whoever_it_still_is(
    store: str, site: Site, users: Any, ends: list[Any]
) -> None:
    browser = log_in(users())
    client = connect(site, browser)
    before = cookie(browser)
    browser.logout()
    assert is_closed(client)
    if store != "signed_cookies":  # whose old cookie speaks for itself
        assert site.connect(headers=before).call("who") == [["", False]]
    assert site.connect().call("who") == [["", False]]


def flush(key: str) -> None:
    store_of(key).flush()


def delete(key: str) -> None:
    store_of("").delete(key)


def delete_row(key: str) -> None:
    Session.objects.get(session_key=key).delete()


def cycle(key: str) -> None:
    store_of(key).cycle_key()


def flush_async(key: str) -> None:
    run_async(store_of(key).aflush)


def cycle_async(key: str) -> None:
    run_async(store_of(key).acycle_key)


def run_async(function: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:  # threads are greenlets here
        patch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "1")
        async_to_sync(function)()


@quiet
@pytest.mark.parametrize("end", [flush, delete, cycle, flush_async, cycle_async, delete_row])
def test_the_end_of_a_session(
    store: str, site: Site, users: Any, ends: list[Any], end: Callable[[str], None]
) -> None:
    if store == "signed_cookies" or (end is delete_row and store not in ("db", "cached_db")):
        return  # there is nothing to delete
    user = users()
    browser, other = log_in(user), log_in(user)
    client, stays = connect(site, browser), connect(site, other)
    end(key_of(browser))
    assert is_closed(client)
    wait_until(lambda: ends == [("mole", SESSION_ENDED)])
    assert stays.call("who") == [["mole", False]]


@quiet
def test_each_end_is_told_once(
    site: Site, users: Any, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(runtime.get_cluster(), "tell_all", lambda *args: told.append(args))
    browser = log_in(users())
    key = key_of(browser)
    told.clear()
    browser.logout()
    signed = ("end user", str(User.objects.get().pk), SESSION_ENDED)
    assert told == [signed if store == "signed_cookies" else ("end session", digest(key))]
    assert not re.search(key, repr(told))


@quiet
def test_a_stranger_who_logs_in_is_somebody_else(site: Site, users: Any, ends: list[Any]) -> None:
    """A session that was there before gets a new key, and its connections begin anew."""
    users()
    browser = Browser()
    session = browser.session  # anonymous, with a cookie
    session["cart"] = 1
    session.save()
    client = connect(site, browser)
    browser.login(username="mole", password="old")
    assert is_closed(client)
    assert connect(site, browser).call("who") == [["mole", False]]


@quiet
def test_a_handler_that_logs_its_own_connection_in_keeps_it(site: Site, users: Any) -> None:
    user = users()

    @on_event("login")
    def login(request: Any, socket: Any, context: Any) -> Any:
        request.session.cycle_key()
        request.user = user
        return digest(request.session.session_key)

    browser = Browser()
    browser.session.save()
    session = browser.session
    session["cart"] = 1
    session.save()
    client = connect(site, browser)
    (name,) = client.call("login")
    assert client.fence() == []
    (connection,) = site.dispatcher.connections
    wait_until(lambda: connection.identity == Identity(str(user.pk), name))


def set_password(user: Any) -> None:
    user.set_password("new")
    user.save()


def deactivate(user: Any) -> None:
    user.is_active = False
    user.save(update_fields=["is_active"])


def remove(user: Any) -> None:
    user.delete()


def remove_all(user: Any) -> None:
    User.objects.filter(pk=user.pk).delete()


def set_password_async(user: Any) -> None:
    user.set_password("new")
    run_async(user.asave)


ENDS = [set_password, deactivate, remove, remove_all, set_password_async]


@quiet
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("transport", ["websocket", "polling"])
def test_the_end_of_a_user(
    site: Site, users: Any, ends: list[Any], end: Callable[[Any], None], transport: str
) -> None:
    """It closes all connections of the user, of whichever session."""
    finished = []
    on_finish(lambda request, socket, context: finished.append(socket.disconnect_reason))
    mole, rat = users("mole"), users("rat")
    gone = [connect(site, log_in(mole), transport) for _ in range(3)]
    stays = connect(site, log_in(rat))
    end(User.objects.get(pk=mole.pk))
    assert all(map(is_closed, gone))
    wait_until(lambda: len(finished) == 3)
    assert finished == [LOGIN_REVOKED] * 3
    assert ends == [("mole", LOGIN_REVOKED)] * 3
    assert stays.call("who") == [["rat", False]]


@quiet
def test_the_end_of_a_user_with_each_store(store: str, site: Site, users: Any) -> None:
    user = users()
    client = connect(site, log_in(user))
    set_password(user)
    assert is_closed(client)


@quiet
def test_whoever_changes_the_password_stays_logged_in(
    site: Site, users: Any, ends: list[Any]
) -> None:
    """The session that changed it has a new key, and its client comes back with it."""
    user = users()
    browser = log_in(user)
    client = connect(site, browser)
    request = HttpRequest()
    request.session, request.user = browser.session, user  # type: ignore[assignment]
    user.set_password("new")
    user.save()
    update_session_auth_hash(request, user)
    request.session.save()
    assert is_closed(client)
    headers = {"Cookie": f"sessionid={request.session.session_key}"}
    assert site.connect(headers=headers).call("who") == [["mole", False]]


@quiet
def test_a_change_of_rights_is_seen_by_handlers_and_closes_nothing(
    site: Site, users: Any, ends: list[Any]
) -> None:
    user = users()
    client = connect(site, log_in(user))
    assert client.call("who") == [["mole", False]]
    user.is_staff = True
    user.save()
    wait_until(lambda: client.call("who") == [["mole", True]])
    user.is_staff = False
    user.save(update_fields=["is_staff"])
    wait_until(lambda: client.call("who") == [["mole", False]])
    assert ends == []


@quiet
def test_what_happens_at_every_login_asks_nobody(site: Site, users: Any) -> None:
    user = users()
    client = connect(site, log_in(user))
    log_in(user)  # which saves last_login
    client.fence()
    assert site.dispatcher.hub.counters["checked logins"] == 0
    user.save()
    wait_until(lambda: site.dispatcher.hub.counters["checked logins"] == 1)


@quiet
def test_inactive_users_stay_where_the_project_lets_them_in(site: Site, users: Any) -> None:
    backend = "django.contrib.auth.backends.AllowAllUsersModelBackend"
    with override_settings(AUTHENTICATION_BACKENDS=[backend]):
        user = users()
        client = connect(site, log_in(user))
        deactivate(user)
        wait_until(lambda: site.dispatcher.hub.counters["checked logins"] == 1)
        assert client.fence() == []


@quiet
def test_a_secret_that_rotates_logs_nobody_out(site: Site, users: Any) -> None:
    user = users()
    client = connect(site, log_in(user))
    with override_settings(SECRET_KEY="new", SECRET_KEY_FALLBACKS=[django_settings.SECRET_KEY]):
        user.save()
        wait_until(lambda: site.dispatcher.hub.counters["checked logins"] == 1)
        assert client.fence() == []


@pytest.mark.parametrize("transport", ["websocket", "polling"])
@pytest.mark.parametrize("end", [flush, lambda key: set_password(User.objects.get())])
def test_a_handshake_that_was_under_way_is_not_too_early(
    users: Any, end: Any, transport: str
) -> None:
    """The login ends between Django's look at it and the first word of the connection."""
    headers = cookie(log_in(users()))
    middleware = [*django_settings.MIDDLEWARE, f"{__name__}.Meanwhile"]
    Meanwhile.end = staticmethod(end)
    with Site(SOCKETIO_REAUTH_INTERVAL=NEVER, MIDDLEWARE=middleware) as site:
        site.open(transport, headers=headers).wait_for_end()


class Meanwhile:
    """Middleware in whose time the login of the request ends."""

    end: Callable[[str], None]

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        if request.path == PATH and request.user.is_authenticated:
            type(self).end(request.session.session_key)
            known: Any = runtime.get_dispatcher().identities  # type: ignore[union-attr]
            wait_until(lambda: known._ended or known._changed, what="word of it")
        return self.get_response(request)


# Transactions


@quiet
def test_a_rollback_tells_nobody(site: Site, users: Any, ends: list[Any]) -> None:
    user = users()
    browser = log_in(user)
    client = connect(site, browser)
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        deactivate(user)
        delete_row(key_of(browser))
        user.delete()
        raise ZeroDivisionError
    assert client.call("who") == [["mole", False]]
    assert site.dispatcher.hub.counters["checked logins"] == 0
    user = User.objects.get()
    with transaction.atomic():
        deactivate(user)
        assert client.call("who") == [["mole", False]]  # nobody reads before the commit
        assert site.dispatcher.hub.counters["checked logins"] == 0
    assert is_closed(client)


@quiet
def test_who_commits_by_hand_is_told_at_once(site: Site, users: Any) -> None:
    user = users()
    client = connect(site, log_in(user))
    transaction.set_autocommit(False)
    try:
        user.delete()
        transaction.commit()
    finally:
        transaction.set_autocommit(True)
    assert is_closed(client)


# What nobody sends word of

often = settings(SOCKETIO_REAUTH_INTERVAL=4 * UNIT)


@often
def test_a_change_without_any_signal(site: Site, users: Any, ends: list[Any]) -> None:
    mole, rat, toad = users("mole"), users("rat"), users("toad")
    gone = [connect(site, log_in(mole)), connect(site, log_in(rat), "polling")]
    stays = connect(site, log_in(toad))
    User.objects.filter(pk=mole.pk).update(is_active=False)
    User.objects.filter(pk=rat.pk).update(password="!")
    User.objects.filter(pk=toad.pk).update(is_staff=True)
    assert all(map(is_closed, gone))
    wait_until(lambda: sorted(ends) == [("mole", LOGIN_REVOKED), ("rat", LOGIN_REVOKED)])
    wait_until(lambda: stays.call("who") == [["toad", True]])


@often
def test_a_right_through_a_group(site: Site, users: Any) -> None:
    user = users()

    @on_event("may")
    def may(request: Any, socket: Any, context: Any) -> bool:
        return bool(request.user.has_perm("auth.add_user"))

    client = connect(site, log_in(user))
    assert client.call("may") == [False]
    group = Group.objects.create(name="clerks")
    try:
        group.permissions.add(Permission.objects.get(codename="add_user"))
        user.groups.add(group)
        wait_until(lambda: client.call("may") == [True])
        user.groups.clear()
        wait_until(lambda: client.call("may") == [False])
    finally:
        group.delete()


@often
def test_sessions_that_go_without_a_word(
    store: str, site: Site, users: Any, ends: list[Any], tmp_path: Path
) -> None:
    user = users()
    browser = log_in(user)
    client = connect(site, browser)
    checked = site.dispatcher.hub.counters["checked logins"]
    wait_until(lambda: site.dispatcher.hub.counters["checked logins"] > checked + 2)
    assert client.call("who") == [["mole", False]]
    if store == "signed_cookies":
        with override_settings(SESSION_COOKIE_AGE=-1):
            assert is_closed(client)
        return
    Session.objects.all().delete()  # many at once, as clearsessions does
    if store in ("cache", "cached_db"):
        caches["default"].clear()
    for file in tmp_path.iterdir():
        file.unlink()
    assert is_closed(client)
    wait_until(lambda: ends == [("mole", SESSION_ENDED)])


@often
def test_a_session_that_expires(site: Site, users: Any) -> None:
    browser = log_in(users())
    client = connect(site, browser)
    Session.objects.filter(session_key=key_of(browser)).update(expire_date=timezone.now())
    assert is_closed(client)


@often
def test_who_came_with_a_token(site: Site, users: Any, ends: list[Any]) -> None:
    """A handler says who it is: a user from the database, or one that is made up."""
    user = users()

    class Robot:
        is_authenticated, pk, is_active = True, "robot-1", False

        def get_username(self) -> str:
            return "robot"

    @on_connect
    def connected(request: Any, socket: Any, context: Any) -> None:
        request.user = Robot() if "robot" in socket.auth else User.objects.get()

    client, robot = site.connect(auth={"token": 1}), site.connect(auth={"robot": 1})
    hub = site.dispatcher.hub
    wait_until(lambda: hub.counters["checked logins"] > 6)
    assert client.call("who") == [["mole", False]]
    User.objects.filter(pk=user.pk).update(is_active=False)
    assert is_closed(client)
    assert robot.call("who") == [["robot", None]]
    assert ends == [("mole", LOGIN_REVOKED)]
    django_socketio.disconnect(user="robot-1")
    robot.disconnected()


@settings(SOCKETIO_REAUTH_INTERVAL=None)
def test_without_an_interval_word_alone_counts(site: Site, users: Any) -> None:
    user = users()
    client = connect(site, log_in(user))
    User.objects.update(is_active=False)
    gevent.sleep(4 * UNIT)
    assert client.fence() == []
    assert site.dispatcher.hub.counters["checked logins"] == 0
    user.refresh_from_db()
    user.save()
    assert is_closed(client)


@often
def test_a_database_that_is_down_disconnects_nobody(
    site: Site,
    users: Any,
    ends: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(identities, "_RETRY", UNIT)
    client = connect(site, log_in(users()))
    counters = site.dispatcher.hub.counters
    with monkeypatch.context() as broken:
        broken.setitem(connections.databases["default"], "NAME", "/nowhere/at-all")
        wait_until(lambda: counters["failed: checks of logins"] > 2)
        assert client.call("who") == [["mole", False]]
        assert ends == []
        assert caplog.text.count("cannot be checked") == 1  # not for every try
    wait_until(lambda: "can be checked again" in caplog.text)
    assert client.call("who") == [["mole", False]]
    User.objects.update(is_active=False)
    assert is_closed(client)


@quiet
def test_word_that_comes_while_the_database_is_down_is_kept(
    site: Site, users: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identities, "_RETRY", UNIT)
    user = users()
    client = connect(site, log_in(user))
    counters = site.dispatcher.hub.counters
    with monkeypatch.context() as broken:
        broken.setitem(connections.databases["default"], "NAME", "/nowhere/at-all")
        deactivate(user)
        wait_until(lambda: counters["failed: checks of logins"] > 1)
        assert client.fence() == []
    assert is_closed(client)


@quiet
def test_a_handshake_while_the_database_is_down(
    site: Site, users: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = cookie(log_in(users()))
    with monkeypatch.context() as broken:
        broken.setitem(connections.databases["default"], "NAME", "/nowhere/at-all")
        assert site.connect().fence() == []  # nobody in particular needs no database
        with pytest.raises(clients.HandshakeFailed) as failed:
            site.connect(headers=headers)
        assert failed.value.status == 503
        assert b"nowhere" not in failed.value.body
    assert site.connect(headers=headers).fence() == []


@often
def test_one_user_that_cannot_be_checked_spares_the_others_nothing(
    site: Site, users: Any, caplog: pytest.LogCaptureFixture
) -> None:
    mole, rat = users("mole"), users("rat")
    odd, client = connect(site, log_in(mole)), connect(site, log_in(rat))
    with override_settings(AUTHENTICATION_BACKENDS=[f"{__name__}.Strange"]):
        (connection,) = runtime.get_dispatcher().identities.of_user(str(mole.pk))  # type: ignore[union-attr]
        connection.request.session["_auth_user_backend"] = f"{__name__}.Strange"
        User.objects.update(is_active=False)
        assert is_closed(client)
        wait_until(lambda: "strange" in caplog.text)
        assert odd.fence() == []


class Strange:
    def user_can_authenticate(self, user: Any) -> bool:
        raise ValueError("strange")


@quiet
def test_the_questions_are_spread_over_the_interval(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each user is asked about once in it, however many came at once."""
    names = {f"user{number}" for number in range(200)}
    process = runtime._get_process()
    crowd = Identities(process.hub, process.cluster, 20 * UNIT)
    rounds: list[set[str]] = []
    monkeypatch.setattr(crowd, "_check", lambda users: rounds.append(users) or True)
    for name in names:
        visitor: Any = Mock(identity=None)
        visitor.session.reason = None
        visitor.request = SimpleNamespace(user=Mock(pk=name, is_authenticated=True))
        crowd.add(visitor)
    crowd.start()
    try:
        wait_until(lambda: sum(map(len, rounds)) >= 2 * len(names))
    finally:
        crowd.stop()
    seen = [name for users in rounds for name in users]
    assert set(seen[:200]) == set(seen[200:400]) == names
    assert len(rounds) > 10 and max(map(len, rounds)) < 50


@quiet
def test_many_users_are_asked_about_in_batches(site: Site, users: Any) -> None:
    everybody = [users(f"mole{number}") for number in range(8)]
    crowd = [connect(site, log_in(user)) for user in everybody]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identities, "_BATCH", 3)
        User.objects.filter(pk__in=[user.pk for user in everybody[:7]]).update(is_active=False)
        with transaction.atomic():
            for user in User.objects.all():
                user.save()
        assert all(map(is_closed, crowd[:7]))
        assert crowd[7].fence() == []


# When the carrier is down


@quiet
def test_nothing_is_raised_into_the_project(
    site: Site, users: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise BackendError("gone")

    user = users()
    browser = log_in(user)
    client = connect(site, browser)
    cluster = runtime.get_cluster()
    with monkeypatch.context() as broken:
        broken.setattr(cluster, "_alone", False)
        broken.setattr(cluster._hub, "publish", fail)
        browser.logout()
        user.save()
    assert cluster.counters["failed: word of ended logins"] == 2
    assert "the backend is down: gone" in caplog.text
    assert is_closed(client)  # for it is of this very process


def test_nor_when_the_backend_is_misconfigured(
    users: Any, caplog: pytest.LogCaptureFixture
) -> None:
    user = users()
    runtime.stop()
    with override_settings(SOCKETIO_BACKEND="nowhere.Backend"):
        user.save()
        user.delete()
    assert "Nobody was told" in caplog.text


def test_clearing_sessions_loads_none(users: Any) -> None:
    for number in range(3):
        log_in(users(f"mole{number}"))
    with CaptureQueriesContext(connections["default"]) as queries:
        Session.objects.filter(expire_date__gt=timezone.now()).delete()
    assert [query["sql"][:6] for query in queries] == ["BEGIN", "DELETE", "COMMIT"]


# Who is known


@quiet
def test_nothing_is_kept_of_who_has_gone(site: Site, users: Any) -> None:
    user, others = users(), [Browser(), log_in(users("rat"))]
    everybody = [connect(site, log_in(user)) for _ in range(3)]
    everybody += [connect(site, others[1], "polling"), site.connect()]
    assert known(site) == 2 + 4
    for client in everybody:
        client.close()
    wait_until(lambda: known(site) == 0)


def test_a_stranger_costs_nothing() -> None:
    request = RequestFactory().get("/")
    SessionMiddleware(HttpResponse).process_request(request)
    AuthenticationMiddleware(HttpResponse).process_request(request)
    assert identify(request) is None
    assert not hasattr(request, "_cached_user")  # it was not even asked for
    assert not request.user.is_authenticated
    assert identify(request) is None


class Tokens:
    """Middleware that knows users by other means than a session, when somebody looks."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        name = request.headers.get("Authorization")
        request.user = SimpleLazyObject(lambda: User.objects.get(username=name))
        return self.get_response(request)


def test_a_user_of_a_middleware_of_its_own(users: Any) -> None:
    user = users()
    with Site(SOCKETIO_REAUTH_INTERVAL=NEVER, MIDDLEWARE=[f"{__name__}.Tokens"]) as site:
        client = site.connect(headers={"Authorization": "mole"})
        assert len(site.dispatcher.identities.of_user(str(user.pk))) == 1
        deactivate(user)
        assert is_closed(client)


def test_a_project_without_accounts() -> None:
    apps = ["django.contrib.staticfiles", "django_socketio"]
    with override_settings(MIDDLEWARE=[], INSTALLED_APPS=apps):
        accounts.watch()
        with Site(ROOT_URLCONF="django_socketio.urls") as site:
            client = site.connect(headers={"Cookie": "sessionid=x"})
            assert client.fence() == []
            assert known(site) == 0
            polling = site.open("polling", headers={"Cookie": "sessionid=x"})
            target = f"{PATH}?EIO=4&transport=polling&sid={polling.sid}"
            assert clients.request(site.address, "POST", target, {}, b"3").status == 200
            with pytest.raises(NoSocket):
                django_socketio.disconnect(user=5)


# Whose session it is


KINDS = ("poll", "post", "upgrade")


def follow(site: Site, sid: str, kind: str, cookies: str | None) -> clients.Answer:
    """Make a request for a session with these cookies."""
    transport = "websocket" if kind == "upgrade" else "polling"
    headers = [*(UPGRADE if kind == "upgrade" else ()), *([("Cookie", cookies)] if cookies else ())]
    target = f"{PATH}?EIO=4&transport={transport}&sid={sid}"
    method, body = ("POST", b"3") if kind == "post" else ("GET", b"")
    return clients.request(site.address, method, target, headers, body)


def served(site: Site, sid: str, kind: str, cookies: str | None) -> bool:
    if kind == "poll":
        session = site.dispatcher.engine.sessions[sid]
        session.send(Frame.message(b'2["so that a poll ends"]'))
    answer = follow(site, sid, kind, cookies)
    assert answer.status in (200, 101, 403), answer
    if answer.status == 403:
        assert b"another login" in answer.body
    return answer.status != 403


@pytest.mark.parametrize("front", [Site, GunicornSite], ids=["one process", "gunicorn"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_transport_of_another_login_is_refused(
    front: type[Site], kind: str, users: Any, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    mole = users("mole")
    mine, again, other = log_in(mole), log_in(mole), log_in(users("rat"))
    with front(SOCKETIO_REAUTH_INTERVAL=NEVER) as site:
        client = site.connect(transport="polling", headers=cookie(mine))
        sid = client.connection.sid
        assert not served(site, sid, kind, cookie(other)["Cookie"])
        assert not served(site, sid, kind, None)
        assert not served(site, sid, kind, "sessionid=nonsense")
        assert not served(site, sid, kind, cookie(mine)["Cookie"] + "; sessionid=x")
        # Another session of the same user is another, unless the cookie holds nothing but the user.
        assert served(site, sid, kind, cookie(again)["Cookie"]) == (store == "signed_cookies")
        assert site.dispatcher.engine.counters["refused: another login"] >= 4
        assert f"session {sid} has another sessionid cookie" in caplog.text
        assert key_of(other) not in caplog.text
        assert client.call("fence") == []  # and the session is none the worse for it
        assert served(site, sid, kind, f"theme=dark; {cookie(mine)['Cookie']}; x=y")


@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_a_stranger_does_not_become_somebody(site: Site, users: Any, kind: str) -> None:
    sid = site.open("polling").sid
    assert not served(site, sid, kind, cookie(log_in(users()))["Cookie"])
    assert served(site, sid, kind, "theme=dark")
    assert served(site, sid, kind, None)


class Visits:
    """Middleware that counts in the session, so that the answer to the handshake sets a cookie."""

    def __init__(self, get_response: Any) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        request.session["visits"] = request.session.get("visits", 0) + 1
        return self.get_response(request)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cookie_that_the_handshake_itself_has_set(kind: str, users: Any, store: str) -> None:
    middleware = [*django_settings.MIDDLEWARE, f"{__name__}.Visits"]
    with Site(SOCKETIO_REAUTH_INTERVAL=NEVER, MIDDLEWARE=middleware) as site:
        for headers in ({}, cookie(log_in(users())), {"Cookie": "sessionid=stale"}):
            polling = site.open("polling", headers=headers)
            (answer,) = (v for k, v in polling.transport.answer if k == "Set-Cookie")
            given = answer.partition(";")[0]
            assert served(site, polling.sid, kind, given)
            assert served(site, polling.sid, kind, headers.get("Cookie"))
        assert not served(site, polling.sid, kind, cookie(log_in(users("rat")))["Cookie"])


@quiet
@pytest.mark.parametrize("kind", KINDS)
def test_a_stale_cookie_that_the_handshake_has_deleted(site: Site, kind: str) -> None:
    polling = site.open("polling", headers={"Cookie": "sessionid=stale"})
    assert served(site, polling.sid, kind, None)
    assert served(site, polling.sid, kind, "sessionid=stale")


# disconnect(user=)


@quiet
def test_a_user_is_disconnected_everywhere(site: Site, users: Any, ends: list[Any]) -> None:
    site.namespace("/chat")
    mole, rat = users("mole"), users("rat")
    gone = [connect(site, log_in(mole)), connect(site, log_in(mole), "polling")]
    chats = gone[0].connection.connect("/chat")
    stays = connect(site, log_in(rat))
    django_socketio.disconnect(user=mole)
    for client in gone:
        client.disconnected()
    assert chats.fence() == [] and stays.fence() == []
    assert ends == [("mole", "server namespace disconnect")] * 2
    django_socketio.disconnect(user=mole.pk, namespace="/chat")
    chats.disconnected()
    for name in ({"user": mole}, {"user": mole.pk}, {"user": rat, "namespace": "/chat"}):
        with pytest.raises(NoSocket):
            django_socketio.disconnect(**name)
    with pytest.raises(ValueError):
        django_socketio.disconnect()
    with pytest.raises(ValueError):
        django_socketio.disconnect("sid", user=mole)


# revalidate()


@pytest.fixture
def guarded(site: Site) -> list[Any]:
    """Return what the handlers of channels hear; those named `staff` are for members of it."""
    heard: list[Any] = []

    @on_subscribe(channel="^staff")
    def may(request: Any, socket: Any, context: Any, channel: str) -> None:
        heard.append(("asked", channel, channel in socket.channels))
        if not request.user.is_staff:
            raise PermissionDenied("staff only")

    @on_unsubscribe
    def left(request: Any, socket: Any, context: Any, channel: str) -> None:
        heard.append(("left", channel))

    return heard


@quiet
def test_permissions_are_asked_for_again(site: Site, users: Any, guarded: list[Any]) -> None:
    user = users(is_staff=True)
    client, stranger = connect(site, log_in(user)), site.connect()
    for channel in ("staff-1", "staff-2", "hall"):
        assert client.subscribe(channel) == {"ok": True}
    stranger.subscribe("hall")
    guarded.clear()
    assert django_socketio.revalidate("staff-1") == 1
    assert client.fence() == []
    assert guarded == [("asked", "staff-1", True)]
    user.is_staff = False
    user.save()
    wait_until(lambda: site.dispatcher.hub.counters["checked logins"])
    guarded.clear()
    assert django_socketio.revalidate("staff-1") == 1
    assert client.event() == ["__unsubscribe__", "staff-1", "staff only"]
    assert client.fence() == []
    assert guarded == [("asked", "staff-1", True), ("left", "staff-1")]
    assert django_socketio.members("staff-1") == set()
    assert django_socketio.revalidate() == 2
    assert client.event() == ["__unsubscribe__", "staff-2", "staff only"]
    assert client.fence() == stranger.fence() == []
    assert django_socketio.members("hall") == {client.sid, stranger.sid}
    assert site.dispatcher.engine.counters["unsubscribed: permission revoked"] == 2
    assert django_socketio.revalidate("staff-1") == django_socketio.revalidate("nowhere") == 0
    with pytest.raises(ValueError):
        django_socketio.revalidate("")


@quiet
def test_a_handler_that_fails_to_decide_has_not_let_stay(site: Site, guarded: list[Any]) -> None:
    @on_subscribe(channel="^shaky")
    def shaky(request: Any, socket: Any, context: Any, channel: str) -> None:
        if channel in socket.channels:
            raise ValueError("secret")

    client = site.connect()
    client.subscribe("shaky")
    django_socketio.revalidate("shaky")
    assert client.event() == ["__unsubscribe__", "shaky", "The server could not decide"]


@quiet
def test_it_is_in_order_with_the_events_of_the_client(site: Site) -> None:
    allowed, heard = [True], []

    @on_subscribe
    def may(request: Any, socket: Any, context: Any, channel: str) -> bool:
        return allowed[0]

    @on_event("slow")
    def slow(request: Any, socket: Any, context: Any) -> None:
        gevent.sleep(4 * UNIT)
        heard.append(socket.channels)

    client = site.connect()
    client.subscribe("room")
    client.emit("slow")
    client.emit("slow")
    (connection,) = site.dispatcher.connections
    wait_until(lambda: connection._inbox)  # the second waits for the first
    allowed[0] = False
    django_socketio.revalidate("room")
    assert client.subscribe("room") == {"ok": False, "error": "Permission denied"}
    assert heard == [["room"], ["room"]]
    assert client.event() == ["__unsubscribe__", "room", "Permission denied"]


@quiet
def test_a_socket_asks_for_itself(site: Site, guarded: list[Any]) -> None:
    @on_event("again")
    def again(request: Any, socket: Any, context: Any) -> None:
        socket.revalidate()
        socket.revalidate("hall")
        guarded.append("after the handler")

    @on_subscribe(channel="hall")
    def hall(request: Any, socket: Any, context: Any, channel: str) -> None:
        guarded.append("hall")

    client = site.connect()
    client.subscribe("hall")
    client.subscribe("room")
    client.emit("again")
    assert client.fence() == []
    assert guarded == ["hall", "after the handler", "hall", "hall"]


@quiet
def test_one_that_ends_meanwhile_hears_of_it_once(site: Site, guarded: list[Any]) -> None:
    gate = gevent.event.Event()

    @on_subscribe(channel="^gate")
    def wait(request: Any, socket: Any, context: Any, channel: str) -> None:
        if channel in socket.channels:
            gate.wait()
            raise PermissionDenied

    client = site.connect()
    client.subscribe("gate")
    django_socketio.revalidate("gate")
    wait_until(lambda: site.dispatcher.runners.busy)
    client.close()
    wait_until(lambda: not site.dispatcher.engine.sessions)
    gate.set()
    wait_until(lambda: not site.dispatcher.connections)
    assert guarded == [("left", "gate")]
