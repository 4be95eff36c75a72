"""Chunks that were skipped because nothing moved: until when the last picture stands. Pure; time is passed in (UNIX ns)."""

from __future__ import annotations

from collections import deque
from fractions import Fraction

from shared.contracts.events import ChunkStamp
from shared.playout import PlayoutDelay

MAX_STILLS = 64


class Stills:
    """No picture is shown for them, but their sound goes on: it is due when their last frame would have been."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Fraction]] = deque(maxlen=MAX_STILLS)

    def add(self, stamp: ChunkStamp, delay: PlayoutDelay) -> None:
        """A chunk was skipped. In a lossless stream sound waits for nothing."""
        if stamp.live and stamp.frames:
            last = stamp.frames[-1]
            until_s = (last.pts + last.duration) * Fraction(*stamp.time_base)
            self._waiting.append((delay.playout(last.captured_ns), until_s))

    def due(self, now: int) -> Fraction | None:
        """The second in the source up to which the picture stands by now, if that is news."""
        until_s: Fraction | None = None
        while self._waiting and self._waiting[0][0] <= now:
            until_s = self._waiting.popleft()[1]
        return until_s

    @property
    def next_at(self) -> int | None:
        """When :meth:`due` has something new to say."""
        return self._waiting[0][0] if self._waiting else None
