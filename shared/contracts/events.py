"""Every event between services, in the order of a chunk's way. Each docstring says who sends it and who reads it.

Contracts only grow: new fields have defaults, no field changes its type, unknown fields are ignored.
Times are UNIX nanoseconds (``*_ns``) unless they say otherwise; ``pts`` counts ticks of ``time_base`` seconds.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shared.contracts.beats import Beat as Beat
from shared.contracts.beats import MeasuredCost as MeasuredCost
from shared.contracts.kinds import EventKind as EventKind
from shared.contracts.refs import TensorRef, Wire
from shared.contracts.sinks import SinkFigures
from shared.contracts.tiers import Promise, Refusal, Tier
from shared.contracts.timing import ChunkEnd as ChunkEnd
from shared.contracts.timing import StageTiming as StageTiming
from shared.contracts.timing import Verdict as Verdict
from shared.engine.plan.items import Item

# --- what a chunk is -------------------------------------------------------------------------------------------------


class FrameStamp(Wire):
    """One source frame of a chunk. ``index`` counts source frames from 0; ``pts`` is in the stream's time base."""

    index: int
    pts: int
    captured_ns: int
    deadline_ns: int = 0  # live only: the latest UNIX time at which egress may emit it and still be on time
    duration: int = 0  # in ticks, 0 when unknown


class ChunkStamp(Wire):
    """What every event of a chunk carries along, so that each hop stands alone.

    ``frames`` holds the real frames only: ``len(frames) + padding`` is 5 for a stream's first chunk and 4 after it.
    ``published_ns`` is when ingest sent the chunk, ``begun_ns`` when it began to make it.
    """

    stream: str
    epoch: int
    chunk: int
    frames: tuple[FrameStamp, ...]
    padding: int = 0
    live: bool = False
    published_ns: int = 0
    trace: str = ""  # W3C traceparent of the chunk's root span: a batch holds chunks of several traces
    time_base: tuple[int, int] = (1, 90_000)  # seconds per tick of ``pts`` (numerator, denominator), the source's own
    begun_ns: int = 0

    @property
    def pixel_frames(self) -> int:
        """Frames in the tensor, padding included."""
        return len(self.frames) + self.padding


class SourceTotals(Wire):
    """Running totals of ingest for one stream; they heal lost messages, so each is cumulative.

    ``captured`` frames were decoded, ``numbered`` of them went into chunks 0…``chunks``−1, ``dropped`` were dropped
    before a chunk was numbered, by reason. ``captured == numbered + sum(dropped)`` once the source has ended.
    """

    captured: int = 0
    numbered: int = 0
    chunks: int = 0
    dropped: dict[str, int] = Field(default_factory=dict[str, int])


# --- the way of a chunk ----------------------------------------------------------------------------------------------


class ChunkCaptured(Wire):
    """ingest → worker:encode, egress (on ``rheo.stream.<id>.chunk``). Pixels: uint8 [frames, height, width, 3] RGB.

    ``rmse`` holds one value per frame: RMSE(f_t − f_{t−1}) with pixels in [−1, 1]; the first frame of a stream has 0.
    ``flow`` is how the source moves (:meth:`shared.media.flow.Flow.to_bytes`), for a stream that is steadied; else empty.
    """

    kind: Literal["chunk_captured"] = "chunk_captured"
    stamp: ChunkStamp
    pixels: TensorRef
    rmse: tuple[float, ...]
    totals: SourceTotals
    audio: bool = False  # the source has audio, which comes as AudioCaptured
    flow: bytes = b""


class SourceEnded(Wire):
    """ingest → scheduler, egress (``.chunk``): no chunk follows. Repeated until the stream is closed (it may be lost).

    ``error`` is one line when the source broke rather than ended; what decoded before it has been sent.
    """

    kind: Literal["source_ended"] = "source_ended"
    stream: str
    epoch: int
    totals: SourceTotals
    error: str | None = None
    audio_parts: int = 0  # how many AudioCaptured were sent: seq 0…audio_parts−1


class AudioCaptured(Wire):
    """ingest → egress (``.audio``): encoded audio packets up to the end of chunk ``chunk``; numbered densely by ``seq``.

    ``codec`` is FFmpeg's name. A packet is (pts, dts, duration, data) in ``time_base`` (numerator, denominator) ticks.
    """

    kind: Literal["audio_captured"] = "audio_captured"
    stream: str
    epoch: int
    seq: int
    codec: str
    sample_rate: int
    layout: str
    time_base: tuple[int, int]
    extradata: bytes | None
    packets: tuple[tuple[int, int, int, bytes], ...]
    header: bytes = b""  # a tiny Matroska file with this track: a muxer opens it to learn every codec parameter


