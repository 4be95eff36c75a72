"""What the scheduler holds of one stream: chunks waiting for step 0, blocks waiting for a later step, and settings.

Pure and synchronous; time is passed in. Settings change between blocks only: a block keeps what its step 0 was bound to.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice

from services.scheduler.works import Applied as Applied
from services.scheduler.works import Each, Timings
from services.scheduler.works import Work as Work
from shared.contracts.events import MotionEstimated
from shared.contracts.order import Arrival, OrderGate
from shared.contracts.refs import TensorRef
from shared.engine.plan.noise_controller import step_timesteps
from shared.engine.plan.spec import ModelSpec
from shared.engine.plan.stream_plan import PlanPhase, StreamPlan

FIRST_CHUNK_LATENTS = 2
MAX_WAITING = 64
SKIPPED_AFTER = 4  # a chunk that is late by a quarter of its time was skipped


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What a block is bound to when its step 0 is scheduled. T may grow to ``max_frames_per_block`` (below T: it stays)."""

    steps: int
    seed: int
    prompt_version: int
    frames_per_block: int = 1
    max_frames_per_block: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """A command that is not applied yet: a block must carry ``settings`` and an estimate made with ``noise_version``.

    ``blend_chunks`` and ``recache`` go with a new prompt. ``until`` is known once its blend has begun: see :class:`Fade`.
    ``reset``: the block is a first block again.
    """

    settings: StreamSettings
    noise_version: int = 0
    blend_chunks: int = 0
    recache: bool = False
    until: int = -1
    reset: bool = False


@dataclass(frozen=True, slots=True)
class Fade:
    """One prompt fades into the settings' over ``chunks`` chunks, from chunk ``first`` on (−1: it has not begun).

    From ``until`` on nothing is left of the old one. Blocks are bound whole: it is the first block after the ``chunks``.
    """

    version: int
    chunks: int
    first: int = -1
    until: int = -1
    command: str = ""

    def share(self, chunk: int) -> float:
        """The old prompt's share of a chunk: falls evenly, 0 from ``first`` + ``chunks`` on."""
        passed = chunk - self.first if self.first >= 0 else 0
        return max(0.0, 1.0 - (passed + 1) / (self.chunks + 1))


class Offer(StrEnum):
    """What became of a chunk that was offered."""

    TAKEN = "taken"
    DUPLICATE = "duplicate"
    OVERTAKEN = "overtaken"
    OLD_EPOCH = "old_epoch"
    FULL = "full"


