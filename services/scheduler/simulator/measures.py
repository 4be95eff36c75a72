"""What a simulation is judged by, gathered chunk by chunk in flat counters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

HISTOGRAM_MS = 60_000


class Histogram:
    """Counts by whole milliseconds; what lies beyond a minute counts as a minute."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.total = 0

    def add(self, ns: int, weight: int = 1) -> None:
        """A duration, ``weight`` times."""
        bucket = min(ns // 1_000_000, HISTOGRAM_MS)
        self.counts[bucket] = self.counts.get(bucket, 0) + weight
        self.total += weight

    @classmethod
    def merged(cls, parts: Iterable[Histogram]) -> Histogram:
        """All of them in one."""
        whole = cls()
        for part in parts:
            for bucket, count in part.counts.items():
                whole.counts[bucket] = whole.counts.get(bucket, 0) + count
            whole.total += part.total
        return whole

    def percentile(self, share: float) -> float:
        """Milliseconds that ``share`` of the durations do not exceed; 0 when there are none."""
        wanted, passed = share * self.total, 0
        for bucket in sorted(self.counts):
            passed += self.counts[bucket]
            if passed >= wanted:
                return float(bucket)
        return 0.0


@dataclass(slots=True)
class Shown:
    """What one tenant's viewers saw."""

    latency: Histogram = field(default_factory=Histogram)  # frames: shown − captured
    first_frame: Histogram = field(default_factory=Histogram)  # sessions: first frame shown − first frame captured


class Timeline:
    """Frames due and frames on time in each bin of time: when did it go wrong, and when was it right again."""

    __slots__ = ("bin_ns", "due", "latency_ns", "on_time")

    def __init__(self, seconds: float, bin_ns: int = 250_000_000) -> None:
        bins = int(seconds * 1e9 / bin_ns) + 64
        self.bin_ns = bin_ns
        self.due = [0] * bins
        self.on_time = [0] * bins
        self.latency_ns = [0] * bins  # the longest of the bin

    def add(self, due_ns: int, frames: int, on_time: int, latency_ns: int = 0) -> None:
        """Frames whose deadline is at ``due_ns``."""
        index = min(due_ns // self.bin_ns, len(self.due) - 1)
        self.due[index] += frames
        self.on_time[index] += on_time
        self.latency_ns[index] = max(self.latency_ns[index], latency_ns)

    def right_again(self, since_s: float, share: float = 0.95) -> float | None:
        """Seconds after ``since_s`` until every later bin has its ``share`` on time; None when the last one has not."""
        start = int(since_s * 1e9 / self.bin_ns)
        last_bad: int | None = None
        for index in range(start, len(self.due)):
            if self.due[index] and self.on_time[index] < share * self.due[index]:
                last_bad = index
        if last_bad is None:
            return 0.0
        if not any(self.due[last_bad + 1 :]):
            return None
        return (last_bad + 1) * self.bin_ns / 1e9 - since_s


def share_below(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values do not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
