"""
The processes that serve sockets: who is there, and questions to all of them.

Each such process is a node. It subscribes to a topic that all nodes share and to one of its own,
and publishes a beat on the first, which it must hear itself: a node that does not is deaf, whatever
its connection says. Who asks publishes a request on the shared topic, and needs an answer of every
node that is alive: of those that it has heard, that a node lists in its answer, or that the carrier
counted. A node that keeps silent is asked alone; the carrier knows at once of one that is dead, and
for one that hangs nobody waits longer than its beats count for.
"""

import itertools
import logging
import re
import threading
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from os import urandom
from time import monotonic, sleep
from typing import Any, NamedTuple

import gevent

from . import envelope
from .backends import BackendError
from .envelope import Envelope
from .hub import Hub
from .protocol import json
from .protocol.exceptions import ProtocolError

logger = logging.getLogger(__name__)

NODE_LENGTH = 8
"""Characters of a node's name."""

BEAT = 1.0
"""Seconds between two beats of a node."""

SILENCE = 3.5
"""Seconds without a beat after which a node counts as dead, or itself as deaf."""

_GRACE = 2.5
"""Beats for which a message may be missing before it is lost: one may say that it never left."""

_PATIENCE = 0.1
"""Seconds that an answer may take before its node is asked alone."""

_AGAIN = 0.5
"""Seconds after which a node that was asked alone is asked again."""

_READY = 1.0
"""Seconds that a question waits for a node that has only just started to listen."""

_MAX_REQUESTS = 2000
"""Requests of one name that are answered at once, unless `limits` says more; others are dropped."""

ALL = "n"
"""The topic of all nodes."""

_NODE = re.compile(rf"[A-Za-z0-9_-]{{{NODE_LENGTH}}}")


def topic_of(node: str) -> str:
    return f"n{node}"


def new_node() -> str:
    """Return a name that no other process has, of characters that fit a URL."""
    return urlsafe_b64encode(urandom(6)).decode()


class Answer(NamedTuple):
    """
    What one node says: `value` for JSON, and bytes that go with it.

    `undelivered` is called, on the node, if whoever asked is gone meanwhile.
    """

    value: Any
    attachments: tuple[bytes, ...] = ()
    undelivered: Callable[[], None] | None = None


Answerer = Callable[..., Answer]
"""
Answer a request: called with its arguments and `attachments=`, in a greenlet of its own.

If it raises, whoever asked is told that this node cannot answer.
"""


class _Question:
    """
    What has come in for one request. Written by the listener, read by who waits.

    Only `answerer` may answer, if that is not None.
    """

    def __init__(self, answerer: str | None = None) -> None:
        self.changed = threading.Event()
        self.known: set[str] = set()  # the nodes that those who answered have heard
        self.settled = False  # one of them must have heard all
        self.answers: dict[str, Answer | None] = {}  # None: it could not
        self._answerer = answerer

    def answered(
        self, node: str, others: Sequence[str], settled: bool, answer: Answer | None
    ) -> bool:
        """Take an answer; return False if it is nobody's who was asked."""
        if self._answerer not in (None, node):
            return False
        self.known.update(others)
        self.settled = self.settled or settled
        if self.answers.get(node) is None:
            self.answers[node] = answer  # last: whoever sees it sees the rest
        self.changed.set()
        return True


