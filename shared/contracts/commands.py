"""Commands: what the gateway or a platform asks of the scheduler, and what the scheduler asks of the services."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field, field_validator, model_validator

from shared.contracts.refs import Wire
from shared.contracts.sinks import Mp4Sink as Mp4Sink
from shared.contracts.sinks import NullSink as NullSink
from shared.contracts.sinks import Sink
from shared.contracts.sources import FileSource as FileSource
from shared.contracts.sources import NoSource as NoSource
from shared.contracts.sources import PatternSource as PatternSource
from shared.contracts.sources import Source
from shared.contracts.tiers import DEFAULT_TENANT, TENANT_PATTERN, Quality

MAX_PROMPT_CHARS = 8000
MAX_PROMPT_PARTS = 8
MAX_SIDE = 2048


class Mode(StrEnum):
    """Live: late is worse than lost. Lossless: nothing is dropped, back-pressure instead."""

    LIVE = "live"
    LOSSLESS = "lossless"


class Fit(StrEnum):
    """How a source of another shape is brought to the stream's size; both keep its aspect ratio."""

    CROP = "crop"  # scale until the frame is covered, cut what sticks out, evenly on both sides
    PAD = "pad"  # scale until it fits, black bars on both sides


class StreamSpec(Wire):
    """Everything a stream is started with. Every field is validated; a message names what would be accepted.

    ``steadying``: how much of each frame comes from the one before, where the source only moved: less flicker, and a little of
    what is finest (0: none; None: the model's).

    Under load a live stream runs with fewer steps, fewer frames a second and longer frame blocks, between what it asks for
    and ``min_steps``, ``min_fps`` (None: half its rate, 4 at least) and ``max_frames_per_block`` (None: T stays).

    ``peer_grace_s``: one WebRTC client of both ways may come (signalling on ``.peer``): it sends the frames of a ``push``
    source, sees the result and changes the stream by a data channel. The stream is stopped when it has been away so long.
    """

    source: Source
    sinks: tuple[Sink, ...] = Field(default=(NullSink(),), max_length=16)
    prompt: str = Field(max_length=MAX_PROMPT_CHARS)
    mode: Mode = Mode.LIVE
    model: str = "rheo-tiny"
    width: int | None = None  # None: the model's default area, in the source's orientation
    height: int | None = None
    fit: Fit = Fit.CROP
    fps: float | None = Field(default=None, gt=0, le=240)  # None: the source's own timestamps
    steps: int = Field(default=2, ge=1, le=4)
    noise: float | None = Field(default=None, ge=0.0, le=1.0)  # s₀; None: the model's default
    seed: int = Field(default=0, ge=0, lt=2**63)
    frames_per_block: int = Field(default=1, ge=1, le=3)  # T
    deadline_ms: int = Field(default=600, ge=50, le=60_000)  # live: from a frame's capture to when it is shown
    audio: bool = True
    skip_similar: float = Field(default=0.0, ge=0.0, le=1.0)  # a chunk that differs less is skipped; 0: none is
    steadying: float | None = Field(default=None, ge=0.0, le=0.9)
    tenant: str = Field(default=DEFAULT_TENANT, pattern=TENANT_PATTERN)
    quality: Quality = Quality.BALANCED
    min_steps: int = Field(default=1, ge=1, le=4)
    min_fps: float | None = Field(default=None, gt=0, le=240)
    max_frames_per_block: int | None = Field(default=None, ge=1, le=3)
    peer_grace_s: float | None = Field(default=None, ge=1.0, le=3600.0)

    @field_validator("prompt")
    @classmethod
    def _prompt_not_blank(cls, value: str) -> str:
        if not value.strip():
            raise ValueError(
                'the prompt is empty: say what the picture should become, e.g. "a pencil drawing", or "no style"'
            )
        return value

    @model_validator(mode="after")
    def _size(self) -> StreamSpec:
        if (self.width is None) != (self.height is None):
            raise ValueError("give both width and height, or neither")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and not (16 <= side <= MAX_SIDE and side % 16 == 0):
                raise ValueError(f"{name} {side} will not do: a multiple of 16 between 16 and {MAX_SIDE} is needed")
        return self

    @model_validator(mode="after")
    def _bounds(self) -> StreamSpec:
        if self.min_steps > self.steps:
            raise ValueError(f"min_steps {self.min_steps} is above steps {self.steps}: give at most {self.steps}")
        if self.fps is not None and self.min_fps is not None and self.min_fps > self.fps:
            raise ValueError(f"min_fps {self.min_fps:g} is above fps {self.fps:g}: give at most {self.fps:g}")
        if self.max_frames_per_block is not None and self.max_frames_per_block < self.frames_per_block:
            raise ValueError(
                f"max_frames_per_block {self.max_frames_per_block} is below frames_per_block {self.frames_per_block}: "
                f"give {self.frames_per_block} at least, or leave it out"
            )
        return self