class LatentsEncoded(Wire):
    """worker:encode → motion (``.latents``). Latents: [latent frames, channels, height/8, width/8].

    ``signature`` is a small average-pooled copy of the newest latent frame, for the latent form of the noise controller.
    """

    kind: Literal["latents_encoded"] = "latents_encoded"
    stamp: ChunkStamp
    latents: TensorRef
    latent_frames: int
    rmse: tuple[float, ...]
    signature: tuple[float, ...] = ()
    timings: tuple[StageTiming, ...] = ()


class MotionEstimated(Wire):
    """motion → scheduler (``.motion``): the chunk is ready to be scheduled."""

    kind: Literal["motion_estimated"] = "motion_estimated"
    stamp: ChunkStamp
    latents: TensorRef
    latent_frames: int
    motion: float
    noise_scale: float
    first_timestep: int
    timings: tuple[StageTiming, ...] = ()
    noise_version: int = 0  # the TakeStream whose s₀ this was made with


class BatchEntry(Wire):
    """One item of a batch with where its input is.

    ``stamps`` are the chunks of the item's block, one per chunk (T of them for a block of T > 1). ``inputs`` are the chunks'
    latents at step 0, in order, and what was re-noised later; empty only for text to video at step 0. ``arrived``: of a block
    of T > 1, each chunk's own hops until they were joined; ``timings`` go on from there.
    """

    item: Item
    stamps: tuple[ChunkStamp, ...]
    inputs: tuple[TensorRef, ...]
    timings: tuple[StageTiming, ...] = ()
    arrived: tuple[tuple[StageTiming, ...], ...] = ()


class StageBatch(Wire):
    """scheduler → stage 0, then stage k−1 → stage k (``rheo.pipeline.<p>.stage.<k>``).

    ``generation`` counts rebuilds of the pipeline: a stage that sees a new one empties every slot and expects seq 0.
    ``seq`` is dense within a generation; stages execute in that order. ``activations`` is None on the way to stage 0,
    else [items, frames · tokens, dim]. All items have the same T and size.
    """

    kind: Literal["stage_batch"] = "stage_batch"
    pipeline: str
    term: int
    generation: int
    seq: int
    entries: tuple[BatchEntry, ...]
    height: int
    width: int
    activations: TensorRef | None = None
    scheduled_ns: int = 0
    compute_ms: tuple[float, ...] = ()  # one per stage passed
    timings: tuple[StageTiming, ...] = ()  # as well


class ItemResult(Wire):
    """What became of one item: ``output`` is the re-noised latents for the next step, None after the last step."""

    stream: str
    epoch: int
    block: int
    step: int
    output: TensorRef | None = None


class BatchDone(Wire):
    """last stage → scheduler (``rheo.pipeline.<p>.done``): the batch ran; the scheduler's credit comes back."""

    kind: Literal["batch_done"] = "batch_done"
    pipeline: str
    generation: int
    seq: int
    results: tuple[ItemResult, ...]
    stage_ms: tuple[float, ...]
    timings: tuple[StageTiming, ...] = ()  # one per stage


class PipelineFault(Wire):
    """a stage → scheduler (``.done``): the stage saw a gap or could not run the batch; the pipeline must be rebuilt."""

    kind: Literal["pipeline_fault"] = "pipeline_fault"
    pipeline: str
    stage: int
    generation: int
    seq: int
    reason: str


class PromptReady(Wire):
    """a stage → scheduler (``.done``): the cross-attention K/V of this prompt version are computed on this stage."""

    kind: Literal["prompt_ready"] = "prompt_ready"
    pipeline: str
    stage: int
    stream: str
    epoch: int
    version: int
    error: str | None = None


class StreamTaken(Wire):
    """a worker, ingest or egress → scheduler (``rheo.taken``): answer to TakeStream; ``error`` is one line when refused."""

    kind: Literal["stream_taken"] = "stream_taken"
    service: str
    instance: str
    stream: str
    epoch: int
    error: str | None = None
    chunk: int = -1  # ingest: the first chunk that carries this epoch


class LatentsDenoised(Wire):
    """last stage → worker:decode (``.denoised``). Latents: [latent frames, channels, height/8, width/8], clean x0."""

    kind: Literal["latents_denoised"] = "latents_denoised"
    stamps: tuple[ChunkStamp, ...]
    latents: TensorRef
    block: int
    steps: int
    prompt_version: int
    timings: tuple[StageTiming, ...] = ()
    arrived: tuple[tuple[StageTiming, ...], ...] = ()  # as in BatchEntry


