"""One live sink: a bounded queue of packets and the thread that writes them. Slow or broken, it costs nobody else anything."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from services.egress.live.h264 import EncodedFrame, SharedEncoder
from services.egress.live.muxers import Muxer
from services.egress.sinks.port import SinkError
from shared.contracts.events import AudioCaptured
from shared.contracts.sinks import SinkFigures, SinkState
from shared.media.errors import one_line

log = logging.getLogger(__name__)

MAX_FRAMES = 192  # a few seconds: more than any disk's hiccup, less than anybody waits for
MAX_PARTS = 1024
FIRST_RETRY_S = 1.0
MAX_RETRY_S = 15.0
ENDS_S = 10.0
RECORDING_ENDS_S = 600.0  # hours of it are copied once more


_MOVES = {
    SinkState.WAITING: {SinkState.LIVE, SinkState.BROKEN, SinkState.CLOSED},
    SinkState.LIVE: {SinkState.BROKEN, SinkState.CLOSED},
    SinkState.BROKEN: {SinkState.LIVE, SinkState.CLOSED},
    SinkState.CLOSED: set[SinkState](),
}


class News(Enum):
    """What is told of a sink."""

    LIVE = "live"
    SLOW = "slow"
    BROKEN = "broken"  # it is tried again
    GONE = "gone"  # it is not


@dataclass(frozen=True, slots=True)
class Told:
    """News of a sink: why, and from which chunk on it is live (else −1)."""

    sink: str
    news: News
    reason: str = ""
    chunk: int = -1


Tell = Callable[[Told], None]
"""Called in the feed's thread or the sink thread."""


class Feed:
    """``put_…`` never wait: a full queue drops pictures up to the next keyframe, and sound; both are counted.

    A sink that does not keep up is told once a spell; the spell is over when nothing waits for it any more.
    """

    def __init__(
        self, name: str, make: Callable[[], Muxer], encoder: SharedEncoder, tell: Tell, kind: str = ""
    ) -> None:
        self.name, self.kind = name, kind
        self.error = ""  # what broke it last
        self.gone = False  # … and for good
        self.slow = False
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
        self._over = False
        self._ended: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name=f"sink-{name}", daemon=True)
        self._thread.start()

    @property
    def wants_key(self) -> bool:
        """Whether nothing goes on before a keyframe."""
        with self._changed:
            return self._skipping and self._frames < MAX_FRAMES // 2

    def figures(self) -> SinkFigures:
        """How it fares."""
        counted = self.counters
        return SinkFigures(
            id=self.name,
            sink_kind=self.kind,
            state=self.state,
            slow=self.slow,
            frames=counted["frames"],
            bytes=counted["bytes"],
            dropped=counted["dropped_frames"],
            breaks=counted["breaks"],
            error=self.error,
        )

    def put_video(self, frame: EncodedFrame, header: bytes = b"") -> None:
        """One access unit; ``header`` is the sound track's, b"" while none is known."""
        if self._queue_video(frame, header):
            reason = f"it does not keep up: {MAX_FRAMES} pictures wait for it, newer ones are left out until it has caught up"
            self._tell(Told(self.name, News.SLOW, reason))

    def _queue_video(self, frame: EncodedFrame, header: bytes) -> bool:
        """True when it has just become slow."""
        with self._changed:
            self._header = header or self._header
            if frame.key and self._frames < MAX_FRAMES // 2:
                self._skipping, self._begun = False, True
            elif self._frames >= MAX_FRAMES:
                self._skipping = True
            became = self._frames >= MAX_FRAMES and not self.slow and self.state is not SinkState.BROKEN
            self.slow = self.slow or became
            if self._skipping:
                self.counters["dropped_frames"] += self._begun
                return became
            self._items.append(frame)
            self._frames += 1
            self._changed.notify()
            return became

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

    @property
    def patience_s(self) -> float:
        """How long its end may take."""
        return RECORDING_ENDS_S if self.kind == "mp4" else ENDS_S

    def when_ended(self, told: Callable[[], None]) -> None:
        """Have this called once it has ended, in its thread; at once if it has."""
        with self._changed:
            if not self._over:
                self._ended.append(told)
                return
        told()

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
                    self._tell(Told(self.name, News.LIVE, chunk=item.chunk))
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
                gone = broken is None or not broken.again
                self._break(broken, error, gone=gone)
                if gone or self._rest(retry_s):
                    break
                retry_s = min(MAX_RETRY_S, retry_s * 2)
        if muxer is not None:
            try:
                self.made = muxer.close()
            except Exception as error:
                self._break(None, error, gone=True)
        self._move(SinkState.CLOSED)
        with self._changed:
            self._over, told = True, self._ended
        for each in told:
            each()

    def _next(self) -> EncodedFrame | AudioCaptured | None:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._ending)
            if not self._items:
                return None
            item = self._items.popleft()
            self._frames -= isinstance(item, EncodedFrame)
            self._parts -= isinstance(item, AudioCaptured)
            self.slow = self.slow and self._frames > 0
            return item

    def _break(self, muxer: Muxer | None, error: Exception, *, gone: bool) -> None:
        if not isinstance(error, SinkError):
            log.error("sink %s broke", self.name, exc_info=error)
        self.counters["breaks"] += 1
        self.error, self.gone = one_line(error), gone
        if self.state is not SinkState.BROKEN:
            self._move(SinkState.BROKEN)
            self._tell(Told(self.name, News.GONE if gone else News.BROKEN, self.error))
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
