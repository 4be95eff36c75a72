"""Trace context by hand: what is read is what was written, and without an endpoint nothing happens."""

from __future__ import annotations

import subprocess
import sys
import timeit

import pytest
from opentelemetry import trace
from opentelemetry.trace import SpanContext, TraceFlags

from shared.telemetry.hops import hop_span, record_hop, start_chunk_trace
from shared.telemetry.propagation import attach, context_of, detach, inject, span_context_of, traceparent_of
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
    assert start_chunk_trace(telemetry.tracer, "s1", 0) == ""
    chunk = stamp(trace=PARENT)

    def hop() -> None:
        with hop_span(telemetry.tracer, "encode", chunk, 1.0) as span:
            assert not span.is_recording()
        record_hop(telemetry.tracer, "stage", chunk, 1, 2)

    assert timeit.timeit(hop, number=2000) / 2000 < 50e-6
    telemetry.shutdown()


def test_the_exporters_are_not_even_imported_without_an_endpoint() -> None:
    code = (
        "import sys, shared.lifecycle; from shared.telemetry.setup import setup; setup('a', 'b', '');"
        "heavy = ('opentelemetry.exporter', 'opentelemetry.sdk.trace', 'torch', 'google.protobuf');"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