class Cluster:
    """
    This process among the others. Only one that serves sockets is a node; any other may ask.

    `topic` and `node` are its own: requests and answers for this process alone come by it.

    Questions may be asked in any thread; all else belongs to the thread of the hub.
    """

    def __init__(self, hub: Hub, *, beat: float = BEAT, silence: float = SILENCE) -> None:
        self.node = new_node()
        self.topic = topic_of(self.node)
        self.answerers: dict[str, Answerer] = {
            "members": self._members,
            "count": self._count,
            "channels": self._channels,
            "subscribe": self._subscribe,
            "unsubscribe": self._unsubscribe,
            "revalidate": self._revalidate,
        }
        self.limits: dict[str, int] = {}
        self.counters = hub.counters
        self._hub = hub
        self._beat = beat
        self._silence = silence
        self._alone = not hub.backend.crosses_processes
        self._listens = False
        self._starter: dict[str, object] = {}
        self._started = False
        self._questions: dict[str, _Question] = {}
        self._numbers = map(str, itertools.count(1))
        self._busy: Counter[str] = Counter()
        self._others: dict[str, float] = {}  # node: when it was last heard
        self._leaving: set[str] = set()  # those of them that let nobody in any more
        self._state = "alive"
        self._beats = 0
        self._hearing_since = 0.0  # from when on there is no excuse for hearing nothing
        self._settles_with = 0  # the beat whose echo comes when all others must have been heard
        self._echoed = 0  # the last beat that has come back
        self._heard_myself = 0.0
        self._restarting = False
        self._outage: float | None = None
        self._heart: gevent.Greenlet[..., Any] | None = None
        self._stopped = False
        hub.correspond = self._received
        if not self._alone:
            hub.number(self.node, grace=_GRACE * beat)

    # A node's life

    def start(self) -> None:
        """Be a node: begin to beat, and to answer."""
        self._listens = False  # it may have asked before, when it was none
        self._heart = gevent.spawn(self._live)

    def stop(self) -> None:
        """Tell the others that this node is gone, and those who wait for answers not to."""
        self._stopped = True
        for question in list(self._questions.values()):
            question.changed.set()
        if self._heart is None:
            return
        self._heart.kill(timeout=_READY)  # or a beat might follow the good-bye
        self._heart = None
        if self._listens and self._outage is None:
            self._say("gone", 0)

    def retire(self) -> None:
        """Tell the others that this node lets nobody in any more, now and with each beat."""
        self._state = "leaving"
        if self._heart is not None and self._listens and self._outage is None:
            gevent.spawn(self._say, self._state, self._beats)

    def _say(self, state: str, number: int) -> None:
        try:
            self._beat_once(state, number)
        except BackendError as error:
            logger.info("Could not tell the other nodes that this one is %s: %s", state, error)

    @property
    def silent_for(self) -> float | None:
        """Seconds since this node has heard itself, or None before the first time."""
        return monotonic() - self._heard_myself if self._heard_myself else None

    @property
    def deaf(self) -> bool:
        """Tell whether what is published does not reach this node."""
        silent = self.silent_for
        return silent is None or silent > self._silence or self._restarting

    def nodes(self) -> set[str]:
        """Return the nodes that this one believes alive, itself included."""
        nodes = {node for node, heard in list(self._others.items()) if not self._is_lost(heard)}
        return nodes | {self.node} if self._heart is not None else nodes

    def is_alive(self, node: str) -> bool:
        """Tell whether a node may be alive: it beats, or this one cannot have heard it yet."""
        return not self._settled or node in self.nodes()

    def staying(self) -> set[str]:
        """Return the others that are alive and have not said that they will be gone."""
        return self.nodes() - self._leaving - {self.node}

    def _is_lost(self, heard: float) -> bool:
        # Time in which this node does not hear itself says nothing about others.
        return heard < self._heard_myself - self._silence

    @property
    def _settled(self) -> bool:
        """Tell whether this node must have heard every other by now."""
        hears = self._heart is not None and self._listens
        return hears and self._echoed >= self._settles_with

    def _live(self) -> None:
        while True:
            try:
                self._pulse()
            except BackendError as error:
                if self._outage is None:
                    self._outage = monotonic()
                    self.counters["outages"] += 1
                    logger.error("The backend is down: %s", error)
            except Exception:
                logger.exception("The heartbeat failed")
            self._forget_the_lost()
            self._hub.look_for_gaps()
            self._sleep(self._beat if self._outage is None else self._beat / 4)

    def _sleep(self, seconds: float) -> None:
        due = monotonic() + seconds
        gevent.sleep(seconds)
        if monotonic() > due + self._beat:
            self._begin_to_hear()  # this process stood still; what has come is not read yet

    def _pulse(self) -> None:
        """Beat once, and see to it that the beat comes back."""
        if not self._listens:
            self._hub.keep([ALL, self.topic])
            self._begin_to_hear()
            self._listens = True
        elif self._restarting or (self._outage is None and self._hears_nothing()):
            self._restart()
        self._beats += 1
        self._beat_once(self._state, self._beats)
        if self._outage is not None:
            logger.warning("The backend is back after %.1f s", monotonic() - self._outage)
            self._outage = None
            self._begin_to_hear()

    def _beat_once(self, state: str, number: int) -> None:
        tails = self._hub.tails() if self._outage is None else []  # which may not go out
        body = [self.node, state, number, tails]
        self._hub.publish(ALL, _letter(envelope.BEAT, body))

    def _begin_to_hear(self) -> None:
        """Count anew from when on whoever is silent is lost, or this node deaf."""
        self._hearing_since = monotonic()
        self._settles_with = self._beats + 3
        self._others.update(dict.fromkeys(self._others, self._hearing_since))

    def _hears_nothing(self) -> bool:
        return monotonic() - max(self._heard_myself, self._hearing_since) > self._silence

    def _restart(self) -> None:
        """Start the backend anew: it takes what we publish, and we do not hear it."""
        if not self._restarting:
            self._restarting = True  # until all topics are confirmed
            self.counters["restarts of a deaf backend"] += 1
            logger.error("This node does not hear its own beats: the backend is started anew")
        self._hub.restart_backend()
        self._restarting = False
        self._hub.interrupted(self.silent_for or 0.0)
        self._begin_to_hear()

    def _forget_the_lost(self) -> None:
        self._leaving.intersection_update(self._others)
        for node, heard in list(self._others.items()):
            if self._is_lost(heard):
                del self._others[node]
                self.counters["nodes lost"] += 1
                logger.warning("Node %s has not been heard for %.1f seconds", node, self._silence)

    # Questions

    def ask_all(self, name: str, *args: Any, timeout: float = 3.0) -> list[Any]:
        """
        Return the answers of all nodes to a request, in no order; an empty list if there is none.

        Raise `BackendError` if the carrier is down, or takes the request and brings no answer. A
        node that is alive and does not answer in `timeout` seconds is left out, counted and logged.
        """
        mine = [self._answer(name, args, ()).value] if self._heart is not None else []
        if self._alone:
            return mine
        self._listen()
        with _Pending(self) as (number, question):
            letter = self._request(number, name, args)
            self._publish_to_all(question, name, letter, monotonic() + timeout)
            answers = list(question.answers.values())
        failed = answers.count(None)
        if failed:
            self.counters["nodes that did not answer"] += failed
            logger.warning("%d nodes could not answer %r", failed, name)
        return mine + [answer.value for answer in answers if answer is not None]

    def _publish_to_all(
        self, question: _Question, name: str, letter: Envelope, deadline: float
    ) -> None:
        """Publish a request, and wait until every node has answered or is gone."""
        counted = self._hub.publish(ALL, letter)
        impatient = again = monotonic() + _PATIENCE
        gone = {self.node}
        while not self._stopped:
            question.changed.clear()
            now = monotonic()
            missing = question.known.union(self.nodes()).difference(gone, question.answers)
            if self._is_complete(question, counted, missing, patient=now < impatient):
                return
            if now > deadline:
                self._note_silence(question, name, counted, missing)
                return
            if now < again:
                question.changed.wait(min(again, deadline) - now + 0.001)
                continue
            again = now + _AGAIN
            gone |= {node for node in missing if not self._reaches(node, letter)}
            if not missing:  # nobody can say yet whether there are more
                counted = self._hub.publish(ALL, letter)
        raise BackendError("this process is stopping")

    def _is_complete(
        self, question: _Question, counted: int, missing: set[str], *, patient: bool
    ) -> bool:
        """Tell whether all nodes have answered that can."""
        if counted == 0:
            return True
        if counted > 1:  # the carrier does count; one may stand for somebody
            others = counted - (self._heart is not None)
            if len(question.answers) >= others:
                return True
            if patient:
                return False  # it counts one that hangs, or that nobody has heard yet
        return not missing and (self._settled or question.settled)

    def _note_silence(
        self, question: _Question, name: str, counted: int, missing: set[str]
    ) -> None:
        deaf = self.deaf if self._heart is not None else counted > 0 and not question.answers
        if deaf:
            raise BackendError(f"the backend brings no answers to {name!r}")
        if missing:
            self.counters["nodes that did not answer"] += len(missing)
            logger.warning("No answer to %r from the nodes %s", name, ", ".join(sorted(missing)))

    def _reaches(self, node: str, letter: Envelope) -> bool:
        """Ask a node alone; return False if the carrier or its silence says that it is dead."""
        if not self.is_alive(node):
            return False
        if self._hub.publish(topic_of(node), letter) == 0:
            self._others.pop(node, None)
            return False
        return True

    def ask_one(
        self,
        topic: str,
        name: str,
        *args: Any,
        attachments: tuple[bytes, ...] = (),
        timeout: float,
        still: Callable[[], bool] = lambda: True,
        again: float | None = None,
    ) -> Answer | None:
        """
        Return the answer of whoever is subscribed to `topic`; None if nobody is.

        Raise `BackendError` if the carrier is down, or whoever should answer cannot, or does not in
        `timeout` seconds, or before `still()` turns false. With `again`, a number of seconds, the
        request is repeated that often, so that the end of who should answer is noticed; it must not
        matter how often it is answered.
        """
        self._listen()
        with _Pending(self, topic.removeprefix(ALL) if topic[0] == ALL else None) as pending:
            number, question = pending
            letter = self._request(number, name, args, attachments)
            deadline = monotonic() + timeout
            if self._hub.publish(topic, letter) == 0:
                return None
            while not question.answers:
                now = monotonic()
                if now > deadline or self._stopped or not still():
                    raise BackendError(f"no answer to {name!r}")
                pause = self._beat if again is None else again
                question.changed.wait(min(pause, deadline - now + 0.001))
                if again is not None and not question.answers:
                    if self._hub.publish(topic, letter) == 0:
                        return None
            answer = list(question.answers.values())[0]
        if answer is None:
            raise BackendError(f"the process that was to answer {name!r} could not")
        return answer

    def tell(self, topic: str, name: str, *args: Any) -> int:
        """Publish a request that nobody answers; return how many processes it goes to."""
        return self._hub.publish(topic, self._request("", name, args))

    def tell_all(self, name: str, *args: Any) -> None:
        """Have every node act on a request that nobody answers, this one whatever the carrier."""
        letter = self._request("", name, args)
        if self._heart is not None:
            self._hub.deliver(self.topic, envelope.encode(letter))
        if not self._alone:
            self._hub.publish(ALL, letter)

    def _listen(self) -> None:
        """Hear answers. In a process without sockets this starts the backend."""
        if self._listens:
            return
        if self._heart is not None:
            self._wait_for(lambda: self._listens)
            return
        self._start_backend()
        self._hub.keep([self.topic])
        self._listens = True

    def _start_backend(self) -> None:
        """Start it once, whichever thread comes first."""
        me = object()
        if self._starter.setdefault("is", me) is me:
            try:
                self._hub.backend.start(self._hub.deliver)
            except BaseException:
                self._starter.clear()
                raise
            self._started = True
        self._wait_for(lambda: self._started)

    @staticmethod
    def _wait_for(condition: Callable[[], bool]) -> None:
        # Locks and events of gevent are not for threads that it has not made.
        until = monotonic() + _READY
        while not condition():
            if monotonic() > until:
                raise BackendError("the backend has not been reached yet")
            sleep(_READY / 100)

    def _request(
        self, number: str, name: str, args: Sequence[Any], attachments: tuple[bytes, ...] = ()
    ) -> Envelope:
        return _letter(envelope.REQUEST, [number, self.node, name, args], attachments)

    # What comes by the carrier: on the hub, or where there is none in the backend's listener

    def _received(self, topic: str, letter: Envelope) -> None:
        try:
            body = json.loads(letter.packets[0])
        except ProtocolError as error:
            self._drop(topic, str(error))
            return
        match letter.kind, body:
            case envelope.BEAT, [node, str(state), int(number), list(tails)] if _are_nodes(node):
                self._beat_received(node, state, number)
                self._hub.told(node, tails)
            case envelope.REQUEST, [str(number), node, str(name), list(args)] if _are_nodes(node):
                if node != self.node or topic != ALL:
                    self._request_received(number, node, name, args, letter.packets[1:])
            case envelope.REPLY, [str(number), node, list(others), bool(settled), bool(can), value]:
                answer = Answer(value, letter.packets[1:]) if can else None
                question = self._questions.get(number)
                if not _are_nodes(node, *others):
                    self._drop(topic, "no names of nodes")
                elif question is None or not question.answered(node, others, settled, answer):
                    self.counters["dropped: answer to no question"] += 1
            case _:
                self._drop(topic, "of no known shape")

    def _drop(self, topic: str, problem: str) -> None:
        self.counters["dropped: invalid envelope"] += 1
        logger.warning("Dropped a payload on topic %r: %s", topic, problem)

    def _beat_received(self, node: str, state: str, number: int) -> None:
        if node == self.node:
            self._heard_myself, self._echoed = monotonic(), number
        elif state == "gone":
            self._others.pop(node, None)
            self._leaving.discard(node)
        else:
            self._others[node] = monotonic()
            if state == "leaving":
                self._leaving.add(node)

    def _request_received(
        self, number: str, node: str, name: str, args: list[Any], attachments: tuple[bytes, ...]
    ) -> None:
        limit = self.limits.get(name, _MAX_REQUESTS)
        if self._heart is None or name not in self.answerers:
            self.counters["dropped: unknown request"] += 1
        elif self._busy[name] >= limit:
            self.counters["dropped: too many requests"] += 1
        else:
            self._busy[name] += 1
            if self._busy[name] == limit:
                logger.warning("%d requests for %r are open; more are dropped", limit, name)
            gevent.spawn(self._reply, number, node, name, args, attachments)

    def _reply(
        self, number: str, node: str, name: str, args: list[Any], attachments: tuple[bytes, ...]
    ) -> None:
        try:
            answer = self._try_to_answer(node, name, args, attachments)
            if number and not self._publish_answer(number, node, answer):
                if answer is not None and answer.undelivered is not None:
                    answer.undelivered()
        finally:
            self._busy[name] -= 1

    def _try_to_answer(
        self, node: str, name: str, args: list[Any], attachments: tuple[bytes, ...]
    ) -> Answer | None:
        try:
            return self._answer(name, args, attachments)
        except BackendError as error:
            logger.info("Could not answer %r of node %s: %s", name, node, error)
        except Exception:
            logger.exception("Could not answer %r of node %s", name, node)
        self.counters["requests that failed"] += 1
        return None

    def _publish_answer(self, number: str, node: str, answer: Answer | None) -> bool:
        value, attachments = answer[:2] if answer is not None else (None, ())
        body = [number, self.node, sorted(self.nodes()), self._settled, answer is not None, value]
        try:
            return (
                self._hub.publish(topic_of(node), _letter(envelope.REPLY, body, attachments)) != 0
            )
        except BackendError as error:
            logger.info("Could not answer node %s: %s", node, error)
            return False

    # The answers of this node

    def _members(self, topic: str, attachments: Any) -> Answer:
        return Answer(list(self._hub.members(topic)))

    def _count(self, topic: str, attachments: Any) -> Answer:
        return Answer(self._hub.count(topic))

    def _channels(self, namespace: str, attachments: Any) -> Answer:
        return Answer(self._hub.channels(namespace))

    def _subscribe(self, topic: str, channel: str, attachments: Any) -> Answer:
        """Subscribe the members of a session's topic, of which there is one, to a channel."""
        for member in self._hub.members(topic).values():
            try:
                member.subscribe(channel)
            except ValueError as error:  # it is in as many as it may be
                return Answer(str(error))
        return Answer(self._hub.count(topic) > 0)  # it may have ended meanwhile

    def _unsubscribe(self, topic: str, channel: str, attachments: Any) -> Answer:
        members = self._hub.members(topic).values()
        for member in members:
            member.unsubscribe(channel)
        return Answer(bool(members))

    def _revalidate(self, topic: str, channel: str | None, attachments: Any) -> Answer:
        members = self._hub.members(topic).values()
        for member in members:
            self._hub.at_home(member.revalidate, channel)
        return Answer(len(members))

    def _answer(self, name: str, args: Sequence[Any], attachments: tuple[bytes, ...]) -> Answer:
        return self.answerers[name](*args, attachments=attachments)


class _Pending:
    """A question while somebody waits for it."""

    def __init__(self, cluster: Cluster, answerer: str | None = None) -> None:
        self._cluster = cluster
        self._question = _Question(answerer)

    def __enter__(self) -> tuple[str, _Question]:
        self._number = next(self._cluster._numbers)
        self._cluster._questions[self._number] = self._question
        return self._number, self._question

    def __exit__(self, *exc_info: object) -> None:
        del self._cluster._questions[self._number]


def _letter(kind: int, body: Any, attachments: tuple[bytes, ...] = ()) -> Envelope:
    return Envelope(kind, (json.dumps(body), *attachments))


def _are_nodes(*values: Any) -> bool:
    return all(isinstance(value, str) and _NODE.fullmatch(value) for value in values)
