"""Telemetry against a real OTLP/HTTP receiver: one chunk is one trace, over services and over the bus."""

from __future__ import annotations

import time

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from shared.bus.memory import MemoryBus
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.events import Beat, ChunkEnd, ChunkStamp, FrameStamp, StageTiming, Verdict
from shared.contracts.timing import timing_of
from shared.telemetry import names
from shared.telemetry.hops import (
    end_stream_trace,
    record_end,
    record_hop,
    record_ingest,
    start_chunk_trace,
    start_stream_trace,
)
from shared.telemetry.setup import setup
from tests.support.messages import stamp
from tests.support.otlp import attributes, otlp_receiver

pytestmark = pytest.mark.integration


MS = 1_000_000
T0 = 1_700_000_000 * 10**9


def on_its_way(chunk: int, trace: str) -> tuple[ChunkStamp, StageTiming, StageTiming, ChunkEnd]:
    """A chunk that was captured for 40 ms, encoded for 10, waited 25 for the scheduler, and was shown."""
    frames = tuple(FrameStamp(index=n, pts=n, captured_ns=T0 + n * 10 * MS) for n in range(5))
    of = stamp(chunk=chunk, epoch=2, trace=trace, frames=frames, begun_ns=T0 + 42 * MS, published_ns=T0 + 43 * MS)
    encode = timing_of("encode", of.published_ns, T0 + 44 * MS, T0 + 47 * MS, 10.0, instance="worker-1")
    stage = timing_of("stage", encode.end_ns, T0 + 60 * MS, T0 + 60 * MS, 20.0, pipeline="p0", stage=1)
    egress = timing_of("egress", stage.end_ns, T0 + 82 * MS, T0 + 100 * MS, 40.0)
    verdict = Verdict.LATE if chunk else Verdict.ON_TIME
    end = ChunkEnd(chunk=chunk, verdict=verdict, closed_ns=egress.end_ns, captured_ns=T0, trace=trace, egress=egress)
    return of, encode, stage, end


def uncovered_ms(root: Span, spans: list[Span]) -> float:
    """The longest time of the root in which none of its children is under way."""
    at, longest = root.start_time_unix_nano, 0
    for span in sorted(spans, key=lambda each: each.start_time_unix_nano):
        longest = max(longest, span.start_time_unix_nano - at)
        at = max(at, span.end_time_unix_nano)
    return max(longest, root.end_time_unix_nano - at) / MS


@pytest.mark.parametrize("ratio", [1.0, 0.0])
def test_the_hops_of_a_chunk_are_children_of_its_trace(ratio: float) -> None:
    """Of the second share nothing is written down but the late chunk, and that as a whole."""
    with otlp_receiver() as (endpoint, receiver):
        worker, egress = setup("worker", "worker-1", endpoint + "/"), setup("egress", "egress-1", endpoint)
        stream = start_stream_trace(egress.tracer, "s1", 2)
        for number in range(2):
            of, encode, stage, end = on_its_way(number, start_chunk_trace(egress.tracer, ratio))
            record_ingest(egress.tracer, of)
            record_hop(worker.tracer, of, encode)
            record_hop(worker.tracer, of, stage, extra={names.STEP: 1})
            record_end(egress.tracer, of, end, (encode, stage), stream)
        end_stream_trace(egress.tracer, "s1", stream, T0, "", frames=10)
        worker.shutdown()
        egress.shutdown()

    roots = {attributes(span)[names.CHUNK]: span for span in receiver.named(names.CHUNK_SPAN)}
    assert set(roots) == ({0, 1} if ratio else {1})
    (start,), (whole,) = receiver.named(names.STREAM_START), receiver.named(names.STREAM_WHOLE)
    assert whole.parent_span_id == start.span_id
    chunks = [span for span in receiver.spans if names.CHUNK in attributes(span)]
    assert {span.trace_id for span in chunks} == {root.trace_id for root in roots.values()}
    for number, root in roots.items():
        told = attributes(root)
        assert (root.start_time_unix_nano, root.end_time_unix_nano) == (T0, T0 + 140 * MS)
        assert (told[names.STREAM], told[names.EPOCH], told[names.FRAMES_IN_CHUNK]) == ("s1", 2, 5)
        assert told[names.VERDICT] == ("late" if number else "on_time")
        assert told.get(names.KEPT, False) is not bool(ratio)
        assert [link.span_id for link in root.links] == [start.span_id]
        mine = [span for span in chunks if span.trace_id == root.trace_id and span is not root]
        assert {span.parent_span_id for span in mine} == {root.span_id}
        assert {attributes(span)[names.HOP] for span in mine} == {"capture", "ingest", "encode", "stage", "egress"}
        assert uncovered_ms(root, mine) <= 0.5
        (encoded,) = [span for span in mine if span.name == "encode rheo.stream.{stream}.chunk"]
        told = attributes(encoded)
        assert encoded.kind == Span.SPAN_KIND_CONSUMER
        assert (told[names.TRANSFER_MS], told[names.QUEUE_MS], told[names.COMPUTE_MS]) == (1.0, 3.0, 10.0)
        assert told["messaging.system"] == "nats"
        assert told["messaging.operation.type"] == "process"
        assert told["messaging.destination.name"] == "rheo.stream.s1.chunk"
        assert (encoded.start_time_unix_nano, encoded.end_time_unix_nano) == (T0 + 47 * MS, T0 + 57 * MS)
        (denoised,) = [span for span in mine if attributes(span)[names.HOP] == "stage" and "wait" not in span.name]
        assert attributes(denoised)["messaging.destination.name"] == "rheo.pipeline.p0.stage.1"
    if ratio:
        assert receiver.services == {"rheocast-worker", "rheocast-egress"}


def test_a_hop_that_raises_is_marked_so_and_what_was_dropped_is_an_error() -> None:
    with otlp_receiver() as (endpoint, receiver):
        telemetry = setup("worker", "worker-1", endpoint)
        of, encode, _, end = on_its_way(1, start_chunk_trace(telemetry.tracer, 0.0))
        dropped = end.model_copy(update={"verdict": Verdict.DROPPED, "reason": "worker:error"})
        record_end(telemetry.tracer, of, dropped, (encode,), None)
        again = of.model_copy(update={"trace": start_chunk_trace(telemetry.tracer)})
        record_hop(telemetry.tracer, again, encode, ValueError("out of memory"))
        telemetry.shutdown()
    (root,) = receiver.named(names.CHUNK_SPAN)
    assert (root.status.code, root.status.message) == (Status.STATUS_CODE_ERROR, "worker:error")
    assert attributes(root)[names.REASON] == "worker:error"
    (failed,) = [span for span in receiver.spans if span.events and span.events[0].name == "exception"]
    assert failed.status.message == "out of memory"


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
    start_stream_trace(telemetry.tracer, "s1", 0)
    began = time.monotonic()
    telemetry.shutdown()
    assert time.monotonic() - began < 20
