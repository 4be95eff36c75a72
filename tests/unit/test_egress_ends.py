"""What egress tells of a chunk that is closed, and which traces it writes down, whatever the share is."""

from __future__ import annotations

from collections import Counter

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from services.egress.ends import MAX_OPEN, MAX_TOLD, ChunkEnds
from services.egress.ledger import ChunkVerdict
from shared.contracts.events import ChunkDropped, ChunkStamp, FramesDecoded, FrameStamp, LedgerTotals, Verdict
from shared.contracts.timing import timing_of
from shared.telemetry import names
from shared.telemetry.hops import start_chunk_trace
from shared.telemetry.ids import GivenIds
from shared.telemetry.propagation import span_context_of
from shared.telemetry.setup import silent
from tests.support.messages import ref
from tests.support.messages import stamp as stamp_of

MS = 1_000_000
T0 = 1_700_000_000 * 10**9


class Bench:
    """The ends of a stream, and the spans that come of them."""

    def __init__(self, ratio: float = 1.0) -> None:
        self.ratio, self.exporter = ratio, InMemorySpanExporter()
        provider = TracerProvider(id_generator=GivenIds())
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("t")
        self.ends = ChunkEnds(self.tracer, "s1", 1, T0, list[str]().append)

    def stamp(self, chunk: int) -> ChunkStamp:
        frames = tuple(FrameStamp(index=n, pts=n, captured_ns=T0 + n * 40 * MS) for n in range(4))
        trace = start_chunk_trace(self.tracer, self.ratio)
        return stamp_of("s1", chunk, trace=trace, frames=frames, begun_ns=T0 + 121 * MS, published_ns=T0 + 125 * MS)

    def roots(self) -> dict[int, str]:
        spans = [span for span in self.exporter.get_finished_spans() if span.name == names.CHUNK_SPAN]
        return {
            int(span.attributes[names.CHUNK]): str(span.attributes[names.VERDICT]) for span in spans if span.attributes
        }


DECODE = timing_of("decode", T0 + 125 * MS, T0 + 126 * MS, T0 + 130 * MS, 20.0)


def play(bench: Bench, chunk: int, verdict: ChunkVerdict, failed: bool = False) -> ChunkStamp:
    """A chunk that came at 160 ms, was shown from 200 ms on, and was closed at 320 ms."""
    stamp = bench.stamp(chunk)
    bench.ends.captured(stamp)
    shown = FramesDecoded(stamp=stamp, pixels=ref(), steps=1, prompt_version=1, timings=(DECODE,))
    bench.ends.came(shown, T0 + 160 * MS)
    bench.ends.came(ChunkDropped(stamp=stamp, service="worker", reason="stale"))  # it is here: whoever says so is wrong
    for at in (200, 240, 280, 320):
        bench.ends.shown(chunk, T0 + at * MS)
    bench.ends.closed([verdict], T0 + 320 * MS, failed)
    return stamp


