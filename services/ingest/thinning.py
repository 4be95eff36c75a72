"""Fewer frames a second than the source has, evenly: which ones are kept. Pure; no I/O, no time but the frames' own."""

from __future__ import annotations

from fractions import Fraction

EPSILON = 1e-6  # of a slot: timestamps are rounded


class Thinner:
    """Keeps the first frame of each 1/fps seconds of a source. Rate 0 keeps everything.

    What is told comes again, and out of order: the newest version holds.
    """

    def __init__(self) -> None:
        self.fps = 0.0
        self._version = 0
        self._slot: int | None = None

    def pace(self, version: int, fps: float) -> bool:
        """Another rate from the next frame on. Returns whether this was news."""
        if version <= self._version:
            return False
        self._version, self.fps, self._slot = version, max(0.0, fps), None
        return True

    def keeps(self, pts: int, time_base: Fraction) -> bool:
        """Whether the frame shown at ``pts`` is taken."""
        if self.fps <= 0:
            return True
        slot = int(float(pts * time_base) * self.fps + EPSILON)
        if self._slot is not None and slot == self._slot:
            return False
        self._slot = slot
        return True