class FramesDecoded(Wire):
    """worker:decode → egress (``.frames``). Pixels: uint8 [frames, height, width, 3] RGB, padding included."""

    kind: Literal["frames_decoded"] = "frames_decoded"
    stamp: ChunkStamp
    pixels: TensorRef
    steps: int
    prompt_version: int
    timings: tuple[StageTiming, ...] = ()


class ChunkDropped(Wire):
    """any service that gives a chunk up → egress (``.frames``), which closes it in the ledger. Legal only as rule 4 says."""

    kind: Literal["chunk_dropped"] = "chunk_dropped"
    stamp: ChunkStamp
    service: str
    reason: str
    skipped: bool = False
    timings: tuple[StageTiming, ...] = ()  # of the hops before


class LedgerTotals(Wire):
    """What became of every input frame. ``frames_in == on_time + late + dropped + skipped`` once the stream is closed."""

    frames_in: int = 0
    on_time: int = 0
    late: int = 0
    skipped: int = 0
    dropped: dict[str, int] = Field(default_factory=dict[str, int])  # "service:reason" → frames

    @property
    def dropped_total(self) -> int:
        """Frames dropped, over all reasons."""
        return sum(self.dropped.values())

    @property
    def closed(self) -> int:
        """Frames that have their verdict."""
        return self.on_time + self.late + self.skipped + self.dropped_total

    def plus(self, other: LedgerTotals) -> LedgerTotals:
        """Two ledgers in one."""
        names = sorted({*self.dropped, *other.dropped})
        return LedgerTotals(
            frames_in=self.frames_in + other.frames_in,
            on_time=self.on_time + other.on_time,
            late=self.late + other.late,
            skipped=self.skipped + other.skipped,
            dropped={name: self.dropped.get(name, 0) + other.dropped.get(name, 0) for name in names},
        )


class ChunkClosed(Wire):
    """egress → ingest, scheduler (``.closed``): verdicts, and credits back.

    Cumulative, so that a lost one is healed by the next; egress repeats the newest every second while a stream is open.
    ``closed_chunks`` counts chunks with a verdict; ``through`` is the watermark: every chunk below it is closed.
    ``ends``: the chunks closed since the last one, of many the newest; for who draws them, and lost with the message.
    """

    kind: Literal["chunk_closed"] = "chunk_closed"
    stream: str
    epoch: int
    closed_chunks: int
    through: int
    totals: LedgerTotals
    latency_ms: float = 0.0  # newest frame: emitted − captured
    sinks: tuple[SinkFigures, ...] | None = None  # once a second; None: not told this time
    ends: tuple[ChunkEnd, ...] = ()


# --- lifecycle -------------------------------------------------------------------------------------------------------


class StreamStats(Wire):
    """Measured by egress over the stream's life; latency is emitted − captured, per frame.

    ``jitter_p95_ms``: of successive frames, how far their distance is from that of their timestamps. ``cpr``: the share of the
    play time without a stall.
    """

    fps: float = 0.0
    ttff_s: float = 0.0
    latency_p50_ms: float = 0.0
    latency_p95_ms: float = 0.0
    frames_out: int = 0
    latency_p99_ms: float = 0.0
    jitter_p95_ms: float = 0.0
    cpr: float = 1.0
    first_frame_ms: float = 0.0  # of the first frame that was shown: emitted − captured


class StreamEvent(Wire):
    """scheduler, ingest, egress → platform, gateway (``.event``, JetStream).

    ``command`` is the id of the command this answers; ``chunk``/``pts`` say from where on all of it is in force (−1: no chunk
    came). ``until_chunk`` is the first chunk of a blend that has nothing of the old prompt, unless a newer prompt comes
    before it (−1: nothing fades). ``totals`` and ``stats`` come with stopped and failed. ``epoch`` is the stream's when it
    was told (0: not known): an id may be used again. ``retry_after_s`` above 0 in a refusal: the same command may be
    accepted then. A refused start has in ``tier`` what would be admitted now (None: nothing), an accepted one its ``promise``;
    tier_changed tells the ``tier`` the stream runs with from now on, and why. A warning of one ``sink`` names it; ``gone``: it
    is not tried again, and its id is free.
    """

    kind: Literal["stream_event"] = "stream_event"
    stream: str
    event: EventKind
    service: str
    at_ns: int
    reason: str = ""
    command: str = ""
    version: int = 0
    chunk: int = -1
    pts: int = -1
    totals: LedgerTotals | None = None
    stats: StreamStats | None = None
    epoch: int = 0
    retry_after_s: float = 0.0
    until_chunk: int = -1
    refusal: Refusal = Refusal.OTHER
    tier: Tier | None = None
    promise: Promise | None = None
    sink: str = ""
    gone: bool = False