def test_a_chunk_that_was_shown_waited_for_its_playout_and_then_took_its_own_time() -> None:
    bench = Bench()
    stamp = play(bench, 3, ChunkVerdict(3, on_time=4))
    (end,) = bench.ends.take()
    assert (end.chunk, end.verdict, end.closed_ns, end.captured_ns, end.trace) == (
        3,
        Verdict.ON_TIME,
        T0 + 320 * MS,
        T0,
        stamp.trace,
    )
    assert (end.egress.transfer_ms, end.egress.queue_ms, end.egress.compute_ms) == (10.0, 40.0, 120.0)
    assert bench.ends.take() == (), "told once"
    (root,) = [span for span in bench.exporter.get_finished_spans() if span.name == names.CHUNK_SPAN]
    given = span_context_of(stamp.trace)
    assert given is not None
    assert root.context is not None
    assert (root.context.trace_id, root.context.span_id) == (given.trace_id, given.span_id), "as ingest named it"
    assert root.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_worst_of_its_frames_is_a_chunks_verdict_and_bad_ones_are_always_written_down(ratio: float) -> None:
    bench = Bench(ratio)
    play(bench, 0, ChunkVerdict(0, on_time=4))
    play(bench, 1, ChunkVerdict(1, on_time=3, late=1))
    play(bench, 2, ChunkVerdict(2, late=2, dropped={"egress:sink_full": 2}))
    play(bench, 3, ChunkVerdict(3, skipped=4))
    play(bench, 4, ChunkVerdict(4, dropped={"egress:failed": 4}), failed=True)
    play(bench, 5, ChunkVerdict(5, on_time=4), failed=True)
    told = {end.chunk: (end.verdict.value, end.reason) for end in bench.ends.take()}
    assert told == {
        0: ("on_time", ""),
        1: ("late", ""),
        2: ("dropped", "egress:sink_full"),
        3: ("skipped", ""),
        4: ("failed", "egress:failed"),
        5: ("on_time", ""),
    }
    bad = {1: "late", 2: "dropped", 4: "failed"}
    assert bench.roots() == ({chunk: verdict for chunk, (verdict, _) in told.items()} if ratio else bad)
    for span in bench.exporter.get_finished_spans():
        if (
            span.name == names.CHUNK_SPAN
            and span.attributes
            and span.attributes[names.VERDICT] in ("dropped", "failed")
        ):
            assert span.status.status_code is StatusCode.ERROR


def test_what_was_given_up_has_waited_until_it_was_closed() -> None:
    bench = Bench()
    stamp = bench.stamp(1)
    bench.ends.captured(stamp)
    bench.ends.came(ChunkDropped(stamp=stamp, service="scheduler", reason="stale", timings=(DECODE,)))
    lost = bench.stamp(2)
    bench.ends.captured(lost)
    verdicts = [ChunkVerdict(n, dropped={"scheduler:stale" if n == 1 else "egress:lost": 4}) for n in (1, 2, 3)]
    bench.ends.closed(verdicts, T0 + 900 * MS)
    given_up, never_came, unknown = bench.ends.take()
    assert (given_up.egress.arrived_ns, given_up.egress.end_ns) == (DECODE.end_ns, T0 + 900 * MS)
    assert (never_came.egress.arrived_ns, never_came.egress.end_ns) == (lost.published_ns, T0 + 900 * MS)
    assert (unknown.captured_ns, unknown.trace, unknown.egress.begin_ns) == (0, "", 0), "of its number alone"
    assert bench.roots() == {1: "dropped", 2: "dropped"}


def test_memory_stays_flat_when_nothing_is_closed_or_nobody_asks() -> None:
    counted: list[str] = []
    bench = ChunkEnds(silent().tracer, "s1", 1, T0, counted.append)
    for chunk in range(3 * MAX_OPEN):
        bench.captured(stamp_of("s1", chunk))
    bench.closed([ChunkVerdict(chunk, on_time=4) for chunk in range(3 * MAX_OPEN)], T0)
    assert [end.chunk for end in bench.take()] == list(range(3 * MAX_OPEN - MAX_TOLD, 3 * MAX_OPEN))
    assert Counter(counted) == {"chunks_forgotten": 2 * MAX_OPEN, "ends_untold": 3 * MAX_OPEN - MAX_TOLD}


def test_the_streams_own_span_tells_how_it_ended() -> None:
    bench = Bench()
    bench.ends.finish("egress was shut down", LedgerTotals(frames_in=9, on_time=5, dropped={"egress:shut_down": 4}))
    start, whole = bench.exporter.get_finished_spans()
    assert whole.parent is not None
    assert start.context is not None
    assert whole.parent.span_id == start.context.span_id
    assert whole.start_time == T0
    assert (whole.status.status_code, whole.status.description) == (StatusCode.ERROR, "egress was shut down")
    assert whole.attributes is not None
    assert (whole.attributes["stream.frames.on_time"], whole.attributes["stream.frames.dropped"]) == (5, 4)
