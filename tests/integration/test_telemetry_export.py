"""Telemetry against a real OTLP/HTTP receiver: one chunk is one trace, over services and over the bus."""

from __future__ import annotations

import time

import pytest

from shared.bus.memory import MemoryBus
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.events import Beat
from shared.telemetry import names
from shared.telemetry.hops import hop_span, record_hop, start_chunk_trace
from shared.telemetry.setup import setup
from tests.support.messages import stamp
from tests.support.otlp import attributes, otlp_receiver

pytestmark = pytest.mark.integration


def test_the_hops_of_a_chunk_are_children_of_its_trace() -> None:
    with otlp_receiver() as (endpoint, receiver):
        ingest = setup("ingest", "ingest-1", endpoint)
        worker = setup("worker", "worker-1", endpoint + "/")
        chunks = [
            stamp(chunk=number, epoch=2, trace=start_chunk_trace(ingest.tracer, "s1", number)) for number in range(2)
        ]
        with hop_span(worker.tracer, "encode", chunks[0], queue_ms=3.5) as span:
            span.set_attribute("extra", 7)
            time.sleep(0.01)
        now = time.time_ns()
        for chunk in chunks:  # one batch, two chunks: each has its own span of the batch's time
            record_hop(worker.tracer, "stage", chunk, now - 20_000_000, now, 1.5, batch=2)
        ingest.shutdown()
        worker.shutdown()

        roots = {span.trace_id: span for span in receiver.named(names.CHUNK_SPAN)}
        assert len(roots) == 2
        (encode,) = receiver.named("hop encode")
        stages = receiver.named("hop stage")
        assert {span.trace_id for span in stages} == set(roots)
        for span in (encode, *stages):
            assert span.parent_span_id == roots[span.trace_id].span_id
        told = attributes(encode)
        assert told[names.STREAM] == "s1"
        assert told[names.CHUNK] == 0
        assert told[names.EPOCH] == 2
        assert told[names.QUEUE_MS] == 3.5
        assert 10 <= told[names.COMPUTE_MS] < 1000
        assert told["extra"] == 7
        assert attributes(stages[0])[names.COMPUTE_MS] == 20.0
        assert stages[0].end_time_unix_nano == now
        assert receiver.services == {"rheocast-ingest", "rheocast-worker"}


def test_a_hop_that_raises_is_marked_so() -> None:
    with otlp_receiver() as (endpoint, receiver):
        telemetry = setup("worker", "worker-1", endpoint)
        chunk = stamp(trace=start_chunk_trace(telemetry.tracer, "s1", 0))
        with pytest.raises(ValueError, match="out of memory"), hop_span(telemetry.tracer, "decode", chunk):
            raise ValueError("out of memory")
        telemetry.shutdown()
        (span,) = receiver.named("hop decode")
        assert span.status.message == "out of memory"
        assert span.events[0].name == "exception"


async def test_a_span_made_in_a_handler_belongs_to_the_senders_trace() -> None:
    with otlp_receiver() as (endpoint, receiver):
        telemetry, bus = setup("scheduler", "scheduler-1", endpoint), MemoryBus()

        async def handle(_: Received) -> None:
            with telemetry.tracer.start_as_current_span("received"):
                pass

        subscription = await bus.subscribe(subjects.beat("w"), handle)
        with telemetry.tracer.start_as_current_span("sent"):
            await bus.publish(subjects.beat("w"), Beat(service="t", instance="w", incarnation="1"))
        await subscription.drain()
        telemetry.shutdown()
        (sent,), (received,) = receiver.named("sent"), receiver.named("received")
        assert received.trace_id == sent.trace_id
        assert received.parent_span_id == sent.span_id


def test_metrics_arrive() -> None:
    with otlp_receiver() as (endpoint, receiver):
        telemetry = setup("egress", "egress-1", endpoint)
        frames = telemetry.meter.create_counter(names.FRAMES)
        frames.add(4, {"verdict": "on_time"})
        frames.add(1, {"verdict": "late"})
        telemetry.shutdown()
        points = receiver.metrics[names.FRAMES][-1].sum.data_points
        assert sorted(point.as_int for point in points) == [1, 4]


def test_a_receiver_that_is_away_delays_the_end_but_does_not_break_it() -> None:
    telemetry = setup("egress", "egress-1", "http://127.0.0.1:9")
    start_chunk_trace(telemetry.tracer, "s1", 0)
    began = time.monotonic()
    telemetry.shutdown()
    assert time.monotonic() - began < 20
