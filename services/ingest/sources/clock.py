"""No source at all: a clock that says when the frames of a text-to-video stream are due."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from services.ingest.sources.port import AudioTrack, Picture, Sound

DEFAULT_FPS = 16.0
TICKS_PER_FRAME = 1000
_NOTHING = np.empty((0, 0, 3), np.uint8)


class ClockSource:
    """``frames`` pictures without pixels (0: endless) at ``fps``."""

    def __init__(self, frames: int, fps: float | None) -> None:
        self._frames = frames
        self.time_base = 1 / (Fraction(fps or DEFAULT_FPS).limit_denominator(1001) * TICKS_PER_FRAME)
        self.audio: AudioTrack | None = None

    def read(self) -> Iterator[Picture | Sound]:
        """One empty picture after the other."""
        index = 0
        while not self._frames or index < self._frames:
            yield Picture(index * TICKS_PER_FRAME, TICKS_PER_FRAME, _NOTHING)
            index += 1

    def resize(self, width: int, height: int) -> None:
        """There are no pixels."""

    def close(self) -> None:
        """Nothing is held."""
