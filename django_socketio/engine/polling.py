"""The HTTP long-polling transport: GET waits for packets, POST brings them."""

from typing import Any

from gevent.event import Event

from ..protocol import engineio
from .frames import CLOSE, NOOP, Frame


class PollingTransport:
    """
    What waits for the client's next GET, and the GET that waits for it.

    Runs in two places: the session sends from callbacks and greenlets of the hub, the front's
    greenlets wait in `collect()`.
    """

    __slots__ = (
        "_bound",
        "_event",
        "_max_buffer",
        "_out",
        "_overflow",
        "closed",
        "posting",
        "waiting",
    )

    name = "polling"

    def __init__(self, max_buffer: int, overflow: Any) -> None:
        self._max_buffer = self._bound = max_buffer
        self._overflow = overflow
        self._out: list[Frame] = []
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
        size = len(frame.websocket)
        if not self._out:
            # A message that is larger than the buffer does not count, with nothing before it;
            # and a handler that sends much while a GET waits has no slow client.
            self._bound = self._max_buffer + (size if size > self._max_buffer else 0)
        elif self.waiting + size > self._bound and not self.polled:
            self._overflow("slow consumer")
            return
        self._out.append(frame)
        self.waiting += size
        self.wake()

    def wake(self) -> None:
        """Let the GET that waits answer with what there is."""
        if self._event is not None:
            self._event.set()

    def collect(self) -> bytes:
        """
        Wait until there is something, and return it as a payload; called by one GET at a time.

        A GET that was woken for nothing is answered with a noop, which the client drops.
        """
        if not self._out and not self.closed:
            self._event = Event()
            try:
                self._event.wait()
            finally:
                self._event = None
        return self.take()

    def take(self) -> bytes:
        frames = self.drain() or [NOOP]
        return engineio.encode_payload([frame.polling for frame in frames])

    def drain(self) -> list[Frame]:
        """Return what waits, for good."""
        frames, self._out = self._out, []
        self.waiting = 0
        return frames

    def close(self) -> None:
        """End the client's next GET, or the one that waits, with a close packet."""
        if not self.closed:
            self.closed = True
            self._out.append(CLOSE)
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
