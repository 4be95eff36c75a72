"""The jitter buffer's clock: how long after its capture a live frame is shown. Pure integers, nanoseconds."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

MARGIN_NS = 10_000_000  # kept above what recent chunks needed: a loop that wakes late, a thread that waits for a core
DEADLINE_MARGIN_NS = 20_000_000  # kept below the deadline, at least
DEADLINE_SHARE = 10  # … and this part of it (a tenth): a busy machine wakes us late
EASE_NS = 1_500_000  # the delay may always shrink by so much with a chunk: too little to be seen
EASE_SHARE = 4  # … or by this part of what it has too much (a quarter), so that a slow start is soon forgotten
EASE_MOST_NS = 18_000_000  # … but never by more: below what is seen as a jerk (20 ms)
WINDOW = 40  # chunks
COVERED = (
    0.9  # the share of recent chunks that must be in time: a slow one holds up its first frames only, so 95 % of frames
)
FEW = 4  # chunks, a second of 16 fps: with fewer the slowest counts


class PlayoutDelay:
    """One delay for the whole stream, so that frames come out as evenly as they were captured.

    It follows what is measured: the ``COVERED`` quantile of the last ``WINDOW`` chunks' latencies (first frame captured →
    chunk ready) and a margin. It grows at once and shrinks slowly. A single late chunk among many moves nothing: its frames
    are shown when they come, which disturbs one interval, where a longer delay would hold up every frame after it.

    It never passes the deadline: a frame that comes later than that is late anyway, and must not make the next ones late
    too.
    """

    def __init__(self, deadline_ns: int) -> None:
        self._deadline = deadline_ns
        self._bound = max(0, deadline_ns - max(DEADLINE_MARGIN_NS, deadline_ns // DEADLINE_SHARE))
        self._recent: deque[int] = deque()
        self._ordered: list[int] = []  # the same, the shortest first
        self.delay_ns: int | None = None

    def observe(self, latency_ns: int, *, first: bool = False) -> None:
        """A chunk is ready, so long after its first frame was captured.

        A stream's ``first`` chunk is longer, and its steps run one after the other: it begins the playout, and tells nothing
        of those that follow.
        """
        if latency_ns > self._deadline and self.delay_ns is not None:
            return  # late whatever the delay: it teaches nothing about the others
        if not first:
            self._remember(min(latency_ns, self._bound))
        needed = self._needed_ns() if self._recent else latency_ns
        wanted = min(needed + MARGIN_NS, self._bound)
        if self.delay_ns is None or wanted > self.delay_ns:
            self.delay_ns = wanted
        else:
            ease = min(EASE_MOST_NS, max(EASE_NS, (self.delay_ns - wanted) // EASE_SHARE))
            self.delay_ns = max(wanted, self.delay_ns - ease)

    def playout(self, captured_ns: int) -> int:
        """When the frame captured then is to be shown, UNIX ns."""
        return captured_ns + (self.delay_ns or 0)

    def _remember(self, latency_ns: int) -> None:
        self._recent.append(latency_ns)
        insort(self._ordered, latency_ns)
        if len(self._recent) > WINDOW:
            del self._ordered[bisect_left(self._ordered, self._recent.popleft())]

    def _needed_ns(self) -> int:
        """The quantile by nearest rank: of a few chunks the slowest, of ``FEW`` and more never a single slow one."""
        count = len(self._recent)
        rank = min(math.ceil(COVERED * count), count - (count >= FEW))
        return self._ordered[rank - 1]
