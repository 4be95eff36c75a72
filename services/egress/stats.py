"""What egress measures of a stream, in bounded memory."""

from __future__ import annotations

import math
from fractions import Fraction

from shared.contracts.events import FrameStamp, StreamStats

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
    """Frames out over time. All times are UNIX ns.

    A stall is a picture that stands for more than two frames' time; what it stands too long counts against the continuous
    play ratio. Frames that were skipped or paused on purpose (:meth:`excuse`) make no stall.
    """

    def __init__(self, taken_ns: int) -> None:
        self._taken_ns = taken_ns
        self._first_ns: int | None = None
        self._last_ns = 0
        self._last: FrameStamp | None = None
        self._frame_ns = 0
        self._excused = 0
        self._stalled_ns = 0
        self._latency = LatencyHistogram()
        self._jitter = LatencyHistogram()
        self.frames_out = 0
        self.newest_latency_ms = self._first_frame_ms = 0.0

    def emitted(self, frame: FrameStamp, now: int, time_base: Fraction = Fraction(1, 90_000)) -> None:
        """A frame went to the sinks."""
        last, self._last = self._last, frame
        if last is None:
            self._first_ns = now
        else:
            self._distance(last, frame, now - self._last_ns)
        self._frame_ns = int(frame.duration * time_base * 1_000_000_000) or self._frame_ns
        self._last_ns, self._excused = now, 0
        self.frames_out += 1
        self.newest_latency_ms = (now - frame.captured_ns) / 1e6
        self._first_frame_ms = self._first_frame_ms or self.newest_latency_ms
        self._latency.add(self.newest_latency_ms)

    def excuse(self, frames: int) -> None:
        """So many frames are left out on purpose before the next one that is shown."""
        self._excused += frames

    def stats(self) -> StreamStats:
        """Rates over the time frames came out; time to first frame from the moment the stream was taken."""
        span_ns = self._last_ns - self._first_ns if self._first_ns is not None else 0
        return StreamStats(
            fps=(self.frames_out - 1) / (span_ns / 1e9) if span_ns > 0 else 0.0,
            ttff_s=(self._first_ns - self._taken_ns) / 1e9 if self._first_ns is not None else 0.0,
            latency_p50_ms=self._latency.percentile(0.5),
            latency_p95_ms=self._latency.percentile(0.95),
            latency_p99_ms=self._latency.percentile(0.99),
            jitter_p95_ms=self._jitter.percentile(0.95),
            cpr=1.0 - self._stalled_ns / span_ns if span_ns > 0 else 1.0,
            frames_out=self.frames_out,
            first_frame_ms=self._first_frame_ms,
        )

    def _distance(self, last: FrameStamp, frame: FrameStamp, shown_ns: int) -> None:
        """How far two frames were shown apart, beside how far they were captured apart."""
        captured_ns = frame.captured_ns - last.captured_ns
        self._jitter.add(abs(shown_ns - captured_ns) / 1e6)
        frame_ns = self._frame_ns or captured_ns
        # Where no frame is missing, the source itself gave nothing for so long.
        follows = frame.index == last.index + 1
        expected = max(frame_ns, captured_ns) if follows else frame_ns * (1 + self._excused)
        if shown_ns - expected > frame_ns:
            self._stalled_ns += shown_ns - expected
