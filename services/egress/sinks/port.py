"""A sink as the sink thread sees it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from shared.contracts.events import AudioCaptured
from shared.media.flow import Flow
from shared.media.steadying import Place


class SinkError(Exception):
    """A sink that cannot be opened, or broke. The message is one line that names the fix."""


@dataclass(frozen=True, slots=True)
class OutFrame:
    """A frame to show: uint8 [height, width, 3] RGB; ``pts`` and ``duration`` (0: unknown) count ticks of ``time_base``.

    ``chunk`` is the one it belongs to; when it was captured and shown is in UNIX ns. ``place`` and ``flow`` (the
    chunk's) are for steadying, which is done before a sink sees the frame.
    """

    pixels: np.ndarray
    pts: int
    duration: int
    time_base: Fraction
    chunk: int = -1
    captured_ns: int = 0
    shown_ns: int = 0
    place: Place | None = None
    flow: Flow | None = None


class Sink(Protocol):
    """All methods run in one thread of the stream's, at last ``finish`` maybe in another. Any but ``expect_audio`` may raise
    SinkError.
    """

    def expect_audio(self, expected: bool) -> None:
        """Whether the source has sound; known once its first chunk is."""
        ...

    def write(self, frame: OutFrame) -> None:
        """One frame; timestamps ascend."""
        ...

    def audio(self, part: AudioCaptured) -> None:
        """Sound, in order."""
        ...

    def still(self, until_s: Fraction) -> None:
        """The last picture stands until that second of the source: nothing moved. Sound goes on."""
        ...

    def finish(self) -> str:
        """Complete the output; what was made in words, "" for nothing. Idempotent."""
        ...
