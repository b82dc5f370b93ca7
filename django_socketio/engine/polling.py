"""The HTTP long-polling transport: GET waits for packets, POST brings them."""

from collections.abc import Callable, Hashable, Iterable

from gevent.event import Event

from ..protocol import engineio
from .frames import CLOSE, NOOP, Frame, LossyFrame
from .latest import Latest

_ROOM = 65536
"""Bytes that may wait between two GETs without a client being behind: its kernel's buffer."""

_HOLE = Frame(None)


class PollingTransport:
    """
    What waits for the client's next GET, and the GET that waits for it.

    `waiting` counts the bytes, also those of an answer that is on its way until `answered()`. It
    may not exceed `max_buffer`, but for a single message that is larger and has nothing before it,
    and for what a GET that waits is going to take.

    Runs in two places: the session sends from callbacks and greenlets of the hub, the front's
    greenlets wait in `wait()`.
    """

    __slots__ = (
        "_event",
        "_free",
        "_latest",
        "_on_its_way",
        "_out",
        "_taken",
        "_too_slow",
        "closed",
        "max_buffer",
        "posting",
        "waiting",
    )

    name = "polling"

    def __init__(self, max_buffer: int, too_slow: Callable[[str], None]) -> None:
        self.max_buffer = max_buffer
        self._too_slow = too_slow
        self._out: list[Frame] = []
        self._taken: list[Frame] = []  # what the GET that waits is answered with, if it is much
        self._free = 0  # bytes of `waiting` that do not count
        self._on_its_way = 0
        self._latest: Latest[Frame] | None = None
        self._event: Event | None = None
        self.waiting = 0
        self.posting = False
        self.closed = False

    @property
    def polled(self) -> bool:
        """Tell whether a GET waits."""
        return self._event is not None

    def send(self, frame: Frame) -> None:
        """Hand the frame to the GET that waits, or keep it for the next one."""
        if self.closed:
            return
        size = len(frame.polling)
        if self._has_room(size):
            self._out.append(frame)
            self.waiting += size
            self.wake()
        else:
            self._overflow(size)

    def send_lossy(self, frame: LossyFrame) -> None:
        """Send; a client that is behind does without, or without an earlier one of its key."""
        if self.closed:
            return
        behind = self._is_behind(len(frame.polling))
        if frame.key is not None and (behind or self._latest is not None):
            self._replace(frame, frame.key)  # until the next GET, though less waits by now
        elif behind:
            frame.dropped()
        else:
            self.send(frame)

    def _is_behind(self, size: int) -> bool:
        """Tell whether more waits than a client leaves behind between two GETs."""
        room = self.max_buffer if self.polled else min(_ROOM, self.max_buffer)
        return self.waiting > 0 and self.waiting + size > room

    def _replace(self, frame: LossyFrame, key: Hashable) -> None:
        """Have the frame wait, and nothing of its key before it."""
        if self._latest is None:
            self._latest = Latest(self._out, _HOLE)
            self._drop(self._latest.index())
        self._drop(self._latest.append(frame, key))
        size = len(frame.polling)
        self.waiting += size
        if self.waiting > self.max_buffer + self._free:
            self._overflow(0)
        else:
            self.wake()

    def _drop(self, frames: Iterable[Frame]) -> None:
        for frame in frames:
            assert isinstance(frame, LossyFrame)
            self.waiting -= len(frame.polling)
            frame.dropped()

    def _has_room(self, size: int) -> bool:
        if self.waiting + size <= self.max_buffer + self._free:
            return True
        if self.polled and not self._taken:
            # A handler that sends much while a GET waits has no slow client.
            self._take()
            self._free = self.waiting
        if not self._out and size > self.max_buffer:
            # What comes behind it has the whole buffer: the client is between two GETs.
            self._free += size
        return self.waiting + size <= self.max_buffer + self._free

    def _overflow(self, size: int) -> None:
        limit = f"SOCKETIO_MAX_BUFFER ({self.max_buffer})"
        self._too_slow(f"{self.waiting + size} bytes wait, more than {limit}")

    def wake(self) -> None:
        """Let the GET that waits answer with what there is."""
        if self._event is not None:
            self._event.set()

    def wait(self) -> None:
        """Wait until there is something to take, or reason to answer; one GET at a time."""
        self.answered()  # the client has got the last one, or it would not ask for more
        if not self._out and not self.closed:
            self._event = Event()
            try:
                self._event.wait()
            finally:
                self._event = None

    def take(self) -> bytes:
        """
        Return what waits as a payload, which counts until `answered()`.

        Where nothing does, that is a noop, which the client drops.
        """
        if not self._taken:
            self.answered()
            self._take()
        frames, self._taken = self._taken, []
        kept = [frame.polling for frame in frames if frame is not _HOLE]
        return engineio.encode_payload(kept or [NOOP.polling])

    def _take(self) -> None:
        self._taken, self._out = self._out, []
        self._latest = None
        self._on_its_way = self.waiting

    def answered(self) -> None:
        """Be told that the answer has left."""
        self.waiting -= self._on_its_way
        self._on_its_way = 0
        self._free = min(self._free, self.waiting)

    def drain(self) -> list[Frame]:
        """Return what waits, for good."""
        frames = [frame for frame in (*self._taken, *self._out) if frame is not _HOLE]
        self._taken, self._out, self._latest = [], [], None
        self.waiting = self._free = self._on_its_way = 0
        return frames

    def close(self, code: int = 0, reason: str = "") -> None:
        """
        End the client's next GET, or the one that waits, with a close packet.

        That says neither `code` nor `reason`.
        """
        if not self.closed:
            self.closed = True
            self._out = [*self._taken, *self._out, CLOSE]  # all with the GET that waits: the last
            self._taken = []
            self.wake()

    def finish(self) -> None:
        """Be done: the client closes, and wants no more packets."""
        self.abort()

    def abort(self) -> None:
        """Drop what waits and let go of the GET."""
        self.closed = True
        self.drain()
        self.wake()

    def pause(self) -> None:
        """Reading is a matter of POSTs, which the engine holds back."""

    def resume(self) -> None:
        """See `pause()`."""
