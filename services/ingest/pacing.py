"""When a live source's frames are due on the wall clock. Pure: time is passed in, UNIX nanoseconds."""

from __future__ import annotations

from enum import StrEnum
from fractions import Fraction

# A gap in the timestamps longer than this is not waited for: the picture goes on at once, its timestamps keep the gap.
MAX_WAIT_NS = 3_000_000_000


class Pace(StrEnum):
    """What to do with a frame."""

    WAIT = "wait"  # it is due at the time given
    DROP = "drop"  # it was due so long ago that it could not be on time any more


class LivePacer:
    """Maps timestamps to the wall clock: a file plays at its own pace, as a camera would deliver it.

    ``behind_ns`` is how late a frame may be read and still be sent. A source that stays behind four times as long is
    re-anchored to now instead of being dropped for ever.
    """

    def __init__(self, time_base: Fraction, behind_ns: int) -> None:
        self._time_base = time_base
        self._behind_ns = behind_ns
        self._anchor_ns: int | None = None
        self._anchor_pts = 0
        self._last_due = 0

    def due(self, pts: int, now_ns: int) -> tuple[Pace, int]:
        """The wall time of the frame stamped ``pts`` and what to do with it."""
        if self._anchor_ns is None:
            self._anchor(pts, now_ns)
        due = self._due(pts)
        if due - max(now_ns, self._last_due) > MAX_WAIT_NS or now_ns - due > 4 * self._behind_ns:
            self._anchor(pts, now_ns)
            due = now_ns
        self._last_due = due
        return (Pace.DROP if now_ns - due > self._behind_ns else Pace.WAIT), due

    def restart(self) -> None:
        """Time stood still for a while: the next frame is due when it comes."""
        self._anchor_ns = None
        self._last_due = 0

    def _anchor(self, pts: int, now_ns: int) -> None:
        self._anchor_ns, self._anchor_pts = now_ns, pts

    def _due(self, pts: int) -> int:
        assert self._anchor_ns is not None
        ticks = pts - self._anchor_pts
        return self._anchor_ns + ticks * 1_000_000_000 * self._time_base.numerator // self._time_base.denominator
