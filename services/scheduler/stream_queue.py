"""What the scheduler holds of one stream: chunks waiting for step 0, blocks waiting for a later step, and settings.

Pure and synchronous; time is passed in. Settings change between blocks only: a block keeps what its step 0 was bound to.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from enum import StrEnum

from shared.contracts.events import ChunkStamp, MotionEstimated, StageTiming
from shared.contracts.order import Arrival, OrderGate
from shared.contracts.refs import TensorRef
from shared.engine.plan.items import Item
from shared.engine.plan.noise_controller import step_timesteps
from shared.engine.plan.spec import ModelSpec
from shared.engine.plan.stream_plan import StreamPlan

FIRST_CHUNK_LATENTS = 2
MAX_WAITING = 64


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What a block is bound to when its step 0 is scheduled."""

    steps: int
    seed: int
    prompt_version: int
    frames_per_block: int = 1


@dataclass(frozen=True, slots=True)
class Work:
    """One candidate for a batch. ``item`` is None for a block that has not entered step 0 yet."""

    stream: str
    frames: int
    stamps: tuple[ChunkStamp, ...]
    inputs: tuple[TensorRef, ...]
    deadline_ns: int  # of the first frame; 0 when lossless
    last_deadline_ns: int
    ready_ns: int
    noise_scale: float = 0.0
    first_timestep: int = 0
    item: Item | None = None
    timings: tuple[StageTiming, ...] = ()

    @property
    def live(self) -> bool:
        """Whether late is worse than lost for this work."""
        return self.stamps[0].live


@dataclass(frozen=True, slots=True)
class Applied:
    """A command's change took effect with this chunk."""

    stream: str
    command: str
    version: int
    chunk: int
    pts: int


class Offer(StrEnum):
    """What became of a chunk that was offered."""

    TAKEN = "taken"
    DUPLICATE = "duplicate"
    OVERTAKEN = "overtaken"
    OLD_EPOCH = "old_epoch"
    FULL = "full"


@dataclass(slots=True)
class StreamQueue:
    """The scheduler's view of one stream on one pipeline."""

    stream: str
    epoch: int
    live: bool
    height: int
    width: int
    model: ModelSpec
    plan: StreamPlan
    settings: StreamSettings
    ended: bool = False
    waiting: deque[MotionEstimated] = field(default_factory=lambda: deque[MotionEstimated]())
    later: dict[int, Work] = field(default_factory=lambda: dict[int, Work]())
    gate: OrderGate = field(default_factory=OrderGate)
    pending: dict[str, StreamSettings] = field(default_factory=lambda: dict[str, StreamSettings]())
    arrived_ns: dict[int, int] = field(default_factory=lambda: dict[int, int]())

    def offer(self, chunk: MotionEstimated, now_ns: int) -> Offer:
        """Take a chunk whose noise is known. Older epochs, repeats and overtaken chunks are turned away."""
        if chunk.stamp.epoch != self.epoch:
            return Offer.OLD_EPOCH
        arrival = self.gate.arrive(chunk.stamp.chunk)
        if arrival is not Arrival.NEW:
            return Offer(arrival.value)
        if len(self.waiting) >= MAX_WAITING:
            return Offer.FULL
        self.waiting.append(chunk)
        self.arrived_ns[chunk.stamp.chunk] = now_ns
        return Offer.TAKEN

    def change(self, command: str, settings: StreamSettings) -> None:
        """Bind the next block to ``settings``; :meth:`enter` reports it as applied."""
        self.pending[command] = settings
        self.settings = settings

    def candidate(self) -> Work | None:
        """The block that could enter step 0 now, or None. Blocks of T > 1 wait for T chunks or the source's end."""
        if not self.waiting or not self.plan.can_enter(self.settings.steps):
            return None
        wanted = self.settings.frames_per_block
        if len(self.waiting) < wanted and not self.ended:
            return None
        chunks = [self.waiting[i] for i in range(min(wanted, len(self.waiting)))]
        stamps = tuple(chunk.stamp for chunk in chunks)
        return Work(
            stream=self.stream,
            frames=sum(chunk.latent_frames for chunk in chunks),
            stamps=stamps,
            inputs=tuple(chunk.latents for chunk in chunks),
            deadline_ns=stamps[0].frames[0].deadline_ns if self.live else 0,
            last_deadline_ns=stamps[-1].frames[-1].deadline_ns if self.live else 0,
            ready_ns=self.arrived_ns[stamps[-1].chunk],
            noise_scale=max(chunk.noise_scale for chunk in chunks),
            first_timestep=max(chunk.first_timestep for chunk in chunks),
            timings=chunks[-1].timings,
        )

    def next_steps(self) -> list[Work]:
        """Blocks that could run a later step now: of those that want the same slot, the oldest (rule 1)."""
        oldest: dict[int, Work] = {}
        for block in sorted(self.later):
            work = self.later[block]
            if work.item is not None and self.plan.can_next(work.item):
                oldest.setdefault(work.item.step + 1, work)
        return list(oldest.values())

    def enter(self, work: Work) -> tuple[Work, list[Applied]]:
        """Let the candidate enter step 0: its item is bound now, and pending changes are reported as applied."""
        for stamp in work.stamps:
            self.waiting.popleft()
            self.arrived_ns.pop(stamp.chunk, None)
        item = self.plan.enter(
            frames=work.frames,
            noise_scale=work.noise_scale,
            timesteps=step_timesteps(work.first_timestep, self.model.steps[: self.settings.steps]),
            seed=self.settings.seed,
            prompt_version=self.settings.prompt_version,
        )
        first = work.stamps[0]
        applied = [
            Applied(self.stream, command, settings.prompt_version, first.chunk, first.frames[0].pts)
            for command, settings in self.pending.items()
        ]
        self.pending.clear()
        return replace(work, item=item), applied

    def forget(self, work: Work) -> None:
        """Drop a candidate before step 0; legal because nothing was bound yet (rule 4)."""
        for stamp in work.stamps:
            self.waiting.popleft()
            self.arrived_ns.pop(stamp.chunk, None)

    def lose_slots(self) -> list[Work]:
        """The pipeline was rebuilt: blocks waiting for a later step are lost, the next one is a first block again."""
        lost = list(self.later.values())
        self.later.clear()
        self.plan.reset()
        return lost

    def inputs(self) -> list[TensorRef]:
        """What waits here, as references."""
        later = [ref for work in self.later.values() for ref in work.inputs]
        return later + [chunk.latents for chunk in self.waiting]
