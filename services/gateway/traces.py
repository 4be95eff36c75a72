"""The waterfall of a stream's last chunks, made of the same timings as their spans: nothing needs Jaeger."""

from __future__ import annotations

import json
from collections.abc import Iterable
from urllib.parse import quote, urlencode

from pydantic import BaseModel, Field

from shared.contracts.events import ChunkEnd, ChunkStamp, StageTiming
from shared.contracts.timing import way_of
from shared.telemetry.propagation import span_context_of

SERVICE = "rheocast-egress"  # who writes down the root of a chunk's trace: Jaeger wants a service to search


class HopView(BaseModel):
    """One hop: it waited for ``wait_ms`` (on the way here ``transfer_ms`` of it, here ``queue_ms``), then worked.

    ``begin_ns`` is when its work began, UNIX time; with the wait before it begins where the hop before ended.
    """

    hop: str
    begin_ns: int
    duration_ms: float
    wait_ms: float
    transfer_ms: float
    queue_ms: float
    instance: str = ""
    pipeline: str = ""
    stage: int = Field(default=-1, description="Of a pipeline's; -1: no stage.")


class ChunkTrace(BaseModel):
    """One chunk's way, from its first frame's capture to its verdict (``end_ns`` 0 and no verdict: under way)."""

    chunk: int
    trace_id: str = Field(default="", description="Of its spans; empty where none are exported.")
    verdict: str = Field(default="", description="on_time, late, skipped, dropped, failed; empty: under way.")
    reason: str = Field(default="", description="Who dropped it, and why.")
    begin_ns: int
    end_ns: int = 0
    frames: int = 0
    hops: tuple[HopView, ...] = ()
    jaeger_url: str | None = None


class TraceList(BaseModel):
    """The newest chunks of a stream, oldest first. The first question begins the listening: ask again.

    ``jaeger_url`` finds the stream's traces, where the gateway knows of a Jaeger.
    """

    stream: str
    chunks: list[ChunkTrace] = Field(default_factory=list[ChunkTrace])
    jaeger_url: str | None = None


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
