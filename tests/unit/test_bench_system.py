"""The benchmark of the whole system: what it makes of what it hears, and its command line."""

from __future__ import annotations

import pytest

from bench.system.__main__ import arguments
from bench.system.arrivals import summary
from bench.system.driver import Decoded, Watched, machine
from bench.system.latency import breakdown, percentile
from bench.system.stall import back_s
from bench.system.tenants import latencies
from shared.contracts.commands import PatternSource, StreamSpec
from shared.contracts.events import ChunkClosed, EventKind, LedgerTotals, StreamEvent, StreamStats

MS = 1_000_000
SPEC = StreamSpec(source=PatternSource(), prompt="a drawing", deadline_ms=600)


def watched(**stats: float) -> Watched:
    stream = Watched("s", SPEC, asked_ns=0)
    totals = LedgerTotals(frames_in=100, on_time=80, skipped=10, dropped={"scheduler:stale": 10})
    stream.final = StreamEvent(
        stream="s",
        event=EventKind.STOPPED,
        service="egress",
        at_ns=0,
        totals=totals,
        stats=StreamStats.model_validate(stats),
    )
    return stream


def closed(at_ms: int, on_time: int, latency_ms: float) -> tuple[int, ChunkClosed]:
    totals = LedgerTotals(frames_in=on_time, on_time=on_time)
    message = ChunkClosed(
        stream="s", epoch=1, closed_chunks=on_time, through=on_time, totals=totals, latency_ms=latency_ms
    )
    return at_ms * MS, message


def test_the_way_of_a_chunk_is_told_in_medians_without_its_beginning() -> None:
    hops = (("encode", 1.0, 10.0), ("stage", 2.0, 40.0), ("stage", 2.0, 40.0), ("decode", 0.0, 30.0))
    chunks = [Decoded(n, 0, 187 * MS, 190 * MS, (n < 8) * 900 * MS + 330 * MS, hops) for n in range(20)]
    told = breakdown(chunks)
    assert told["collecting_ms"] == 187.0
    assert told["publishing_ms"] == 3.0
    assert told["ready_p95_ms"] == 330.0
    assert told["worked_ms"] == {"encode": 10.0, "stage": 80.0, "decode": 30.0}
    assert breakdown(chunks[:4]) == {}


def test_percentiles_are_by_nearest_rank() -> None:
    values = [float(n) for n in range(1, 101)]
    assert percentile(values, 0.5) == 50.0
    assert percentile(values, 0.95) == 95.0
    assert percentile([], 0.5) == 0.0


def test_what_was_skipped_counts_as_attained_and_the_worst_stream_is_told() -> None:
    streams = [watched(cpr=1.0, latency_p95_ms=300.0), watched(cpr=0.9, latency_p95_ms=500.0)]
    told = summary(streams)
    assert told["attained"]["p50"] == 0.9
    assert told["cpr"]["worst"] == 0.9
    assert told["latency_p95_ms"]["worst"] == 500.0
    assert told["reconciles"]
    assert summary([]) == {"streams": 0}


def test_a_stream_is_back_with_the_first_chunk_in_time_after_the_stall() -> None:
    stream = watched()
    stream.closed = [closed(900, 40, 350.0), closed(2100, 40, 1200.0), closed(2300, 44, 700.0), closed(2500, 48, 380.0)]
    assert back_s(stream, 2000 * MS) == 0.5
    assert back_s(stream, 2600 * MS) is None


def test_a_phase_has_the_chunks_of_its_time_alone() -> None:
    stream = watched()
    stream.closed = [closed(900, 40, 999.0), closed(1100, 44, 410.0), closed(1900, 48, 420.0), closed(2000, 52, 999.0)]
    stream.decoded = [Decoded(n, 0, 0, 0, at * MS, ()) for n, at in enumerate((999, 1000, 1500, 2000))]
    told = latencies(stream, 1000 * MS, 2000 * MS)
    assert (told["shown_p50_ms"], told["shown_p95_ms"]) == (410.0, 420.0)
    assert (told["chunks"], told["ready_p95_ms"]) == (2, 1500.0)


def test_each_measure_is_one_command() -> None:
    for what in ("ratio", "latency", "stall", "arrivals", "capacity", "batching", "tenants"):
        given = arguments().parse_args([what, "--json"])
        assert given.what == what
        assert given.json
    assert arguments().parse_args(["latency", "--size", "640x352"]).size == (640, 352)
    with pytest.raises(SystemExit):
        arguments().parse_args(["latency", "--size", "big"])
    assert "cores" in machine()
