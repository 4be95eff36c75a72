"""One live sink: a bounded queue of packets and the thread that writes them. Slow or broken, it costs nobody else anything."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from enum import StrEnum

from services.egress.live.h264 import EncodedFrame, SharedEncoder
from services.egress.live.muxers import Muxer
from services.egress.sinks.port import SinkError
from shared.contracts.events import AudioCaptured
from shared.media.errors import one_line

log = logging.getLogger(__name__)

MAX_FRAMES = 192  # a few seconds: more than any disk's hiccup, less than anybody waits for
MAX_PARTS = 1024
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 15.0


class SinkState(StrEnum):
    """A live sink's life."""

    WAITING = "waiting"  # for its first keyframe
    LIVE = "live"
    BROKEN = "broken"  # it is opened again later, if that may help
    CLOSED = "closed"


_MOVES = {
    SinkState.WAITING: {SinkState.LIVE, SinkState.BROKEN, SinkState.CLOSED},
    SinkState.LIVE: {SinkState.BROKEN, SinkState.CLOSED},
    SinkState.BROKEN: {SinkState.LIVE, SinkState.CLOSED},
    SinkState.CLOSED: set[SinkState](),
}

Tell = Callable[["Feed", str, int], None]
"""(feed, what broke or "" when it went live, chunk), called in the feed's thread."""


class Feed:
    """``put_…`` never wait: a full queue drops pictures up to the next keyframe, and sound; both are counted."""

    def __init__(self, name: str, make: Callable[[], Muxer], encoder: SharedEncoder, tell: Tell) -> None:
        self.name = name
        self.state = SinkState.WAITING
        self.made = ""
        self.counters = {"frames": 0, "bytes": 0, "dropped_frames": 0, "dropped_parts": 0, "breaks": 0}
        self._make, self._encoder, self._tell = make, encoder, tell
        self._header = b""
        self._items: deque[EncodedFrame | AudioCaptured] = deque()
        self._frames = self._parts = 0
        self._skipping = True  # until a keyframe
        self._begun = False  # what came before its first keyframe was never its
        self._ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        self._thread.start()

    @property
    def wants_key(self) -> bool:
        """Whether nothing goes on before a keyframe."""
        with self._changed:
            return self._skipping and self._frames < MAX_FRAMES // 2

    def put_video(self, frame: EncodedFrame, header: bytes = b"") -> None:
        """One access unit; ``header`` is the sound track's, b"" while none is known."""
        with self._changed:
            self._header = header or self._header
            if frame.key and self._frames < MAX_FRAMES // 2:
                self._skipping, self._begun = False, True
            elif self._frames >= MAX_FRAMES:
                self._skipping = True
            if self._skipping:
                self.counters["dropped_frames"] += self._begun
                return
            self._items.append(frame)
            self._frames += 1
            self._changed.notify()

    def put_audio(self, part: AudioCaptured, header: bytes) -> None:
        """Sound; ``header`` is the track's."""
        with self._changed:
            self._header = header
            if self._parts >= MAX_PARTS:
                self.counters["dropped_parts"] += 1
                return
            self._items.append(part)
            self._parts += 1
            self._changed.notify()

    def end(self) -> None:
        """Write what waits and close; :meth:`join` waits for that."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        muxer: Muxer | None = None
        retry_s = FIRST_RETRY_S
        while (item := self._next()) is not None:
            try:
                if muxer is None:
                    if not (isinstance(item, EncodedFrame) and item.key):
                        continue
                    muxer = self._make()
                    muxer.open(self._encoder, self._header)
                    muxer.video(item)
                    self._move(SinkState.LIVE)
                    self._tell(self, "", item.chunk)
                    retry_s = FIRST_RETRY_S
                elif isinstance(item, EncodedFrame):
                    muxer.video(item)
                else:
                    muxer.audio(item)
                if isinstance(item, EncodedFrame):
                    self.counters["frames"] += 1
                    self.counters["bytes"] += len(item.data)
            except Exception as error:
                broken, muxer = muxer, None
                self._break(broken, error)
                if broken is None or not broken.again or self._rest(retry_s):
                    break
                retry_s = min(MAX_RETRY_S, retry_s * 2)
        if muxer is not None:
            try:
                self.made = muxer.close()
            except Exception as error:
                self._break(None, error)
        self._move(SinkState.CLOSED)

    def _next(self) -> EncodedFrame | AudioCaptured | None:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ending)
            if not self._items:
                return None
            item = self._items.popleft()
            self._frames -= isinstance(item, EncodedFrame)
            self._parts -= isinstance(item, AudioCaptured)
            return item

    def _break(self, muxer: Muxer | None, error: Exception) -> None:
        if not isinstance(error, SinkError):
            log.error("sink %s broke", self.name, exc_info=error)
        self.counters["breaks"] += 1
        if self.state is not SinkState.BROKEN:
            self._move(SinkState.BROKEN)
            self._tell(self, one_line(error), -1)
        if muxer is not None:
            try:
                muxer.close()
            except Exception as second:
                log.debug("sink %s: closing what broke: %s", self.name, second)

    def _rest(self, seconds: float) -> bool:
        """Wait before it is tried again, from the next keyframe on; True when it is to end."""
        with self._changed:
            ending = self._changed.wait_for(lambda: self._ending, seconds)
            self.counters["dropped_frames"] += self._frames
            self._items.clear()
            self._frames = self._parts = 0
            self._skipping = True
            return ending

    def _move(self, state: SinkState) -> None:
        if state is self.state:
            return
        if state not in _MOVES[self.state]:
            raise ValueError(f"sink {self.name} cannot go from {self.state} to {state}")
        self.state = state
