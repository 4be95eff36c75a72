"""Spans of a chunk's way: one root per chunk made by ingest, one child per hop, whatever batch it travelled in."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import INVALID_SPAN, NoOpTracer, Span, Status, StatusCode, Tracer

from shared.contracts.events import ChunkStamp
from shared.telemetry import names
from shared.telemetry.propagation import context_of, traceparent_of


def start_chunk_trace(tracer: Tracer, stream: str, chunk: int) -> str:
    """Begin a chunk's trace: its root span's W3C traceparent, to be put into the stamp; "" when nothing is recorded.

    The root marks the moment of capture and ends at once: the chunk leaves the process, its hops are the children.
    """
    if isinstance(tracer, NoOpTracer):
        return ""
    span = tracer.start_span(names.CHUNK_SPAN, context=Context(), attributes={names.STREAM: stream, names.CHUNK: chunk})
    traceparent = traceparent_of(span.get_span_context())
    span.end()
    return traceparent


def _attributes(hop: str, stamp: ChunkStamp, queue_ms: float) -> dict[str, Any]:
    return {
        names.STREAM: stamp.stream,
        names.CHUNK: stamp.chunk,
        names.EPOCH: stamp.epoch,
        names.HOP: hop,
        names.QUEUE_MS: queue_ms,
    }


class hop_span:
    """``with hop_span(tracer, "encode", stamp, queue_ms=3.1) as span``: a child of the chunk's trace.

    Sets the stream, chunk and queue time, on exit the compute time, and the error when the body raised. ``queue_ms`` is
    how long the chunk waited before this hop began to work on it. Costs next to nothing when nothing is recorded.
    """

    __slots__ = ("_began", "_span")

    def __init__(self, tracer: Tracer, hop: str, stamp: ChunkStamp, queue_ms: float = 0.0) -> None:
        self._began = 0.0
        self._span: Span = INVALID_SPAN
        if stamp.trace and not isinstance(tracer, NoOpTracer) and (context := context_of(stamp.trace)) is not None:
            self._began = time.perf_counter()
            self._span = tracer.start_span(
                names.hop_span_name(hop), context=context, attributes=_attributes(hop, stamp, queue_ms)
            )

    def __enter__(self) -> Span:
        return self._span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        span = self._span
        if span is INVALID_SPAN:
            return
        if error is not None:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, str(error)))
        span.set_attribute(names.COMPUTE_MS, (time.perf_counter() - self._began) * 1e3)
        span.end()


def record_hop(
    tracer: Tracer, hop: str, stamp: ChunkStamp, start_ns: int, end_ns: int, queue_ms: float = 0.0, **attributes: Any
) -> None:
    """A hop that was measured elsewhere (UNIX ns): each chunk of a batch gets its own span of the batch's time."""
    if not stamp.trace or isinstance(tracer, NoOpTracer) or (context := context_of(stamp.trace)) is None:
        return
    given = {**_attributes(hop, stamp, queue_ms), names.COMPUTE_MS: (end_ns - start_ns) / 1e6, **attributes}
    span = tracer.start_span(names.hop_span_name(hop), context=context, start_time=start_ns, attributes=given)
    span.end(end_time=end_ns)
