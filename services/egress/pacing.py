"""The jitter buffer's clock: how long after its capture a live frame is shown. Pure integers, nanoseconds."""

from __future__ import annotations

from collections import deque

MARGIN_NS = 15_000_000  # kept above the slowest recent chunk
DEADLINE_MARGIN_NS = 20_000_000  # kept below the deadline, at least
DEADLINE_SHARE = 10  # … and this part of it (a tenth): a busy machine wakes us late
EASE_NS = 1_500_000  # how far the delay may shrink with each chunk: too little to be seen
WINDOW = 40  # chunks


class PlayoutDelay:
    """One delay for the whole stream, so that frames come out as evenly as they were captured.

    It starts at the first chunk's latency plus a margin, grows at once when a chunk comes later than that, and shrinks
    slowly when ``WINDOW`` chunks in a row would have allowed less. It never passes the deadline: a frame that comes
    later than that is late anyway, and must not make the next ones late too.
    """

    def __init__(self, deadline_ns: int) -> None:
        self._deadline = deadline_ns
        self._bound = max(0, deadline_ns - max(DEADLINE_MARGIN_NS, deadline_ns // DEADLINE_SHARE))
        self._recent: deque[int] = deque(maxlen=WINDOW)
        self.delay_ns: int | None = None

    def observe(self, latency_ns: int) -> None:
        """A chunk is ready, so long after its first frame was captured."""
        if latency_ns > self._deadline and self.delay_ns is not None:
            return  # late whatever the delay: it teaches nothing about the others
        self._recent.append(min(latency_ns, self._bound))
        wanted = min(max(self._recent) + MARGIN_NS, self._bound)
        if self.delay_ns is None or wanted > self.delay_ns:
            self.delay_ns = wanted
        else:
            self.delay_ns = max(wanted, self.delay_ns - EASE_NS)

    def playout(self, captured_ns: int) -> int:
        """When the frame captured then is to be shown, UNIX ns."""
        return captured_ns + (self.delay_ns or 0)
