"""What egress does with a stream's chunks, chunk by chunk: when they are shown, on time or late, and when credits come back.

The rules are egress' own (``services/egress/core.py`` and ``pacing.py``; a test plays the same chunks through both): one playout
delay per stream, which never passes the deadline; a frame is on time if it can be shown by its deadline, else late; what is lost is
closed two seconds after its deadline; a chunk's credit comes back when its last frame has been shown.
"""

from __future__ import annotations

from collections import deque

MARGIN_NS = 15_000_000
DEADLINE_MARGIN_NS = 20_000_000
DEADLINE_SHARE = 10
EASE_NS = 1_500_000
WINDOW = 40
LOST_AFTER_NS = 2_000_000_000


class Playout:
    """A stream's playout delay."""

    __slots__ = ("_bound", "_deadline", "_recent", "delay_ns")

    def __init__(self, deadline_ns: int) -> None:
        self._deadline = deadline_ns
        self._bound = max(0, deadline_ns - max(DEADLINE_MARGIN_NS, deadline_ns // DEADLINE_SHARE))
        self._recent: deque[int] = deque(maxlen=WINDOW)
        self.delay_ns: int | None = None

    def observe(self, latency_ns: int) -> None:
        """A chunk is ready, so long after its first frame was captured."""
        if latency_ns > self._deadline and self.delay_ns is not None:
            return
        self._recent.append(min(latency_ns, self._bound))
        delay = self.delay_ns
        wanted = min(max(self._recent) + MARGIN_NS, self._bound)
        if delay is None or wanted > delay:
            self.delay_ns = wanted
        else:
            self.delay_ns = max(wanted, delay - EASE_NS)