class PromptPart(Wire):
    """One of several prompts that are mixed; only the weights' proportions count."""

    text: str = Field(min_length=1, max_length=MAX_PROMPT_CHARS)
    weight: float = Field(default=1.0, gt=0.0, le=100.0, allow_inf_nan=False)


class StreamPatch(Wire):
    """Changes to a running stream; each takes effect at a chunk boundary and is told with that chunk. None: unchanged.

    ``blend_chunks``: over so many chunks the old prompt fades into the new one. ``recache``: what is cached is made anew
    under the new prompt (once a blend is over), so that the old one does not pull the picture back. ``paused`` comes alone.
    ``skip_similar`` 0: nothing is skipped. ``prompts``: several at once, by weight, in place of ``prompt``. ``fps``: a live
    source gives at most so many frames a second. ``reset``: the next block is a first block again, nothing cached counts.
    ``steps`` and ``frames_per_block`` are what it has when there is room; bounds that they pass move along with them.
    ``width`` and ``height`` come together and alone: the stream begins anew at that size, or is refused it and goes on.
    """

    prompt: str | None = Field(default=None, max_length=MAX_PROMPT_CHARS)
    steps: int | None = Field(default=None, ge=1, le=4)
    noise: float | None = Field(default=None, ge=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    frames_per_block: int | None = Field(default=None, ge=1, le=3)  # T
    skip_similar: float | None = Field(default=None, ge=0.0, le=1.0)
    paused: bool | None = None
    blend_chunks: int = Field(default=0, ge=0, le=64)
    recache: bool = False
    quality: Quality | None = None
    min_steps: int | None = Field(default=None, ge=1, le=4)
    min_fps: float | None = Field(default=None, gt=0, le=240)
    max_frames_per_block: int | None = Field(default=None, ge=1, le=3)
    prompts: tuple[PromptPart, ...] = Field(default=(), max_length=MAX_PROMPT_PARTS)
    fps: float | None = Field(default=None, gt=0, le=240)
    reset: bool = False
    width: int | None = Field(default=None, ge=16, le=MAX_SIDE, multiple_of=16)
    height: int | None = Field(default=None, ge=16, le=MAX_SIDE, multiple_of=16)

    @field_validator("prompt")
    @classmethod
    def _prompt_not_blank(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("the prompt is empty")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> StreamPatch:
        if self.prompt is not None and self.prompts:
            raise ValueError("give prompt or prompts, not both")
        if any(not part.text.strip() for part in self.prompts):
            raise ValueError("prompts: a text is empty")
        if self.prompt is None and not self.prompts and (self.blend_chunks or self.recache):
            raise ValueError("blend_chunks and recache go with a new prompt: give one, or leave them out")
        bounds = (self.quality, self.min_steps, self.min_fps, self.max_frames_per_block, self.skip_similar, self.fps)
        others = (self.prompt, self.steps, self.noise, self.seed, self.frames_per_block, *bounds)
        changes = self.prompts or self.reset or any(value is not None for value in others)
        if self.paused is not None and changes:
            raise ValueError("paused comes alone: change the rest before or after it")
        if (self.width is None) != (self.height is None):
            raise ValueError("give both width and height, or neither")
        if self.width is not None and (changes or self.paused is not None):
            raise ValueError("width and height come alone: change the rest before or after them")
        return self


class StartStream(Wire):
    """gateway or platform → scheduler (``rheo.stream.<id>.control``): answered by an accepted or refused event."""

    kind: Literal["start"] = "start"
    command: str
    stream: str
    spec: StreamSpec


class UpdateStream(Wire):
    """gateway or platform → scheduler: answered by accepted or refused, then by applied{chunk, pts}."""

    kind: Literal["update"] = "update"
    command: str
    stream: str
    patch: StreamPatch
    tenant: str = ""  # who asks; empty: the stream's own


class StopStream(Wire):
    """gateway or platform → scheduler: what is under way is finished (``drain``) or given up, then stopped is told."""

    kind: Literal["stop"] = "stop"
    command: str
    stream: str
    drain: bool = True
    tenant: str = ""


# --- assignments: scheduler → one instance of a service, on rheo.<service>.assign -----------------------------------


class TakeStream(Wire):
    """Take this stream on, in this epoch. ``instance`` names who is meant; others ignore it. Answered by StreamTaken.

    ``width``/``height`` are the resolved size; ``noise`` the resolved s₀; ``credits`` is W, the chunks that may be
    between ingest and egress.

    ``source_held`` (live, to ingest): number nothing for now, what is captured is dropped as recovering. ``given_up`` (to
    egress): chunks of older epochs that have not come will not come; they are dropped as scheduler:``given_up``.
    ``refreshes`` counts the changes after which ingest skips nothing until they are seen.
    When a stream changes its pipeline, chunks carry the new epoch from the first one on that ingest numbers after it was
    told, and that begins a frame block: ``block_start`` is the number of one that does, ``block_chunks`` their length. Its
    answer names that chunk. ``hold``: a worker lets chunks of this epoch wait until it is told again without. ``keep``: who
    has the stream in an older epoch goes on with its state, and takes chunks of that epoch, too. ``added_sinks`` (to
    egress): ids of sinks that were added while it ran; one that takes the stream from a dead predecessor goes on with them.
    ``held_for`` is the reason by which ingest drops what it captures while it is held. ``steadying`` as in the spec, resolved:
    above 0 ingest tells how its source moves, and egress steadies along it.
    """

    kind: Literal["take"] = "take"
    instance: str
    stream: str
    epoch: int
    spec: StreamSpec
    width: int
    height: int
    noise: float
    credits: int
    pipeline: str = ""
    noise_version: int = 0  # counts changes of ``noise``: estimates carry the one that they were made with
    source_held: bool = False
    given_up: str = ""
    skip_similar: float = 0.0  # as in the spec, or as changed since
    refreshes: int = 0
    hold: bool = False
    keep: bool = False
    block_chunks: int = 1
    block_start: int = 0
    added_sinks: tuple[str, ...] = ()
    held_for: Literal["recovering", "resized"] = "recovering"
    steadying: float = Field(default=0.0, ge=0.0, lt=1.0)


class LeaveStream(Wire):
    """Let this stream go. ``drain``: finish what has been numbered first. ``failure`` is one line when it failed.

    Ingest answers by ending the source (SourceEnded); egress closes the ledger and tells stopped or failed.
    """

    kind: Literal["leave"] = "leave"
    instance: str
    stream: str
    epoch: int
    drain: bool = True
    failure: str | None = None


class PauseStream(Wire):
    """scheduler → ingest: number no chunk from now on, or go on. Answered by an applied event with the chunk.

    While paused a source's clock stands still where it can (files, patterns); frames that came all the same are dropped
    as paused. ``command`` is the id of the command this carries out; a repetition is answered again.
    """

    kind: Literal["pause"] = "pause"
    instance: str
    stream: str
    epoch: int
    command: str
    paused: bool


class PreparePrompt(Wire):
    """Compute the cross-attention K/V of this prompt; answered by PromptReady. The embedding is in Redis by ``digest``.

    Versions below ``oldest`` are in no item any more and may be dropped.
    """

    kind: Literal["prepare_prompt"] = "prepare_prompt"
    instance: str
    stream: str
    epoch: int
    version: int
    digest: str
    oldest: int = 0


class ScaleLoras(Wire):
    """operator → one worker (``rheo.worker.assign``): the LoRAs it was started with get other scales, in their order.

    Weights are shared, so this holds for every stream on the worker; send it to every stage of the pipeline.
    """

    kind: Literal["scale_loras"] = "scale_loras"
    instance: str
    scales: tuple[float, ...] = Field(max_length=16)


class TextEncode(Wire):
    """scheduler → worker:text (``rheo.text.encode``, request/reply). The embedding is stored in Redis by its digest.

    ``parts``: several prompts in place of ``prompt``; their embeddings' weighted mean is what is stored.
    """

    kind: Literal["text_encode"] = "text_encode"
    model: str
    prompt: str
    parts: tuple[PromptPart, ...] = Field(default=(), max_length=MAX_PROMPT_PARTS)


class TextEncoded(Wire):
    """Reply to TextEncode."""

    kind: Literal["text_encoded"] = "text_encoded"
    digest: str = ""
    error: str | None = None


class TensorGet(Wire):
    """a reader on another host → the owner (``rheo.tensor.<owner>.get``, request/reply): bytes [start, start+length)."""

    kind: Literal["tensor_get"] = "tensor_get"
    slot: int
    generation: int
    start: int
    length: int


class TensorPart(Wire):
    """Reply to TensorGet. ``error`` is one line when the lease is gone."""

    kind: Literal["tensor_part"] = "tensor_part"
    data: bytes = b""
    total: int = 0
    error: str | None = None


class TensorRelease(Wire):
    """a reader on another host → the owner (``rheo.tensor.<owner>.get``): the lease is no longer needed."""

    kind: Literal["tensor_release"] = "tensor_release"
    slot: int
    generation: int
