"""What became of each chunk, and how its time was spent at egress: told with the verdicts, and written down as spans."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from opentelemetry.trace import SpanContext, Tracer

from services.egress.ledger import ChunkVerdict
from shared.contracts.events import (
    ChunkDropped,
    ChunkEnd,
    ChunkStamp,
    FramesDecoded,
    LedgerTotals,
    StageTiming,
    Verdict,
)
from shared.contracts.timing import EGRESS, NS_PER_MS, ended_ns, timing_of
from shared.telemetry.hops import end_stream_trace, record_end, start_stream_trace

MAX_OPEN = 256  # chunks between ingest and egress are bounded by credits; this bounds what a confused sender may do
MAX_TOLD = 32


@dataclass(slots=True)
class _Open:
    """A chunk on its way: the hops before egress, when its pixels were here, and when its first frame was shown."""

    stamp: ChunkStamp
    timings: tuple[StageTiming, ...] = ()
    ready_ns: int = 0
    shown_ns: int = 0


class ChunkEnds:
    """One stream's. :meth:`take` gives the ends since the last time. What is bounded loses its oldest, and counts it."""

    def __init__(self, tracer: Tracer, stream: str, epoch: int, now_ns: int, count: Callable[[str], None]) -> None:
        self._count = count
        self._tracer, self._stream, self._began_ns = tracer, stream, now_ns
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._ended: deque[ChunkEnd] = deque(maxlen=MAX_TOLD)
        self._root: SpanContext | None = start_stream_trace(tracer, stream, epoch)

    def captured(self, stamp: ChunkStamp) -> None:
        """Ingest numbered it."""
        if stamp.chunk not in self._open:
            self._open[stamp.chunk] = _Open(stamp)
            while len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
                self._count("chunks_forgotten")

    def came(self, message: FramesDecoded | ChunkDropped, ready_ns: int = 0) -> None:
        """Its pixels are here since ``ready_ns``, or somebody gave it up."""
        self.captured(message.stamp)
        known = self._open.get(message.stamp.chunk)
        if known is not None and not known.ready_ns:  # else who gave it up was wrong
            known.timings, known.ready_ns = message.timings, ready_ns

    def shown(self, chunk: int, now_ns: int) -> None:
        """One of its frames is shown: from the first on it does not wait any more."""
        if (known := self._open.get(chunk)) is not None and not known.shown_ns:
            known.shown_ns = now_ns

    def closed(self, verdicts: Iterable[ChunkVerdict], now_ns: int, failed: bool = False) -> None:
        """Chunks have their verdicts; ``failed``: because the stream did."""
        for verdict in verdicts:
            known = self._open.pop(verdict.chunk, None)
            end = _end_of(verdict, known, now_ns, failed)
            if len(self._ended) == MAX_TOLD:
                self._count("ends_untold")
            self._ended.append(end)
            if known is not None:
                record_end(self._tracer, known.stamp, end, known.timings, self._root)

    def take(self) -> tuple[ChunkEnd, ...]:
        """The ends that have not been told yet."""
        told = tuple(self._ended)
        self._ended.clear()
        return told

    def finish(self, failure: str, totals: LedgerTotals) -> None:
        """The stream is over: its own span."""
        figures = {f"stream.frames.{name}": getattr(totals, name) for name in ("on_time", "late", "skipped")}
        figures["stream.frames.dropped"] = totals.dropped_total
        end_stream_trace(self._tracer, self._stream, self._root, self._began_ns, failure, **figures)


def _end_of(verdict: ChunkVerdict, known: _Open | None, now_ns: int, failed: bool) -> ChunkEnd:
    word = _word(verdict, failed)
    reason = next(iter(verdict.dropped), "")
    if known is None:
        return ChunkEnd(chunk=verdict.chunk, verdict=word, closed_ns=now_ns, reason=reason)
    stamp, after_ns = known.stamp, ended_ns(known.stamp, known.timings)
    begin = known.shown_ns or now_ns
    arrived = min(known.ready_ns or after_ns, begin)
    return ChunkEnd(
        chunk=verdict.chunk,
        verdict=word,
        closed_ns=now_ns,
        captured_ns=stamp.frames[0].captured_ns if stamp.frames else 0,
        reason=reason,
        trace=stamp.trace,
        egress=timing_of(EGRESS, after_ns, arrived, begin, (now_ns - begin) / NS_PER_MS),
    )


def _word(verdict: ChunkVerdict, failed: bool) -> Verdict:
    if verdict.dropped:
        return Verdict.FAILED if failed else Verdict.DROPPED
    if verdict.late:
        return Verdict.LATE
    return Verdict.SKIPPED if verdict.skipped else Verdict.ON_TIME
