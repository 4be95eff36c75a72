"""When a frame was captured, from RTP's even timestamps and the uneven times of arrival. Pure; nanoseconds.

The frame that was least held up on its way tells best how the two clocks lie. So the offset is the least that was seen, and
creeps up slowly, for clocks drift.
"""

from __future__ import annotations

CREEP = 2_000  # an offset may grow by one 2000th of the time that passes: clocks drift by less
RESTART_NS = 1_000_000_000  # a frame further off than this begins anew: the sender's clock jumped, or the path was cut


class ArrivalClock:
    """One track's. ``rate`` is RTP's ticks a second."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._first: int | None = None
        self._last_ticks = 0
        self._wraps = 0
        self._offset_ns = 0
        self._last_ns = 0

    def captured_ns(self, timestamp: int, arrived_ns: int) -> int:
        """The best guess of when it was captured: never after it arrived."""
        media_ns = self._media_ns(timestamp)
        seen = arrived_ns - media_ns
        if self._first is None or abs(seen - self._offset_ns) > RESTART_NS:
            self._offset_ns = seen
            self._first = timestamp if self._first is None else self._first
        else:
            crept = self._offset_ns + max(0, arrived_ns - self._last_ns) // CREEP
            self._offset_ns = min(seen, crept)
        self._last_ns = arrived_ns
        return media_ns + self._offset_ns

    def _media_ns(self, timestamp: int) -> int:
        """Nanoseconds since RTP's zero, without its wrap-around."""
        if self._first is not None:
            delta = timestamp - self._last_ticks
            if delta < -(1 << 31):
                self._wraps += 1
            elif delta > 1 << 31:
                self._wraps -= 1
        self._last_ticks = timestamp
        return (timestamp + (self._wraps << 32)) * 1_000_000_000 // self._rate