@dataclass(slots=True)
class StreamQueue:
    """The scheduler's view of one stream on one pipeline.

    ``heard`` is where the core hears that something changed since it last asked what could run. Assigning any field says so by
    itself; what changes ``later`` or the plan in place must :meth:`touch`.
    """

    stream: str
    epoch: int
    live: bool
    height: int
    width: int
    model: ModelSpec
    plan: StreamPlan
    settings: StreamSettings
    since: int = 0  # the oldest epoch whose chunks are taken (0: the epoch itself)
    flush: bool = False  # a live stream about to move: its last, shorter frame block need not wait
    entered: int = -1  # the newest chunk that entered step 0
    from_text: bool = False  # there is no source: pure noise enters step 0
    ended: bool = False
    paused: bool = False  # no chunk follows for now
    skips: bool = False  # chunks in which nothing moves do not come
    hurried: bool = (
        False  # the rest of a longer block did not come in its time: it was skipped, or its source is silent
    )
    shown: int = 0  # the prompt version that most of the newest bound block is made of; 0: none is bound yet
    fade: Fade | None = None
    recache: bool = False
    restarts: bool = False  # once what is under way is done, the next block is a first block again
    waiting: deque[MotionEstimated] = field(default_factory=lambda: deque[MotionEstimated]())
    later: dict[int, Work] = field(default_factory=lambda: dict[int, Work]())
    gate: OrderGate = field(default_factory=OrderGate)
    pending: dict[str, Change] = field(default_factory=lambda: dict[str, Change]())
    arrived_ns: dict[int, int] = field(default_factory=lambda: dict[int, int]())
    dropped_in_row: int = 0  # chunks dropped here since a block last entered
    heard: set[str] = field(default_factory=lambda: set[str]())
    tokens: int = field(init=False)  # of one latent frame

    def __post_init__(self) -> None:
        self.tokens = self.model.tokens(self.width, self.height)

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        heard: set[str] | None = getattr(self, "heard", None)
        if heard is not None:
            heard.add(self.stream)

    def touch(self) -> None:
        """Something changed in place."""
        self.heard.add(self.stream)

    def offer(self, chunk: MotionEstimated, now_ns: int) -> Offer:
        """Take a chunk whose noise is known. Older epochs, repeats and overtaken chunks are turned away."""
        if not self.takes(chunk.stamp.epoch):
            return Offer.OLD_EPOCH
        arrival = self.gate.arrive(chunk.stamp.chunk)
        if arrival is not Arrival.NEW:
            return Offer(arrival.value)
        if len(self.waiting) >= MAX_WAITING:
            return Offer.FULL
        self.waiting.append(chunk)
        self.arrived_ns[chunk.stamp.chunk] = now_ns
        self.touch()
        return Offer.TAKEN

    def takes(self, epoch: int) -> bool:
        """Whether chunks and items of this epoch are this queue's."""
        return (self.since or self.epoch) <= epoch <= self.epoch

    def adopt(self, epoch: int, since: int = 0) -> None:
        """Go on in a newer epoch, where every chunk is of it, or with those since an older one, too."""
        self.epoch = self.plan.epoch = epoch
        self.since = since

    @property
    def idle(self) -> bool:
        """Whether nothing waits here and nothing is under way."""
        return not self.waiting and not self.later and not self.plan.under_way

    def change(self, command: str, change: Change) -> None:
        """Bind the next block to the change's settings; :meth:`enter` reports it as applied.

        A blend starts from what is seen: not from a prompt that no block has been bound to yet, and within another blend
        from that of the two which has the larger share, so that the picture jumps by half at most.
        """
        if change.settings.prompt_version != self.settings.prompt_version:
            blends = change.blend_chunks > 0 and self.shown > 0
            self.fade = Fade(self.shown, change.blend_chunks, command=command) if blends else None
            self.recache = change.recache
        if change.reset:
            self.restarts, self.recache, self.fade = True, False, None
        self.pending[command] = change
        self.settings = change.settings

    @property
    def prompts_used(self) -> frozenset[int]:
        """Prompt versions that blocks under way read, or those to come may: a blend may yet start from what is shown."""
        fading = {self.fade.version} if self.fade is not None else set[int]()
        shown = {self.shown} if self.shown else set[int]()
        return self.plan.prompt_versions | {self.settings.prompt_version} | fading | shown

    def longest(self) -> int:
        """The largest T that the next block may have with the chunks that wait: its own, unless it may grow.

        A prompt that fades, or a window that is to run along, was promised in blocks of the stream's own T.
        """
        own = self.settings.frames_per_block
        if self.settings.max_frames_per_block <= own or self.fade is not None or self.recache:
            return own
        return max(own, min(self.settings.max_frames_per_block, len(self.waiting)))

    def candidate(self, frames_per_block: int = 0) -> Work | None:
        """The block that could enter step 0 now, or None. Blocks of T > 1 wait for T chunks or the source's end.

        ``frames_per_block`` 0: the stream's own T; else at most :meth:`longest`.

        A pause is an end for a live stream, whose chunks would be too old after it. A lossless one waits, so that its
        pixels do not depend on when it was paused.
        """
        if not self.waiting or not self._may_enter():
            return None
        wanted = frames_per_block or self.settings.frames_per_block
        going = self.ended or self.hurried or (self.live and (self.paused or self.flush))
        if len(self.waiting) < wanted and not going:
            return None
        if wanted == 1 or len(self.waiting) == 1:
            return self._alone(self.waiting[0])
        chunks = list(islice(self.waiting, wanted))
        stamps = tuple(chunk.stamp for chunk in chunks)
        frames = sum(chunk.latent_frames for chunk in chunks)
        return Work(
            stream=self.stream,
            frames=frames,
            context=self.plan.context_of(frames) if self._recaches(stamps[-1].chunk) else 0,
            noise_version=min(chunk.noise_version for chunk in chunks),
            still=all(self._still(chunk) for chunk in chunks),
            stamps=stamps,
            inputs=tuple(chunk.latents for chunk in chunks),
            deadline_ns=stamps[0].frames[0].deadline_ns if self.live else 0,
            last_deadline_ns=stamps[-1].frames[-1].deadline_ns if self.live else 0,
            ready_ns=self.arrived_ns[stamps[-1].chunk],
            noise_scale=max(chunk.noise_scale for chunk in chunks),
            first_timestep=max(chunk.first_timestep for chunk in chunks),
            timings=() if len(chunks) > 1 else chunks[-1].timings,
            arrived=tuple([chunk.timings for chunk in chunks]) if len(chunks) > 1 else (),
        )

    def _alone(self, chunk: MotionEstimated) -> Work:
        """The same of a block of one chunk, which most are."""
        stamp, frames = chunk.stamp, chunk.latent_frames
        return Work(
            self.stream,
            frames,
            (stamp,),
            (chunk.latents,),
            stamp.frames[0].deadline_ns if self.live else 0,
            stamp.frames[-1].deadline_ns if self.live else 0,
            self.arrived_ns[stamp.chunk],
            chunk.noise_scale,
            chunk.first_timestep,
            None,
            self.plan.context_of(frames) if self._recaches(stamp.chunk) else 0,
            chunk.noise_version,
            self._still(chunk),
            chunk.timings,
        )

    def _still(self, chunk: MotionEstimated) -> bool:
        """Whether the noise holds: never without a source, where nothing could move."""
        return not self.from_text and self.model.noise.still(chunk.motion)

    def _may_enter(self) -> bool:
        """Whether the plan lets a block in; before a new beginning, what is under way goes through to its end."""
        return not self.plan.under_way if self.restarts else self.plan.can_enter(self.settings.steps)

    @property
    def hurries(self) -> bool:
        """Whether its blocks may wait for chunks that do not come: :meth:`hurry` must be asked."""
        return self.live and (self.skips or self.settings.frames_per_block > 1)

    def hurry(self, now_ns: int) -> bool:
        """Whether a longer block is to go on short from now on: its next chunk should have come.

        Where chunks are skipped it was; else the source is silent, and is given more time: two chunks' and half of what the
        chunk that waits has left. What waited for ever would outlive its latents.
        """
        if self.hurried or not self.hurries or not self.waiting:
            return False
        if len(self.waiting) >= self.settings.frames_per_block:
            return False
        newest = self.waiting[-1].stamp
        frames, arrived_ns = newest.frames, self.arrived_ns[newest.chunk]
        chunk_ns = (frames[-1].captured_ns - frames[0].captured_ns) * len(frames) // max(1, len(frames) - 1)
        if self.skips:
            waits_ns = chunk_ns + chunk_ns // SKIPPED_AFTER
        else:
            waits_ns = max(2 * chunk_ns, (frames[-1].deadline_ns - arrived_ns) // 2)
        if now_ns - arrived_ns > waits_ns:
            self.hurried = True
        return self.hurried

    def next_steps(self) -> list[Work]:
        """Blocks that could run a later step now: of those that want the same slot, the oldest (rule 1)."""
        if not self.later:
            return []
        oldest: dict[int, Work] = {}
        for block in sorted(self.later):
            work = self.later[block]
            if work.item is not None and self.plan.can_next(work.item):
                oldest.setdefault(work.item.step + 1, work)
        return list(oldest.values())

    def enter(self, work: Work, timings: Timings = (), arrived: Each = None) -> tuple[Work, list[Applied]]:
        """Let the candidate enter step 0: its item is bound now, and pending changes are reported as applied.

        ``timings`` and ``arrived``: what it carries from now on, if that is more than it did.
        """
        for stamp in work.stamps:
            self.waiting.popleft()
            self.arrived_ns.pop(stamp.chunk, None)
        self.entered = work.stamps[-1].chunk
        if self.restarts:
            self.plan.reset()
            self.restarts, self.recache, self.fade = False, False, None
        recache = self._recaches(work.stamps[-1].chunk)
        share = self._fade_on(work)
        fade = self.fade
        shown = fade.version if fade is not None and share > 0.5 else self.settings.prompt_version
        if shown != self.shown:
            self.shown = shown
        steps = self.model.steps_from_text if self.from_text else self.model.steps
        item = self.plan.enter(
            frames=work.frames,
            noise_scale=work.noise_scale,
            timesteps=step_timesteps(work.first_timestep, steps[: self.settings.steps]),
            seed=self.settings.seed,
            prompt_version=self.settings.prompt_version,
            blend_version=fade.version if fade is not None else 0,
            blend=share,
            recache=recache,
            still=work.still,
        )
        if recache:
            self.recache = False
        if self.dropped_in_row or self.hurried:
            self.dropped_in_row, self.hurried = 0, False
        return work.at(item, timings or work.timings, work.inputs, work.ready_ns, arrived), self._applied(work)

    def _recaches(self, last_chunk: int) -> bool:
        """Whether a block that ends with this chunk takes its window along: once, when no old prompt is left in it."""
        return (
            self.recache
            and not self.restarts
            and (self.fade is None or (self.fade.first >= 0 and last_chunk >= self.fade.until))
        )

    def _fade_on(self, work: Work) -> float:
        """The old prompt's share of the block that enters; the fade begins with it, or is over and forgotten."""
        fade, first, last = self.fade, work.stamps[0].chunk, work.stamps[-1].chunk
        if fade is None:
            return 0.0
        if fade.first < 0:
            length = self.settings.frames_per_block
            fade = replace(fade, first=first, until=max(last + 1, first + -(-fade.chunks // length) * length))
            if (change := self.pending.get(fade.command)) is not None:
                self.pending[fade.command] = replace(change, until=fade.until)
        share = fade.share(first) if last < fade.until else 0.0
        self.fade = fade if share else None
        return share

    def _applied(self, work: Work) -> list[Applied]:
        """The commands that are in force with this block, told once each."""
        if not self.pending:
            return []
        first = work.stamps[0]
        told: list[Applied] = []
        for command, change in list(self.pending.items()):
            if change.noise_version > work.noise_version:
                continue  # these chunks' noise was estimated before the change
            del self.pending[command]
            version = change.settings.prompt_version
            told.append(Applied(self.stream, command, version, first.chunk, first.frames[0].pts, change.until))
        return told

    def forget(self, work: Work) -> None:
        """Drop a candidate before step 0; legal because nothing was bound yet (rule 4)."""
        for stamp in work.stamps:
            self.waiting.popleft()
            self.arrived_ns.pop(stamp.chunk, None)
        self.dropped_in_row += len(work.stamps)

    @property
    def holds_slots(self) -> bool:
        """Whether workers hold something of it that its next block goes on from."""
        return self.plan.phase is not PlanPhase.EMPTY

    def lose_slots(self) -> list[Work]:
        """The pipeline was rebuilt: blocks waiting for a later step are lost, the next one is a first block again."""
        lost = list(self.later.values())
        self.later.clear()
        self.plan.reset()
        self.touch()
        return lost

    def inputs(self) -> list[TensorRef]:
        """What waits here, as references."""
        later = [ref for work in self.later.values() for ref in work.inputs]
        return later + [chunk.latents for chunk in self.waiting]
