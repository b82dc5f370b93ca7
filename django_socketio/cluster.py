"""
The processes that serve sockets: who is there, and questions to all of them.

Each such process is a node. It subscribes to a topic that all nodes share and to one of its own,
and publishes a beat on the first, which it must hear itself: a node that does not is deaf, whatever
its connection says. Who asks publishes a request on the shared topic, and needs an answer of every
node that is alive: of those that a node lists in its answer, or that the carrier counted. A node
that keeps silent is asked alone; the carrier knows at once of one that is dead, and for one that
hangs nobody waits longer than its beats count for.
"""

import itertools
import logging
import threading
from base64 import urlsafe_b64encode
from collections.abc import Callable, Sequence
from os import urandom
from time import monotonic
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

_PATIENCE = 0.1
"""Seconds that an answer may take before its node is asked alone."""

_READY = 1.0
"""Seconds that a question waits for a node that has only just started to listen."""

_MAX_REQUESTS = 2000
"""Requests of others that are being answered at once; more are dropped."""

ALL = "n"
"""The topic of all nodes."""


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

Whatever it raises, nobody answers.
"""


class _Question:
    """What has come in for one request. Written by the listener, read by who waits."""

    def __init__(self) -> None:
        self.changed = threading.Event()
        self.answers: dict[str, Answer] = {}
        self.expected: set[str] = set()
        self.settled = False

    def answered(self, node: str, others: Sequence[str], settled: bool, answer: Answer) -> None:
        self.answers[node] = answer
        self.expected.update(others)
        self.settled = self.settled or settled
        self.changed.set()

    @property
    def missing(self) -> set[str]:
        return self.expected - self.answers.keys()

    def is_complete(self, receivers: int, *, patience_ended: bool) -> bool:
        """Tell whether no other node can be there, as far as the carrier's count says."""
        if 0 <= receivers <= len(self.answers) and (self.settled or receivers > 1):
            return True
        # It counts a process that hangs, or it cannot count.
        return patience_ended and bool(self.answers)


