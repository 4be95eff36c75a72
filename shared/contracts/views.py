"""What the API answers with: one definition for the gateway, which fills them in, and for whoever reads them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from shared.contracts.commands import PromptPart
from shared.contracts.events import LedgerTotals, StreamEvent, StreamStats
from shared.contracts.refs import Wire
from shared.contracts.sinks import SinkFigures
from shared.contracts.tiers import DEFAULT_TENANT, Promise, Quality, Refusal, Tier


class StreamView(Wire):
    """One stream as the API shows it, with what it runs with now. ``prompt_version`` counts its prompts, the first is 1.

    ``promise`` is what it was let in with, ``tier`` what it has now: less than that while the state is degraded. ``stats``
    come when it has ended.
    """

    id: str
    state: str
    prompt: str
    prompt_version: int
    prompts: tuple[PromptPart, ...] = ()  # what the prompt is mixed of
    model: str
    mode: str
    source_kind: str = ""
    fps: float | None = None
    width: int | None
    height: int | None
    steps: int
    seed: int
    noise: float | None = None
    frames_per_block: int = 1
    paused: bool = False
    ledger: LedgerTotals
    reason: str = ""  # why it failed
    tenant: str = DEFAULT_TENANT
    quality: Quality = Quality.BALANCED
    promise: Promise | None = None
    tier: Tier | None = None
    tier_reason: str = ""  # why it runs with less than it was promised
    stats: StreamStats | None = None


class TotalLedger(Wire):
    """All streams together: ``closed`` of the ledger's frames have their verdict, ``open`` are under way."""

    streams: int
    closed: int
    open: int
    ledger: LedgerTotals


class Receipt(BaseModel):
    """A command was accepted; ``version`` is the prompt version that will apply. ``GET …/receipts/{command}`` tells when."""

    stream: str
    command: str
    version: int


class ReceiptView(BaseModel):
    """What became of a command: ``accepted`` or ``refused`` first; ``applied`` names the chunk and pts it holds from."""

    stream: str
    command: str
    state: str = Field(description="accepted, applied, refused or warning: the newest of them")
    version: int = 0
    chunk: int = Field(default=-1, description="From this chunk on it is in force; -1: not yet.")
    pts: int = -1
    until_chunk: int = Field(default=-1, description="The first chunk of a blend that has nothing of the old prompt.")
    reason: str = ""
    events: list[StreamEvent] = Field(default_factory=list[StreamEvent])


class LiveStats(BaseModel):
    """How a stream runs now, over the last seconds. ``on_time`` is the share of shown frames that were in time.

    ``chunk`` is the newest chunk below which all are closed; ``latency_ms`` from a frame's capture to when it was shown.
    """

    fps: float = 0.0
    latency_ms: float = 0.0
    latency_p95_ms: float = 0.0
    on_time: float = 1.0
    chunk: int = -1
    at_ns: int = 0
    ledger: LedgerTotals = Field(default_factory=LedgerTotals)


class StatsView(BaseModel):
    """``live``: over the last seconds. ``total``: over the stream's life, once it has ended. ``sinks``: a second ago."""

    stream: str
    state: str
    live: LiveStats
    total: StreamStats | None = None
    sinks: tuple[SinkFigures, ...] = ()


class RecordingView(BaseModel):
    """A recording that began or ended with ``command``; see its receipt. ``name`` is for ``/v1/recordings/{name}``."""

    stream: str
    sink: str
    name: str
    command: str
    began_ns: int


class FileView(BaseModel):
    """A file of the tenant. ``path`` is what a file source names: it is relative to the media folder."""

    name: str = Field(examples=["walk-3f9a.mp4"])
    path: str = Field(examples=["uploads/default/walk-3f9a.mp4"])
    bytes: int
    modified_ns: int


class Problem(BaseModel):
    """The body of every error. A refused start may name in ``tier`` what would be accepted now."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "about:blank",
                "title": "No such stream",
                "status": 404,
                "detail": "there is no stream s-3f9a0c1d2e4b",
            }
        }
    )

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    refusal: Refusal | None = None
    retry_after_s: float | None = None
    tier: Tier | None = None


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
