"""Spans of a chunk's way: one root per chunk, two children per hop (its wait, its work), whatever batch it travelled in.

They are made of the same :class:`StageTiming` that travels with the chunk: what Jaeger shows is what the waterfall shows.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import Link, NoOpTracer, SpanContext, SpanKind, Status, StatusCode, TraceFlags, Tracer

from shared.contracts.events import ChunkStamp
from shared.contracts.timing import NS_PER_MS, ChunkEnd, StageTiming, Verdict, ingest_timings
from shared.telemetry import names
from shared.telemetry.propagation import GIVEN, as_sampled, context_of, is_sampled, span_context_of, traceparent_of

SHORT_NS = 500_000  # a wait below this gets no span of its own
_KINDS = {"send": SpanKind.PRODUCER, "process": SpanKind.CONSUMER}
_BAD = (Verdict.DROPPED, Verdict.FAILED)


def start_chunk_trace(tracer: Tracer, ratio: float = 1.0) -> str:
    """A chunk's trace: its root span's W3C traceparent, to be put into the stamp; "" when nothing is recorded.

    A share ``ratio`` of them is sampled, by the trace id. The root itself is written down by who closes the chunk.
    """
    if isinstance(tracer, NoOpTracer):
        return ""
    trace_id, span_id = random.getrandbits(128) or 1, random.getrandbits(64) or 1
    sampled = (trace_id & (2**64 - 1)) < ratio * 2**64
    return traceparent_of(SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(int(sampled))))


def _attributes(timing: StageTiming, stamp: ChunkStamp) -> dict[str, Any]:
    told: dict[str, Any] = {
        names.STREAM: stamp.stream,
        names.CHUNK: stamp.chunk,
        names.EPOCH: stamp.epoch,
        names.HOP: timing.hop,
    }
    if timing.instance:
        told[names.INSTANCE] = timing.instance
    if timing.pipeline:
        told[names.PIPELINE] = timing.pipeline
    if timing.stage >= 0:
        told[names.STAGE_INDEX] = timing.stage
    return told


def _messaging(timing: StageTiming, stamp: ChunkStamp) -> dict[str, Any]:
    operation = names.OPERATIONS.get(timing.hop)
    if operation is None:
        return {}
    return {
        names.MESSAGING_SYSTEM: "nats",
        names.OPERATION: operation.name,
        names.OPERATION_TYPE: operation.kind,
        names.TEMPLATE: operation.destination,
        names.DESTINATION: operation.destination.format(
            stream=stamp.stream, pipeline=timing.pipeline, stage=timing.stage
        ),
    }


def record_hop(
    tracer: Tracer,
    stamp: ChunkStamp,
    timing: StageTiming,
    error: BaseException | None = None,
    parent: str = "",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """One hop of a chunk that was measured: the span of its wait (transfer, then queue), and that of its work.

    ``parent``: another traceparent than the stamp's; ``extra``: more attributes. A hop that only waits (the scheduler's) has
    its queue as work. Costs next to nothing when nothing is recorded, or not this trace.
    """
    parent = parent or stamp.trace
    if isinstance(tracer, NoOpTracer) or not is_sampled(parent) or (context := context_of(parent)) is None:
        return
    arrived, end = timing.arrived_ns, timing.end_ns
    left = arrived - round(timing.transfer_ms * NS_PER_MS)
    begin = timing.begin_ns if timing.compute_ms else arrived
    told = {**_attributes(timing, stamp), **(extra or {})}
    figures = {names.TRANSFER_MS: timing.transfer_ms, names.QUEUE_MS: timing.queue_ms}
    if begin - left > SHORT_NS:
        wait = tracer.start_span(
            names.wait_span_name(timing.hop), context=context, start_time=left, attributes={**told, **figures}
        )
        wait.add_event("received", timestamp=arrived)
        wait.end(end_time=begin)
    operation = names.OPERATIONS.get(timing.hop)
    span = tracer.start_span(
        names.hop_span_name(timing.hop),
        context=context,
        kind=_KINDS[operation.kind] if operation is not None else SpanKind.INTERNAL,
        start_time=begin,
        attributes={**told, **_messaging(timing, stamp), **figures, names.COMPUTE_MS: timing.compute_ms},
    )
    if error is not None:
        span.record_exception(error, timestamp=end)
        span.set_status(Status(StatusCode.ERROR, str(error)))
    span.end(end_time=max(begin, end))


def record_ingest(tracer: Tracer, stamp: ChunkStamp) -> None:
    """The hops that the stamp tells of."""
    if not isinstance(tracer, NoOpTracer):
        for timing in ingest_timings(stamp):
            record_hop(tracer, stamp, timing)


def record_end(
    tracer: Tracer, stamp: ChunkStamp, end: ChunkEnd, timings: tuple[StageTiming, ...], stream: SpanContext | None
) -> None:
    """A chunk is closed: its root span, from its capture to its verdict, linked to its stream's; and egress' own hop.

    What is late, dropped or failed and was not in the share is written down as a whole, out of the ``timings`` that
    came along: a share never costs a bad chunk its trace.
    """
    sampled, good = is_sampled(stamp.trace), end.verdict in (Verdict.ON_TIME, Verdict.SKIPPED)
    if isinstance(tracer, NoOpTracer) or (good and not sampled) or (given := span_context_of(stamp.trace)) is None:
        return
    parent = as_sampled(stamp.trace)
    if not sampled:
        for timing in (*ingest_timings(stamp), *timings):
            if timing.begin_ns:
                record_hop(tracer, stamp, timing, parent=parent)
    record_hop(tracer, stamp, end.egress, parent=parent)
    attributes: dict[str, Any] = {
        names.STREAM: stamp.stream,
        names.CHUNK: stamp.chunk,
        names.EPOCH: stamp.epoch,
        names.FRAMES_IN_CHUNK: len(stamp.frames),
        names.VERDICT: end.verdict.value,
    }
    if end.reason:
        attributes[names.REASON] = end.reason
    if not sampled:
        attributes[names.KEPT] = True
    token = GIVEN.set(given)
    try:
        root = tracer.start_span(
            names.CHUNK_SPAN,
            context=Context(),
            start_time=end.captured_ns or stamp.published_ns,
            attributes=attributes,
            links=[] if stream is None else [Link(stream, {names.STREAM: stamp.stream})],
        )
    finally:
        GIVEN.reset(token)
    if end.verdict in _BAD:
        root.set_status(Status(StatusCode.ERROR, end.reason or end.verdict.value))
    root.end(end_time=max(end.closed_ns, end.egress.end_ns))


def start_stream_trace(tracer: Tracer, stream: str, epoch: int, **attributes: Any) -> SpanContext | None:
    """The root of a stream's own trace: exported at once, so that chunks' links lead somewhere while it lasts."""
    if isinstance(tracer, NoOpTracer):
        return None
    told = {names.STREAM: stream, names.EPOCH: epoch, names.STREAM_SPAN: "start", **attributes}
    span = tracer.start_span(names.STREAM_START, context=Context(), attributes=told)
    span.end()
    return span.get_span_context()


def end_stream_trace(
    tracer: Tracer, stream: str, root: SpanContext | None, began_ns: int, failure: str, **attributes: Any
) -> None:
    """The stream's whole life, as the child of its start."""
    if root is None or (context := context_of(traceparent_of(root))) is None:
        return
    told = {names.STREAM: stream, names.STREAM_SPAN: "whole", **attributes}
    span = tracer.start_span(names.STREAM_WHOLE, context=context, start_time=began_ns, attributes=told)
    if failure:
        span.set_status(Status(StatusCode.ERROR, failure))
    span.end()
