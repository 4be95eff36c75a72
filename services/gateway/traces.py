"""The waterfall of a stream's last chunks, made of the same timings as their spans: nothing needs Jaeger."""

from __future__ import annotations

import json
from collections.abc import Iterable
from urllib.parse import quote, urlencode

from shared.contracts.events import ChunkEnd, ChunkStamp, StageTiming
from shared.contracts.timing import way_of
from shared.contracts.views import ChunkTrace, HopView
from shared.telemetry.propagation import span_context_of

SERVICE = "rheocast-egress"  # who writes down the root of a chunk's trace: Jaeger wants a service to search


def trace_of(
    chunk: int, stamp: ChunkStamp | None, timings: Iterable[StageTiming], end: ChunkEnd | None, jaeger: str = ""
) -> ChunkTrace:
    """What is known of a chunk: of one that was lost, its end alone. ``jaeger``: Jaeger's own address, "" for none."""
    told = way_of(stamp, timings, end) if stamp is not None else (end.egress,) if end is not None else ()
    context = span_context_of(stamp.trace if stamp is not None else end.trace if end is not None else "")
    trace_id = f"{context.trace_id:032x}" if context is not None else ""
    captured = stamp.frames[0].captured_ns if stamp is not None and stamp.frames else 0
    return ChunkTrace(
        chunk=chunk,
        trace_id=trace_id,
        verdict=end.verdict.value if end is not None else "",
        reason=end.reason if end is not None else "",
        begin_ns=captured or (end.captured_ns if end is not None else 0),
        end_ns=end.closed_ns if end is not None else 0,
        frames=len(stamp.frames) if stamp is not None else 0,
        hops=tuple(_hop(timing) for timing in told if timing.begin_ns),
        jaeger_url=f"{jaeger.rstrip('/')}/trace/{trace_id}" if jaeger and trace_id else None,
    )


def _hop(timing: StageTiming) -> HopView:
    return HopView(
        hop=timing.hop,
        begin_ns=timing.begin_ns,
        duration_ms=timing.compute_ms,
        wait_ms=timing.transfer_ms + timing.queue_ms,
        transfer_ms=timing.transfer_ms,
        queue_ms=timing.queue_ms,
        instance=timing.instance,
        pipeline=timing.pipeline,
        stage=timing.stage,
    )


def search_url(jaeger: str, stream: str) -> str | None:
    """Where Jaeger lists this stream's traces; None without a Jaeger."""
    if not jaeger:
        return None
    asked = {"service": SERVICE, "tags": json.dumps({"stream.id": stream}), "lookback": "1h", "limit": "50"}
    return f"{jaeger.rstrip('/')}/search?{urlencode(asked, quote_via=quote)}"
