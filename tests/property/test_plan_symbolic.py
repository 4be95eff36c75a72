"""Any interleaving, any batch-mates, any number of stages: a stream's pixels are what it would get alone.

The oracle below replays each stream by itself, one block after the other, straight from the rules. The machine drives
the same streams through :class:`StreamPlan` and the symbolic pipeline in whatever order hypothesis thinks of.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from shared.engine.plan.items import Item
from shared.engine.plan.noise_controller import step_timesteps
from shared.engine.plan.stream_plan import StreamPlan
from shared.engine.plan.symbolic import (
    SymbolicPipeline,
    SymbolicResult,
    attend,
    cached_key,
    frame_inputs,
    mix,
    prompt_of,
    window_input,
)

LAYERS = 4
STREAMS = ("anna", "ben", "cleo")
STEPS = (700, 500, 400, 200)
SHAPES = ((6, 3), (5, 2), (6, 0), (4, 1))


# --- the oracle ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """What was asked for when a block entered."""

    number: int
    first_latent: int
    frames: int
    noise: float
    timesteps: tuple[int, ...]
    seed: int
    prompt: object
    source: str
    recache: bool
    still: bool


Cache = list[list[tuple[int, int, str]]]  # per layer: (position, latent frame, key) of every frame ever written


@dataclass
class Alone:
    """One stream's life, from empty slots on, replayed alone."""

    ring: int
    sinks: int
    refresh: int
    rerotate: bool
    pixels: dict[int, str] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)
    caches: list[Cache] = field(default_factory=list)
    inputs: list[list[str]] = field(default_factory=list)  # per slot: the input of every frame, newest last

    def seen(self, history: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
        """The sinks are the first frames ever; of the rest only the newest are left."""
        rest = history[self.sinks :]
        return history[: self.sinks] + rest[-(self.ring - self.sinks) :]

    def forward(self, slot: int, block: Bound, position: int, timestep: int, x: str, context: int) -> str:
        cache, inputs = self.caches[slot], self.inputs[slot]
        inputs += frame_inputs(x, block.frames)
        if context:
            x = window_input(inputs[-context - block.frames :])
            cache[:] = [[] for _ in range(LAYERS)]
        for layer in range(LAYERS):
            for i in range(-context, block.frames):
                key = cached_key(layer, x, timestep, context + i)
                cache[layer].append((position + i, block.first_latent + i, key))
            reads = [(at - position, key) for at, _, key in self.seen(cache[layer])]
            x = attend(layer, x, timestep, block.prompt, reads)
        return x

    def replay(self, life: list[Bound]) -> None:
        start = elapsed = 0
        for index, block in enumerate(life):
            if self.refresh and start >= self.refresh:
                start = self.ring - 1
            self.starts[block.number] = start
            position = elapsed if self.rerotate else start
            noise_frame = 0 if block.still else block.first_latent
            x = mix("input", block.seed, noise_frame, block.frames, 0, block.noise, block.source)
            if index > 0:
                del self.caches[len(block.timesteps) :]
                del self.inputs[len(block.timesteps) :]
                while len(self.caches) < len(block.timesteps):
                    self.caches.append([list(history) for history in self.caches[-1]])
                    self.inputs.append(list(self.inputs[-1]))
            context = min(elapsed, self.ring - block.frames) if block.recache else 0
            for step, timestep in enumerate(block.timesteps):
                if index == 0:
                    self.caches, self.inputs = [[[] for _ in range(LAYERS)]], [[]]
                x = self.forward(0 if index == 0 else step, block, position, timestep, x, context)
                if step + 1 < len(block.timesteps):
                    following = block.timesteps[step + 1]
                    x = mix("renoise", x, block.seed, noise_frame, step + 1, following)
            self.pixels[block.number] = x
            start += block.frames
            elapsed += block.frames


# --- the machine -----------------------------------------------------------------------------------------------------


@dataclass
class Live:
    """A stream as the machine drives it."""

    plan: StreamPlan
    steps: int = 2
    frames: int = 1
    seed: int = 0
    prompt: int = 1
    fading: int = 0
    blend: float = 0.0
    recache: bool = False
    chunks: int = 0
    waiting: deque[tuple[str, int, float]] = field(default_factory=deque)
    later: dict[int, tuple[Item, str]] = field(default_factory=dict)
    lives: list[list[Bound]] = field(default_factory=lambda: [[]])
    starts: dict[int, int] = field(default_factory=dict)
    pixels: dict[int, str] = field(default_factory=dict)


class PlanMachine(RuleBasedStateMachine):
    """Streams share one pipeline; rules do to them whatever the scheduler, its users and bad luck could do."""

    @initialize(
        stages=st.integers(1, LAYERS),
        shape=st.sampled_from(SHAPES),
        refresh=st.sampled_from((None, 0, 3)),
        rerotate=st.booleans(),
    )
    def begin(self, stages: int, shape: tuple[int, int], refresh: int | None, rerotate: bool) -> None:
        self.ring, self.sinks = shape
        self.refresh = 0 if refresh is None else 2 * self.ring - self.sinks + refresh
        self.rerotate = rerotate
        self.pipeline = SymbolicPipeline(stages, LAYERS, self.ring, self.sinks)
        self.in_flight = 0
        self.answers: list[tuple[SymbolicResult, ...]] = []
        self.streams = {name: Live(self.new_plan(name)) for name in STREAMS}

    def new_plan(self, name: str) -> StreamPlan:
        return StreamPlan(
            name, 1, ring=self.ring, sinks=self.sinks, rope_refresh_at=self.refresh, rerotate=self.rerotate
        )

    # users and sources

    @rule(name=st.sampled_from(STREAMS), count=st.integers(1, 4), noise=st.sampled_from((0.8, 0.71, 0.3)))
    def chunks_arrive(self, name: str, count: int, noise: float) -> None:
        live = self.streams[name]
        for _ in range(count):
            live.waiting.append((f"{name}-{live.chunks}", 2 if live.chunks == 0 else 1, noise))
            live.chunks += 1

    @rule(name=st.sampled_from(STREAMS))
    def a_chunk_is_dropped_before_step_0(self, name: str) -> None:
        if self.streams[name].waiting:
            self.streams[name].waiting.popleft()

    @rule(name=st.sampled_from(STREAMS), steps=st.integers(1, 4))
    def steps_change(self, name: str, steps: int) -> None:
        self.streams[name].steps = steps

    @rule(name=st.sampled_from(STREAMS), frames=st.integers(1, 3))
    def block_length_changes(self, name: str, frames: int) -> None:
        self.streams[name].frames = frames

    @rule(name=st.sampled_from(STREAMS), prompt=st.integers(1, 3), seed=st.integers(0, 1))
    def prompt_and_seed_change(self, name: str, prompt: int, seed: int) -> None:
        self.streams[name].prompt, self.streams[name].seed = prompt, seed

    @rule(name=st.sampled_from(STREAMS), fading=st.integers(1, 3), blend=st.sampled_from((0.0, 0.25, 0.75)))
    def one_prompt_fades_into_another(self, name: str, fading: int, blend: float) -> None:
        self.streams[name].fading, self.streams[name].blend = fading, blend

    @rule(name=st.sampled_from(STREAMS))
    def the_window_is_taken_along(self, name: str) -> None:
        self.streams[name].recache = True

    # the scheduler

    def candidates(self) -> list[tuple[str, int | None, tuple[int, int]]]:
        """(stream, block or None for one that enters, (frames, context)), all asked before anything is bound."""
        found: list[tuple[str, int | None, tuple[int, int]]] = []
        for name, live in self.streams.items():
            for block, (item, _) in live.later.items():
                if live.plan.can_next(item):
                    found.append((name, block, (item.frames, item.context)))
            if len(live.waiting) >= live.frames and live.plan.can_enter(live.steps):
                latents = sum(live.waiting[i][1] for i in range(live.frames))
                context = live.plan.context_of(latents) if live.recache else 0
                found.append((name, None, (latents, context)))
        return found

    def bind(self, name: str, block: int | None, shape: tuple[int, int]) -> tuple[Item, str]:
        live = self.streams[name]
        if block is not None:
            item, given = live.later.pop(block)
            return live.plan.next(item), given
        chunks = [live.waiting.popleft() for _ in range(live.frames)]
        noise = max(chunk[2] for chunk in chunks)
        source = "+".join(chunk[0] for chunk in chunks)
        timesteps = step_timesteps(int(1000 * noise) - 100, STEPS[: live.steps])
        frames, still = shape[0], int(chunks[0][0].rsplit("-")[-1]) % 3 == 1
        item = live.plan.enter(
            frames,
            noise,
            timesteps,
            live.seed,
            live.prompt,
            blend_version=live.fading,
            blend=live.blend,
            recache=live.recache,
            still=still,
        )
        assert item.context == shape[1]
        prompt = prompt_of(item)
        assert item.prompts == ((live.prompt, live.fading) if live.blend else (live.prompt,))
        asked = (frames, noise, timesteps, live.seed, prompt, source, live.recache, still)
        bound = Bound(item.block, item.first_latent, *asked)
        live.recache = False
        live.lives[-1].append(bound)
        live.starts[item.block] = item.start_frame
        return item, source

    def schedule(self, pick: int, mask: int) -> None:
        found = self.candidates()
        if not found or self.in_flight > len(self.pipeline.stages):
            return
        first = found[pick % len(found)]
        mates = [entry for entry in found if entry is not first and entry[2] == first[2]]
        chosen = [first, *(mate for at, mate in enumerate(mates) if mask >> at & 1)]
        self.pipeline.submit([self.bind(*entry) for entry in chosen])
        self.in_flight += 1

    def advance(self, pick: int) -> None:
        busy = self.pipeline.busy()
        if busy and (results := self.pipeline.advance(busy[pick % len(busy)])):
            self.answers.append(results)

    def deliver(self, pick: int) -> None:
        if not self.answers:
            return
        self.in_flight -= 1
        for result in self.answers.pop(pick % len(self.answers)):
            live = self.streams[result.item.stream]
            if live.plan.done(result.item):
                live.pixels[result.item.block] = result.clean
            else:
                live.later[result.item.block] = (result.item, result.next_input or "")

    @rule(pick=st.integers(0, 11), mask=st.integers(0, 255))
    def one_batch(self, pick: int, mask: int) -> None:
        self.schedule(pick, mask)

    @rule(pick=st.integers(0, 3))
    def one_stage_works(self, pick: int) -> None:
        self.advance(pick)

    @rule(pick=st.integers(0, 3))
    def one_answer_comes(self, pick: int) -> None:
        self.deliver(pick)

    @rule(turns=st.integers(2, 12), pick=st.integers(0, 11), mask=st.integers(0, 255))
    def a_while_passes(self, turns: int, pick: int, mask: int) -> None:
        for turn in range(turns):
            self.schedule(pick + turn, mask)
            self.advance(pick + turn)
            self.deliver(pick)

    @rule(
        changes=st.lists(
            st.tuples(
                st.sampled_from(STREAMS), st.integers(1, 4), st.sampled_from((1, 1, 1, 2, 3)), st.integers(0, 255)
            ),
            min_size=2,
            max_size=8,
        )
    )
    def a_busy_time(self, changes: list[tuple[str, int, int, int]]) -> None:
        """Every block with another K, some with another length, while older blocks are under way."""
        for turn, (name, steps, frames, mask) in enumerate(changes):
            self.steps_change(name, steps)
            self.block_length_changes(name, frames)
            self.chunks_arrive(name, frames, 0.8)
            self.schedule(turn, mask)
            self.advance(mask)
            self.advance(turn)
            if mask & 1:
                self.deliver(turn)

    # bad luck

    @rule(stage=st.integers(0, LAYERS - 1))
    @precondition(lambda self: any(live.pixels for live in self.streams.values()))
    def a_stage_crashes(self, stage: int) -> None:
        self.pipeline.crash(stage % len(self.pipeline.stages))
        self.answers.clear()
        self.in_flight = 0
        for live in self.streams.values():
            live.later.clear()
            live.plan.reset()
            live.lives.append([])

    @rule()
    def the_scheduler_is_replaced(self) -> None:
        for live in self.streams.values():
            live.plan = StreamPlan.from_state(live.plan.state())

    def teardown(self) -> None:
        """Let everything under way finish, then compare with every stream alone."""
        if not hasattr(self, "streams"):
            return
        for _ in range(10_000):
            self.schedule(0, 255)
            self.advance(0)
            self.deliver(0)
            if not (self.candidates() or self.pipeline.busy() or self.answers):
                break
        for name, live in self.streams.items():
            assert not live.plan.under_way
            assert len(live.waiting) < live.frames
            for life in live.lives:
                self.compare(name, live, life, last=life is live.lives[-1])

    def compare(self, name: str, live: Live, life: list[Bound], last: bool) -> None:
        alone = Alone(self.ring, self.sinks, self.refresh, self.rerotate)
        alone.replay(life)
        for block in life:
            assert live.starts[block.number] == alone.starts[block.number]
            if block.number in live.pixels:
                assert live.pixels[block.number] == alone.pixels[block.number], (name, block)
            else:
                assert not last, "only a crash may lose a block"
        if last:
            for step, cache in enumerate(alone.caches):
                self.compare_slot(name, step, cache, alone)

    def compare_slot(self, name: str, step: int, cache: Cache, alone: Alone) -> None:
        for layer in range(LAYERS):
            slot = self.pipeline.slot(name, layer, step)
            assert slot is not None
            held = slot.history()
            wanted = alone.seen(cache[layer])
            assert [(frame.latent, frame.key) for frame in held] == [(latent, key) for _, latent, key in wanted]
            newest_held, newest_wanted = held[-1].rotation, wanted[-1][0]
            distances = [frame.rotation - newest_held for frame in held]
            assert distances == [position - newest_wanted for position, _, _ in wanted]


PlanMachine.TestCase.settings = settings(
    max_examples=180, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
TestPlanAgainstOracle = PlanMachine.TestCase
