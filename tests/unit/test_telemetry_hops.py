"""Trace context by hand: what is read is what was written, and without an endpoint nothing happens."""

from __future__ import annotations

import subprocess
import sys
import timeit
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.trace import Span, SpanContext, TraceFlags, Tracer

from shared.contracts.events import FrameStamp
from shared.contracts.timing import ingest_timings, timing_of
from shared.telemetry.hops import record_hop, start_chunk_trace
from shared.telemetry.propagation import (
    as_sampled,
    attach,
    context_of,
    detach,
    inject,
    is_sampled,
    span_context_of,
    traceparent_of,
)
from shared.telemetry.setup import setup
from tests.support.messages import stamp

PARENT = f"00-{0xABC:032x}-{0xDEF:016x}-01"


def test_a_traceparent_survives_the_way_there_and_back() -> None:
    context = SpanContext(0xABC, 0xDEF, is_remote=True, trace_flags=TraceFlags(1))
    assert traceparent_of(context) == PARENT
    assert span_context_of(PARENT) == context


@pytest.mark.parametrize(
    "text", ["", "rubbish", PARENT.upper(), PARENT + "-x", PARENT.replace("00-", "01-", 1), f"00-{0:032x}-{1:016x}-01"]
)
def test_a_malformed_traceparent_is_no_context(text: str) -> None:
    assert context_of(text) is None


def test_the_current_context_is_injected_unless_the_sender_chose_one() -> None:
    assert inject() is None
    assert inject({"a": "b"}) == {"a": "b"}
    token = attach({"traceparent": PARENT})
    try:
        assert inject({"a": "b"}) == {"a": "b", "traceparent": PARENT}
        other = {"traceparent": PARENT.replace("abc", "123")}
        assert inject(other) == other
    finally:
        detach(token)
    assert not trace.get_current_span().get_span_context().is_valid


def test_without_an_endpoint_nothing_is_traced_and_it_costs_microseconds() -> None:
    telemetry = setup("test", "test-1", "")
    assert not telemetry.enabled
    assert start_chunk_trace(telemetry.tracer) == ""
    chunk, timing = stamp(trace=PARENT), timing_of("encode", 1, 2, 3, 1.0)
    assert timeit.timeit(lambda: record_hop(telemetry.tracer, chunk, timing), number=2000) / 2000 < 50e-6
    telemetry.shutdown()


def test_nothing_lies_between_two_hops_and_a_clock_that_is_behind_makes_no_negative_wait() -> None:
    first = timing_of("encode", 1_000_000, 3_000_000, 4_000_000, 6.0)
    assert (first.transfer_ms, first.queue_ms, first.arrived_ns, first.end_ns) == (2.0, 1.0, 3_000_000, 10_000_000)
    second = timing_of("motion", first.end_ns, 9_000_000, 9_500_000, 0.25)
    assert (second.transfer_ms, second.queue_ms) == (0.0, 0.5)
    assert timing_of("motion", 0, 5, 6).transfer_ms == 0.0, "who came before did not say when"


def test_the_stamp_tells_of_capture_and_ingest() -> None:
    frames = tuple(FrameStamp(index=n, pts=n, captured_ns=n * 10_000_000) for n in range(1, 5))
    chunk = stamp(chunk=1, frames=frames, begun_ns=47_000_000, published_ns=50_000_000)
    capture, ingest = ingest_timings(chunk)
    assert (capture.begin_ns, capture.compute_ms, capture.end_ns) == (10_000_000, 30.0, 40_000_000)
    assert (ingest.queue_ms, ingest.compute_ms, ingest.end_ns) == (7.0, 3.0, 50_000_000)
    assert ingest_timings(stamp(chunk=1, frames=frames)) == (), "of a sender that does not say when"


def test_a_share_of_chunks_is_sampled_by_its_trace_id() -> None:
    class Recording(Tracer):
        def start_span(self, *_: object, **__: object) -> Span:
            raise NotImplementedError

        def start_as_current_span(self, *_: object, **__: object) -> Any:
            raise NotImplementedError

    shares = [sum(is_sampled(start_chunk_trace(Recording(), ratio)) for _ in range(2000)) for ratio in (0, 0.25, 1)]
    assert shares[0] == 0
    assert 380 < shares[1] < 620
    assert shares[2] == 2000
    outside = start_chunk_trace(Recording(), 0.0)
    assert span_context_of(as_sampled(outside)) is not None
    assert is_sampled(as_sampled(outside))
    assert as_sampled("") == ""


def test_the_exporters_are_not_even_imported_without_an_endpoint() -> None:
    code = (
        "import sys, shared.lifecycle; from shared.telemetry.setup import setup; setup('a', 'b', '');"
        "heavy = ('opentelemetry.exporter', 'opentelemetry.sdk.trace', 'torch', 'google.protobuf');"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