class Cluster:
    """
    This process among the others. Only one that serves sockets is a node; any other may ask.

    `topic` and `node` are its own: requests and answers for this process alone come by it.
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
        }
        self.counters = hub.counters
        self._hub = hub
        self._beat = beat
        self._silence = silence
        self._alone = not hub.backend.crosses_processes
        self._listens = threading.Event()
        self._listening = threading.Lock()
        self._questions: dict[str, _Question] = {}
        self._numbers = map(str, itertools.count(1))
        self._others: dict[str, float] = {}  # node: when it was last heard
        self._hearing_since = 0.0  # from when on there is no excuse for hearing nothing
        self._heard_myself = 0.0
        self._outage: float | None = None
        self._busy = 0
        self._heart: gevent.Greenlet[..., Any] | None = None
        hub.correspond = self._received

    # A node's life

    def start(self) -> None:
        """Be a node: begin to beat, and to answer."""
        self._heart = gevent.spawn(self._live)

    def stop(self) -> None:
        """Tell the others that this node is gone."""
        if self._heart is None:
            return
        self._heart.kill(block=False)
        self._heart = None
        if self._listens.is_set() and self._outage is None:
            try:
                self._hub.publish(ALL, _letter(envelope.BEAT, [self.node, "gone"]))
            except BackendError as error:
                logger.info("Could not say good-bye to the other nodes: %s", error)

    @property
    def silent_for(self) -> float | None:
        """Seconds since this node has heard itself, or None before the first time."""
        return monotonic() - self._heard_myself if self._heard_myself else None

    @property
    def deaf(self) -> bool:
        """Tell whether what is published does not reach this node."""
        return not self._heard_myself or monotonic() - self._heard_myself > self._silence

    def nodes(self) -> set[str]:
        """Return the nodes that this one believes alive, itself included."""
        horizon = monotonic() - self._silence
        for node in [node for node, heard in self._others.items() if heard < horizon]:
            del self._others[node]
            self.counters["nodes lost"] += 1
            logger.warning("Node %s has not been heard for %.1f seconds", node, self._silence)
        return {*self._others, *([self.node] if self._heart is not None else [])}

    def is_alive(self, node: str) -> bool:
        return node in self.nodes()

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
            self.nodes()
            gevent.sleep(self._beat if self._outage is None else self._beat / 4)

    def _pulse(self) -> None:
        """Beat once, and see to it that the beat comes back."""
        if not self._listens.is_set():
            self._hub.keep([ALL, self.topic])
            self._hearing_since = monotonic()
            self._listens.set()
        elif monotonic() - max(self._heard_myself, self._hearing_since) > self._silence:
            # The carrier takes what we publish, and we do not hear it.
            self.counters["restarts of a deaf backend"] += 1
            logger.error("This node does not hear its own beats: the backend is started anew")
            self._hearing_since = monotonic()
            self._hub.restart_backend()
        self._hub.publish(ALL, _letter(envelope.BEAT, [self.node, "alive"]))
        if self._outage is not None:
            logger.warning("The backend is back after %.1f s", monotonic() - self._outage)
            self._outage = None
            self._hearing_since = monotonic()

    # Questions

    def ask_all(self, name: str, *args: Any, timeout: float = 3.0) -> list[Any]:
        """
        Return the answers of all nodes to a request, in no order; an empty list if there is none.

        Raise `BackendError` if the carrier is down. A node that is alive and does not answer in
        `timeout` seconds is left out, counted and logged.
        """
        mine = [self._answer(name, args, ()).value] if self._heart is not None else []
        if self._alone:
            return mine
        self._listen()
        with _Pending(self) as (number, question):
            if self._heart is not None:
                question.expected.update(self.nodes() - {self.node})
                question.settled = self._settled
            letter = self._request(number, name, args)
            receivers = self._hub.publish(ALL, letter) - len(mine)
            self._wait_for_all(question, letter, receivers, monotonic() + timeout)
            return mine + [answer.value for answer in question.answers.values()]

    def _wait_for_all(
        self, question: _Question, letter: Envelope, receivers: int, deadline: float
    ) -> None:
        impatient = monotonic() + _PATIENCE
        gone: set[str] = set()
        while True:
            question.changed.clear()
            now = monotonic()
            missing = question.missing - gone
            if not missing and question.is_complete(receivers, patience_ended=now > impatient):
                return
            if now > deadline:
                self.counters["nodes that did not answer"] += len(missing) or 1
                logger.warning("No answer from the nodes %s", ", ".join(sorted(missing)) or "known")
                return
            if missing and now > impatient:
                gone.update(node for node in missing if not self._reaches(node, letter))
                impatient = now + 5 * _PATIENCE
            else:
                until = impatient if now < impatient else now + _PATIENCE
                question.changed.wait(min(until, deadline) - now + 0.001)

    def _reaches(self, node: str, letter: Envelope) -> bool:
        """Ask a node alone; return False if the carrier or its silence says that it is dead."""
        if self._heart is not None and not self.is_alive(node):
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

        Raise `BackendError` if the carrier is down, or there is no answer in `timeout` seconds, or
        before `still()` turns false. With `again`, a number of seconds, the request is repeated
        that often, so that the end of who should answer is noticed; it must not matter how often
        it is answered.
        """
        self._listen()
        with _Pending(self) as (number, question):
            letter = self._request(number, name, args, attachments)
            deadline = monotonic() + timeout
            if self._hub.publish(topic, letter) == 0:
                return None
            while not question.answers:
                now = monotonic()
                if now > deadline or not still():
                    raise BackendError(f"no answer to {name!r} in {timeout} seconds")
                wait = min(self._beat if again is None else again, deadline - now + 0.001)
                question.changed.wait(wait)
                if not question.answers and again is not None:
                    if self._hub.publish(topic, letter) == 0:
                        return None
            return next(iter(question.answers.values()))

    def tell(self, topic: str, name: str, *args: Any) -> int:
        """Publish a request that nobody answers; return how many processes it goes to."""
        return self._hub.publish(topic, self._request("", name, args))

    def _listen(self) -> None:
        """Hear answers. In a process without sockets this starts the backend."""
        if self._listens.is_set():
            return
        if self._heart is not None:
            if not self._listens.wait(_READY):
                raise BackendError("this node has not reached the backend yet")
            return
        with self._listening:
            if self._listens.is_set():
                return
            self._hub.backend.start(self._hub.deliver)
            try:
                self._hub.keep([self.topic])
            except BaseException:
                self._hub.backend.stop()
                raise
            self._listens.set()

    def _request(
        self, number: str, name: str, args: Sequence[Any], attachments: tuple[bytes, ...] = ()
    ) -> Envelope:
        return _letter(envelope.REQUEST, [number, self.node, name, args], attachments)

    # What comes by the carrier: on the hub, or where there is none in the backend's listener

    def _received(self, topic: str, letter: Envelope) -> None:
        try:
            body = json.loads(letter.packets[0])
            match letter.kind, body:
                case envelope.BEAT, [str(node), str(state)]:
                    self._beat_received(node, state)
                case envelope.REPLY, [str(number), str(node), list(others), bool(settled), value]:
                    question = self._questions.get(number)
                    if question is not None:
                        answer = Answer(value, letter.packets[1:])
                        question.answered(node, others, settled, answer)
                case envelope.REQUEST, [str(number), str(node), str(name), list(args)]:
                    if node != self.node or topic != ALL:
                        self._request_received(number, node, name, args, letter.packets[1:])
                case _:
                    raise ProtocolError("of no known shape")
        except (ProtocolError, TypeError) as error:
            self.counters["dropped: invalid envelope"] += 1
            logger.warning("Dropped a payload on topic %r: %s", topic, error)

    def _beat_received(self, node: str, state: str) -> None:
        if node == self.node:
            self._heard_myself = monotonic()
        elif state == "gone":
            self._others.pop(node, None)
        else:
            self._others[node] = monotonic()

    @property
    def _settled(self) -> bool:
        """Tell whether every other node must have been heard by now."""
        return self._listens.is_set() and monotonic() - self._hearing_since > 1.5 * self._beat

    def _request_received(
        self, number: str, node: str, name: str, args: list[Any], attachments: tuple[bytes, ...]
    ) -> None:
        if self._heart is None or name not in self.answerers:
            self.counters["dropped: unknown request"] += 1
            return
        if self._busy >= _MAX_REQUESTS:
            self.counters["dropped: too many requests"] += 1
            logger.warning("Dropped a request of node %s: %d are open", node, self._busy)
            return
        self._busy += 1
        gevent.spawn(self._reply, number, node, name, args, attachments)

    def _reply(
        self, number: str, node: str, name: str, args: list[Any], attachments: tuple[bytes, ...]
    ) -> None:
        try:
            answer = self._answer(name, args, attachments)
            if number and not self._publish_answer(number, node, answer) and answer.undelivered:
                answer.undelivered()
        except Exception:
            self.counters["requests that failed"] += 1
            logger.exception("Could not answer %r of node %s", name, node)
        finally:
            self._busy -= 1

    def _publish_answer(self, number: str, node: str, answer: Answer) -> bool:
        body = [number, self.node, sorted(self.nodes()), self._settled, answer.value]
        letter = _letter(envelope.REPLY, body, answer.attachments)
        try:
            return self._hub.publish(topic_of(node), letter) != 0
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
        members = self._hub.members(topic).values()
        for member in members:
            member.subscribe(channel)
        return Answer(bool(members))

    def _unsubscribe(self, topic: str, channel: str, attachments: Any) -> Answer:
        members = self._hub.members(topic).values()
        for member in members:
            member.unsubscribe(channel)
        return Answer(bool(members))

    def _answer(self, name: str, args: Sequence[Any], attachments: tuple[bytes, ...]) -> Answer:
        return self.answerers[name](*args, attachments=attachments)


class _Pending:
    """A question while somebody waits for it."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def __enter__(self) -> tuple[str, _Question]:
        self._number = next(self._cluster._numbers)
        question = self._cluster._questions[self._number] = _Question()
        return self._number, question

    def __exit__(self, *exc_info: object) -> None:
        del self._cluster._questions[self._number]


def _letter(kind: int, body: Any, attachments: tuple[bytes, ...] = ()) -> Envelope:
    return Envelope(kind, (json.dumps(body), *attachments))
