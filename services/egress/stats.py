"""What egress measures of a stream, in bounded memory."""

from __future__ import annotations

import math

from shared.contracts.events import StreamStats

_PER_DECADE = 200  # buckets per factor of ten: percentiles are right within 0.6 %
_LOWEST_MS = 0.1
_BUCKETS = 8 * _PER_DECADE


class LatencyHistogram:
    """Latencies from 0.1 ms to hours in logarithmic buckets."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0

    def add(self, ms: float) -> None:
        """One latency."""
        bucket = 0 if ms <= _LOWEST_MS else min(_BUCKETS, math.ceil(math.log10(ms / _LOWEST_MS) * _PER_DECADE))
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self.count += 1

    def percentile(self, share: float) -> float:
        """The latency in ms that ``share`` (0…1) of all stayed below; 0 when there is none."""
        rank, seen = share * self.count, 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= rank:
                return _LOWEST_MS * 10 ** ((bucket - 0.5) / _PER_DECADE) if bucket else _LOWEST_MS
        return 0.0


class StreamMeter:
    """Frames out over time. All times are UNIX ns."""

    def __init__(self, taken_ns: int) -> None:
        self._taken_ns = taken_ns
        self._first_ns: int | None = None
        self._last_ns = 0
        self._latency = LatencyHistogram()
        self.frames_out = 0
        self.newest_latency_ms = 0.0

    def emitted(self, captured_ns: int, now: int) -> None:
        """A frame went to the sinks."""
        if self._first_ns is None:
            self._first_ns = now
        self._last_ns = now
        self.frames_out += 1
        self.newest_latency_ms = (now - captured_ns) / 1e6
        self._latency.add(self.newest_latency_ms)

    def stats(self) -> StreamStats:
        """Rates over the time frames came out; time to first frame from the moment the stream was taken."""
        span = (self._last_ns - self._first_ns) / 1e9 if self._first_ns is not None else 0.0
        return StreamStats(
            fps=(self.frames_out - 1) / span if span > 0 else 0.0,
            ttff_s=(self._first_ns - self._taken_ns) / 1e9 if self._first_ns is not None else 0.0,
            latency_p50_ms=self._latency.percentile(0.5),
            latency_p95_ms=self._latency.percentile(0.95),
            frames_out=self.frames_out,
        )
