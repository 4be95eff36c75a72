"""Any order of changes, chunks, pauses and faults: the rules hold, and each command is told with the block it is bound to.

The scheduler's own decisions drive the symbolic pipeline, which refuses what breaks a rule of slots and sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.core import Decisions, PipelineCore
from services.scheduler.cost_model import CostModel
from services.scheduler.stream_queue import Applied, Change, StreamQueue, StreamSettings
from shared.contracts.events import BatchDone, ChunkStamp, ItemResult, StageBatch
from shared.engine.plan.items import Item
from shared.engine.plan.stream_plan import StreamPlan
from shared.engine.plan.symbolic import SymbolicPipeline
from tests.unit.test_scheduler_core import MODEL, MS, REF, chunk

STREAMS = {"live": True, "lossless": False}

CHANGES = st.one_of(
    st.builds(dict, steps=st.integers(1, 4)),
    st.builds(dict, seed=st.integers(0, 5)),
    st.builds(dict, frames_per_block=st.integers(1, 3)),
    st.builds(dict, noise=st.just(True), steps=st.integers(1, 4)),
    st.builds(dict, prompt=st.just(True), blend_chunks=st.integers(0, 5), recache=st.booleans(), noise=st.booleans()),
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("chunk"), st.sampled_from(sorted(STREAMS)), st.integers(1, 4)),
        st.tuples(st.just("run"), st.just(""), st.integers(1, 6)),
        st.tuples(st.just("change"), st.sampled_from(sorted(STREAMS)), CHANGES),
        st.tuples(st.just("blend"), st.sampled_from(sorted(STREAMS)), st.integers(0, 5)),
        st.tuples(st.just("play"), st.sampled_from(sorted(STREAMS)), st.integers(1, 3)),
        st.tuples(st.just("pause"), st.sampled_from(sorted(STREAMS)), st.booleans()),
        st.tuples(st.just("fault"), st.just(""), st.integers(0, 9)),
    ),
    min_size=5,
    max_size=40,
)


@dataclass
class Expected:
    """What the outside knows of a stream: its newest settings, its commands, and which prompts its stages keep."""

    asked: StreamSettings
    noise_version: int = 0
    heard_noise: int = 0  # what motion has been told of it: the newest, some chunks later
    prompts: int = 1
    kept: set[int] = field(default_factory=lambda: {1})
    commands: dict[str, tuple[int, Change]] = field(default_factory=dict)  # → (blocks entered before, change)
    chunks: int = 0


@dataclass
class Entered:
    """A block as it entered step 0."""

    item: Item
    stamps: tuple[ChunkStamp, ...]
    noise_version: int
    asked: StreamSettings


class World:
    """One scheduler core on a symbolic pipeline of two stages, in virtual time."""

    def __init__(self) -> None:
        self.now = 0
        self.core = PipelineCore("p0", 2, 1, CostModel())
        self.pipeline = SymbolicPipeline(2, 4, MODEL.ring, MODEL.sinks)
        self.flying: list[StageBatch] = []
        self.inputs: dict[tuple[str, int], str] = {}
        self.noise_of: dict[tuple[str, int], int] = {}
        self.applied: list[tuple[int, Applied]] = []  # (blocks of the stream that had entered, what was told)
        self.blocks: dict[str, list[Entered]] = {name: [] for name in STREAMS}
        self.streams = {name: self._add(name, live) for name, live in STREAMS.items()}

    def _add(self, name: str, live: bool) -> Expected:
        asked = StreamSettings(steps=2, seed=0, prompt_version=1)
        plan = StreamPlan.for_model(name, 1, MODEL)
        self.core.add(StreamQueue(name, 1, live, 64, 96, MODEL, plan, asked))
        return Expected(asked)

    def offer(self, name: str, count: int) -> None:
        known = self.streams[name]
        for _ in range(count):
            event = chunk(name, known.chunks, captured_ms=self.now // MS, live=STREAMS[name])
            self.noise_of[name, known.chunks] = known.heard_noise
            self.core.offer(event.model_copy(update={"noise_version": known.heard_noise}), self.now)
            known.chunks += 1
        known.heard_noise = known.noise_version

    def change(self, name: str, wanted: dict[str, Any]) -> None:
        """As the desk does: prepare the prompt, keeping what is still read, then bind."""
        known, queue = self.streams[name], self.core.streams[name]
        asked = replace(known.asked, **{k: v for k, v in wanted.items() if hasattr(known.asked, k)})
        if wanted.get("prompt"):
            known.prompts += 1
            asked = replace(asked, prompt_version=known.prompts)
            known.kept = set(range(min({known.prompts, *queue.prompts_used}), known.prompts + 1))
        known.noise_version += bool(wanted.get("noise"))
        change = Change(
            asked,
            noise_version=known.noise_version if wanted.get("noise") else 0,
            blend_chunks=wanted.get("blend_chunks", 0),
            recache=wanted.get("recache", False),
        )
        known.asked = asked
        command = f"{name}-{len(known.commands)}"
        known.commands[command] = (len(self.blocks[name]), change)
        queue.change(command, change)

    def schedule(self) -> None:
        decisions = self.core.schedule(self.now)
        self._note(decisions)
        for batch in decisions.batches:
            entries = []
            for entry in batch.entries:
                item = entry.item
                assert set(item.prompts) <= self.streams[item.stream].kept, "a stage would not know this prompt"
                if item.step == 0:
                    self.inputs[item.stream, item.block] = "+".join(str(stamp.chunk) for stamp in entry.stamps)
                entries.append((item, self.inputs[item.stream, item.block]))
            self.pipeline.submit(entries)
            self.flying.append(batch)

    def _note(self, decisions: Decisions) -> None:
        for batch in decisions.batches:
            for entry in batch.entries:
                item = entry.item
                if item.step == 0:
                    noise = min(self.noise_of[item.stream, stamp.chunk] for stamp in entry.stamps)
                    asked = self.streams[item.stream].asked
                    self.blocks[item.stream].append(Entered(item, entry.stamps, noise, asked))
        self.applied += [(len(self.blocks[told.stream]), told) for told in decisions.applied]

    def finish(self) -> None:
        """The oldest batch runs through both stages and comes back."""
        batch = self.flying.pop(0)
        self.pipeline.advance(0)
        results = self.pipeline.advance(1)
        self.now += 20 * MS
        done: list[ItemResult] = []
        for result in results:
            item = result.item
            self.inputs[item.stream, item.block] = result.next_input or ""
            again = None if result.next_input is None else REF
            done.append(ItemResult(stream=item.stream, epoch=1, block=item.block, step=item.step, output=again))
        report = BatchDone(
            pipeline="p0", generation=batch.generation, seq=batch.seq, results=tuple(done), stage_ms=(10.0, 10.0)
        )
        self.core.done(report, self.now)

    def run(self, batches: int) -> None:
        self.schedule()
        while self.flying and batches:
            self.finish()
            self.schedule()
            batches -= 1

    def fault(self) -> None:
        """A stage comes back empty. A lossless stream fails by that; here it goes on, to see more."""
        self.core.fault("scripted")
        self.pipeline.crash(0)
        self.flying.clear()

    def drain(self) -> None:
        """Nothing is paused, and enough chunks come for the longest block under the newest noise."""
        for name in STREAMS:
            self.core.streams[name].paused = False
            for _ in range(3):
                self.offer(name, 4)
                self.run(1000)


@settings(max_examples=80, deadline=None)
@given(ACTIONS)
def test_each_change_is_told_once_with_the_first_block_that_carries_it(actions: list[tuple[str, str, Any]]) -> None:
    world = World()
    for name in STREAMS:
        world.offer(name, 3)
    world.run(1000)
    for action, name, value in actions:
        if action == "chunk":
            world.offer(name, value)
        elif action == "run":
            world.run(value)
        elif action == "change":
            world.change(name, value)
        elif action == "blend":
            world.change(name, {"prompt": True, "blend_chunks": value})
        elif action == "play":
            world.offer(name, value)
            world.run(1000)
        elif action == "pause":
            world.core.streams[name].paused = value
        elif value > 7:
            world.fault()
    world.drain()
    for name, known in world.streams.items():
        blocks = world.blocks[name]
        for block in blocks:
            check_bound(block)
        check_prompts(blocks)
        anew = {change.settings.prompt_version for _, change in known.commands.values() if change.recache}
        check_windows(blocks, anew)
        told = {answer.command: answer for _, answer in world.applied if answer.stream == name}
        assert len(told) == sum(answer.stream == name for _, answer in world.applied), "told once"
        assert told.keys() == known.commands.keys(), "told at all"
        for command, (before, change) in known.commands.items():
            first = next(b for b in blocks[before:] if b.noise_version >= change.noise_version)
            assert told[command].chunk == first.stamps[0].chunk
            assert told[command].pts == first.stamps[0].frames[0].pts
            assert told[command].version == change.settings.prompt_version
            check_end_of_blend(blocks, told[command], change.blend_chunks)


def check_bound(block: Entered) -> None:
    """A block carries what was asked for last, whole."""
    item, asked = block.item, block.asked
    assert (item.steps, item.seed, item.prompt_version) == (asked.steps, asked.seed, asked.prompt_version)
    assert len(block.stamps) <= asked.frames_per_block
    assert item.forward_frames <= MODEL.ring


def check_prompts(blocks: list[Entered]) -> None:
    """Blends fall, and start from what was seen most."""
    for before, after in pairwise(block.item for block in blocks):
        if after.prompt_version == before.prompt_version:
            assert after.blend < before.blend or after.blend == before.blend == 0.0
        elif after.blend:
            seen = before.blend_version if before.blend > 0.5 else before.prompt_version
            assert after.blend_version == seen
    if blocks:
        assert blocks[0].item.blend == 0.0


def check_windows(blocks: list[Entered], anew: set[int]) -> None:
    """The window goes along with the first block that holds nothing but a prompt that asked for it, and with no other."""
    pure: set[int] = set()
    for item in (block.item for block in blocks):
        is_first = not item.blend and item.prompt_version not in pure
        asked = item.prompt_version in anew and is_first and item.start_frame > 0
        assert (item.context > 0) == asked
        if not item.blend:
            pure.add(item.prompt_version)


def check_end_of_blend(blocks: list[Entered], told: Applied, chunks: int) -> None:
    """From the chunk that was named on nothing is left of the old prompt; it is the first block after so many chunks."""
    under = [block for block in blocks if block.item.prompt_version == told.version]
    if told.until < 0 or not under:
        return
    begin, length = under[0].stamps[0].chunk, under[0].asked.frames_per_block
    assert begin + chunks <= told.until < begin + chunks + length
    for block in under:
        assert not block.item.blend or block.stamps[-1].chunk < told.until
