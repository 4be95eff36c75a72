"""The scheduler's decisions in virtual time: one stream, many streams, deadlines, drops, faults."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from services.scheduler.core import PROBE_AFTER, Decisions, PipelineCore
from services.scheduler.cost_model import CostModel
from services.scheduler.stream_queue import Change, Offer, StreamQueue, StreamSettings
from shared.contracts.events import BatchDone, ChunkStamp, FrameStamp, ItemResult, MotionEstimated, StageBatch
from shared.contracts.refs import TensorPlace, TensorRef
from shared.engine.plan.spec import PRESETS
from shared.engine.plan.stream_plan import StreamPlan

MS = 1_000_000
MODEL = PRESETS["nano"]
REF = TensorRef(owner="w0", host="h", place=TensorPlace.LOCAL, shape=(1,), dtype="float32")


def chunk(stream: str, number: int, captured_ms: int = 0, live: bool = True, epoch: int = 1) -> MotionEstimated:
    count = 5 if number == 0 else 4
    first = 0 if number == 0 else 5 + 4 * (number - 1)
    deadline = (captured_ms + 600) * MS if live else 0
    frames = tuple(
        FrameStamp(index=first + i, pts=first + i, captured_ns=captured_ms * MS, deadline_ns=deadline)
        for i in range(count)
    )
    stamp = ChunkStamp(stream=stream, epoch=epoch, chunk=number, frames=frames, live=live)
    return MotionEstimated(
        stamp=stamp, latents=REF, latent_frames=2 if number == 0 else 1, motion=0.0, noise_scale=0.7, first_timestep=600
    )


@dataclass
class Bench:
    """A pipeline core with a worker that takes ``step_ms`` per item, in virtual time."""

    stages: int = 1
    step_ms: float = 40.0
    now: int = 0
    core: PipelineCore = field(init=False)
    ran: list[StageBatch] = field(default_factory=list)
    flying: list[StageBatch] = field(default_factory=list)
    said: list[Decisions] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = PipelineCore("p0", self.stages, 1, CostModel())

    def stream(self, name: str, steps: int = 2, live: bool = True, frames_per_block: int = 1) -> StreamQueue:
        queue = StreamQueue(
            stream=name,
            epoch=1,
            live=live,
            height=64,
            width=96,
            model=MODEL,
            plan=StreamPlan.for_model(name, 1, MODEL),
            settings=StreamSettings(steps=steps, seed=1, prompt_version=1, frames_per_block=frames_per_block),
        )
        self.core.add(queue)
        return queue

    def offer(self, event: MotionEstimated) -> Offer | None:
        offer, decisions = self.core.offer(event, self.now)
        self.said.append(decisions)
        return offer

    def schedule(self) -> Decisions:
        decisions = self.core.schedule(self.now)
        self.flying.extend(decisions.batches)
        self.said.append(decisions)
        return decisions

    def finish(self) -> StageBatch:
        """The oldest batch in flight comes back."""
        batch = self.flying.pop(0)
        self.ran.append(batch)
        ms = self.step_ms * len(batch.entries)
        self.now += int(ms * MS)
        results = tuple(
            ItemResult(
                stream=entry.item.stream,
                epoch=entry.item.epoch,
                block=entry.item.block,
                step=entry.item.step,
                output=None if entry.item.is_last_step else REF,
            )
            for entry in batch.entries
        )
        done = BatchDone(
            pipeline="p0", generation=batch.generation, seq=batch.seq, results=results, stage_ms=(ms,) * self.stages
        )
        self.said.append(self.core.done(done, self.now))
        return batch

    def run(self) -> list[StageBatch]:
        """Until nothing is left to do."""
        self.schedule()
        while self.flying:
            self.finish()
            self.schedule()
        return self.ran


def steps_of(batch: StageBatch) -> list[tuple[str, int, int]]:
    return [(entry.item.stream, entry.item.block, entry.item.step) for entry in batch.entries]


def test_a_streams_first_block_runs_its_steps_alone_then_steps_of_several_blocks_share_forwards() -> None:
    bench = Bench()
    bench.stream("a", steps=2, live=False)
    for number in range(4):
        bench.offer(chunk("a", number, live=False))
    ran = [steps_of(batch) for batch in bench.run()]
    assert ran[0] == [("a", 0, 0)]
    assert ran[1] == [("a", 0, 1)]
    assert any(len(batch) == 2 for batch in ran), "block b+1 at step 0 rides with block b at step 1"
    done = [item for batch in ran for item in batch]
    assert sorted(done) == [("a", block, step) for block in range(4) for step in range(2)], "every item runs once"
    for step in range(2):
        blocks = [block for _, block, at in done if at == step]
        assert blocks == sorted(blocks), "within a slot, blocks ascend"


@pytest.mark.parametrize("from_text", [False, True])
def test_the_noise_holds_while_nothing_moves_but_not_for_what_has_no_source(from_text: bool) -> None:
    bench = Bench()
    queue = bench.stream("a", steps=2, live=False)
    queue.model = replace(MODEL, noise=replace(MODEL.noise, still_below=0.3))
    queue.from_text = from_text
    for number, motion in enumerate((0.0, 0.29, 0.3, 0.1)):
        bench.offer(chunk("a", number, live=False).model_copy(update={"motion": motion}))
    still = {entry.item.block: entry.item.still for batch in bench.run() for entry in batch.entries}
    assert still == {block: not from_text and block != 2 for block in range(4)}


def test_no_more_than_s_plus_one_batches_are_in_flight() -> None:
    for stages in (1, 2, 4):
        bench = Bench(stages=stages)
        for name in "abcdefgh":
            bench.stream(name, steps=1, live=False)
            bench.offer(chunk(name, 0, live=False))
        bench.core.max_batch = 1
        assert len(bench.schedule().batches) == stages + 1
        assert [batch.seq for batch in bench.flying] == list(range(stages + 1))


def test_a_batch_leaves_just_before_stage_0_is_free_so_that_what_becomes_ready_meanwhile_joins_it() -> None:
    bench = Bench()
    for name in "abc":
        bench.stream(name, steps=1, live=False)
    for _ in range(5):
        bench.core.cost.observe("stage.0", 2 * MODEL.tokens(96, 64), 100.0)
    bench.offer(chunk("a", 0, live=False))
    bench.schedule()
    bench.now = 20 * MS
    bench.offer(chunk("b", 0, live=False))
    assert bench.schedule().batches == []
    bench.now = 60 * MS
    bench.offer(chunk("c", 0, live=False))
    assert bench.schedule().batches == []
    bench.now = bench.core.dispatch_at_ns()
    assert 90 * MS < bench.now < 100 * MS
    (batch,) = bench.schedule().batches
    assert sorted(entry.item.stream for entry in batch.entries) == ["b", "c"]


def test_streams_of_one_size_share_a_forward_and_other_sizes_do_not() -> None:
    bench = Bench()
    bench.stream("a", live=False)
    bench.stream("b", live=False)
    other = bench.stream("c", live=False)
    other.height = 128
    for name in "abc":
        bench.offer(chunk(name, 0, live=False))
    batches = [sorted(entry.item.stream for entry in batch.entries) for batch in bench.schedule().batches]
    assert sorted(batches) == [["a", "b"], ["c"]]


def test_the_least_slack_goes_first() -> None:
    bench = Bench()
    bench.core.max_batch = 1
    bench.stream("later")
    bench.stream("sooner")
    bench.offer(chunk("later", 0, captured_ms=100))
    bench.offer(chunk("sooner", 0, captured_ms=0))
    assert [entry.item.stream for batch in bench.schedule().batches for entry in batch.entries] == ["sooner", "later"]


def test_a_batch_does_not_grow_past_a_members_deadline() -> None:
    bench = Bench()
    for name in "abc":
        bench.stream(name, steps=1)
    first_block = 2 * MODEL.tokens(96, 64)
    for _ in range(5):
        bench.core.cost.observe("stage.0", first_block, 100.0)
    bench.now = 1000 * MS
    for name in "abc":
        bench.offer(chunk(name, 0, captured_ms=1000 - 350))
    decisions = bench.schedule()
    sizes = [len(batch.entries) for batch in decisions.batches]
    assert sizes[0] == 2, "two take 200 of the 250 ms that are left; a third would make all three late"
    assert [drop.stamp.stream for drop in decisions.drops] == ["c"], "behind the two it cannot make it: told at once"


def test_what_can_no_longer_make_its_deadline_is_dropped_before_step_0() -> None:
    bench = Bench(step_ms=50.0)
    bench.stream("a", steps=2)
    for number in range(3):
        bench.offer(chunk("a", number, captured_ms=int(bench.now / MS)))
        bench.run()
    bench.now = 10_000 * MS
    bench.offer(chunk("a", 3, captured_ms=9_350))
    bench.offer(chunk("a", 4, captured_ms=9_600))
    decisions = bench.schedule()
    assert [(drop.stamp.chunk, drop.service, drop.reason) for drop in decisions.drops] == [(3, "scheduler", "stale")]
    assert decisions.released == [REF], "its latents are given back"
    assert [entry.stamps[0].chunk for batch in decisions.batches for entry in batch.entries] == [4]


def test_a_prediction_that_is_wrong_corrects_itself_and_does_not_drop_a_stream_for_ever() -> None:
    bench = Bench(step_ms=20.0)
    bench.stream("a", steps=2)
    for number in range(8):
        bench.offer(chunk("a", number, captured_ms=int(bench.now / MS)))
        bench.run()
    bench.core.cost.scale("stage.0", 100.0)  # the device seemed to have become much slower
    entered: list[int] = []
    for number in range(8, 60):
        bench.now += 250 * MS
        before = len(bench.ran)
        bench.offer(chunk("a", number, captured_ms=int(bench.now / MS)))
        bench.run()
        entered += [entry.stamps[0].chunk for b in bench.ran[before:] for entry in b.entries if entry.item.step == 0]
    assert entered[0] == 8 + PROBE_AFTER, "after a few drops one is measured"
    assert entered[-20:] == list(range(40, 60)), "and in a few seconds all is as it was"


def test_a_longer_block_does_not_wait_for_chunks_that_are_skipped() -> None:
    bench = Bench(step_ms=20.0)
    queue = bench.stream("a", frames_per_block=2)
    spread = chunk("a", 0, captured_ms=1000)
    frames = tuple(
        f.model_copy(update={"captured_ns": f.captured_ns + i * 50 * MS}) for i, f in enumerate(spread.stamp.frames)
    )
    spread = spread.model_copy(update={"stamp": spread.stamp.model_copy(update={"frames": frames})})
    bench.now = 1250 * MS
    bench.offer(spread)
    bench.now += 320 * MS
    assert bench.schedule().batches == [], "as long as nothing is skipped it waits"
    queue.skips = True
    (batch,) = bench.schedule().batches
    assert [stamp.chunk for stamp in batch.entries[0].stamps] == [0]
    assert not queue.hurried, "the next block waits again"


def test_a_longer_block_of_a_source_that_fell_silent_goes_on_short_while_it_can() -> None:
    """What waited for ever would outlive its latents, and the whole pipeline would be rebuilt for it."""
    bench = Bench(step_ms=20.0)
    queue = bench.stream("a", frames_per_block=2)
    bench.offer(chunk("a", 0))
    bench.now = 290 * MS
    assert bench.schedule().batches == [], "its next chunk may come yet"
    bench.now = 310 * MS
    (batch,) = bench.schedule().batches
    assert [stamp.chunk for stamp in batch.entries[0].stamps] == [0]
    assert not queue.hurried, "the next block waits again"
    bench.finish()
    bench.run()
    bench.offer(chunk("a", 1, captured_ms=1000))
    bench.now = 40_000 * MS
    decisions = bench.schedule()
    assert [(drop.stamp.chunk, drop.reason) for drop in decisions.drops] == [(1, "stale")]
    assert decisions.released == [REF]


def test_a_longer_block_of_a_lossless_stream_waits_for_its_chunks_however_long() -> None:
    bench = Bench()
    bench.stream("a", live=False, frames_per_block=2)
    bench.offer(chunk("a", 0, live=False))
    bench.now = 10**15
    decisions = bench.schedule()
    assert (decisions.batches, decisions.drops) == ([], [])


def test_lossless_work_is_never_dropped() -> None:
    bench = Bench()
    bench.stream("a", live=False)
    bench.now = 10**15
    bench.offer(chunk("a", 0, live=False))
    assert bench.schedule().drops == []
    assert len(bench.flying) == 1


def test_repeated_overtaken_and_old_chunks_are_turned_away() -> None:
    bench = Bench()
    bench.stream("a")
    assert bench.offer(chunk("a", 0)) is Offer.TAKEN
    assert bench.offer(chunk("a", 0)) is Offer.DUPLICATE
    assert bench.offer(chunk("a", 2)) is Offer.TAKEN
    assert bench.offer(chunk("a", 1)) is Offer.OVERTAKEN
    assert [drop.reason for drop in bench.said[-1].drops] == ["overtaken"], "a late chunk is closed, not lost"
    assert bench.offer(chunk("a", 3, epoch=0)) is Offer.OLD_EPOCH
    assert bench.offer(chunk("stranger", 0)) is None


def test_a_change_takes_effect_at_the_next_block_and_says_where() -> None:
    bench = Bench()
    queue = bench.stream("a", live=False)
    bench.offer(chunk("a", 0, live=False))
    bench.run()
    queue.change("command-1", Change(StreamSettings(steps=1, seed=77, prompt_version=2)))
    bench.offer(chunk("a", 1, live=False))
    decisions = bench.schedule()
    (applied,) = decisions.applied
    assert (applied.command, applied.version, applied.chunk, applied.pts) == ("command-1", 2, 1, 5)
    item = decisions.batches[0].entries[0].item
    assert (item.steps, item.seed, item.prompt_version) == (1, 77, 2)


def test_items_under_way_keep_their_steps_when_k_goes_down() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=2, live=False)
    for number in range(2):
        bench.offer(chunk("a", number, live=False))
    bench.schedule()
    bench.finish()
    queue.change("down", Change(StreamSettings(steps=1, seed=1, prompt_version=1)))
    bench.offer(chunk("a", 2, live=False))
    done = [item for batch in bench.run() for item in steps_of(batch)]
    assert [step for _, block, step in done if block == 0] == [0, 1]
    assert [step for _, block, step in done if block == 2] == [0]


def test_frame_blocks_wait_for_their_chunks_but_not_past_the_sources_end() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=1, live=False, frames_per_block=3)
    bench.offer(chunk("a", 0, live=False))
    assert bench.schedule().batches == []
    bench.offer(chunk("a", 1, live=False))
    bench.offer(chunk("a", 2, live=False))
    (batch,) = bench.schedule().batches
    assert batch.entries[0].item.frames == 4
    assert [stamp.chunk for stamp in batch.entries[0].stamps] == [0, 1, 2]
    bench.finish()
    bench.offer(chunk("a", 3, live=False))
    assert bench.schedule().batches == []
    queue.ended = True
    (last,) = bench.schedule().batches
    assert last.entries[0].item.frames == 1


def test_a_fault_rebuilds_the_pipeline_live_streams_go_on_and_lossless_ones_fail() -> None:
    bench = Bench()
    bench.stream("live")
    bench.stream("lossless", live=False)
    bench.offer(chunk("live", 0))
    bench.offer(chunk("lossless", 0, live=False))
    bench.schedule()
    decisions = bench.core.fault("batch 0 was lost")
    assert [(drop.stamp.stream, drop.reason) for drop in decisions.drops] == [("live", "pipeline_fault")]
    assert "batch 0 was lost" in decisions.failed["lossless"]
    assert bench.core.generation == 2
    stale = bench.flying.pop()
    assert (
        bench.core.done(
            BatchDone(pipeline="p0", generation=stale.generation, seq=stale.seq, results=(), stage_ms=(1.0,)), bench.now
        )
        == Decisions()
    ), "an answer of the old generation is ignored"
    bench.core.remove("lossless")
    bench.flying.clear()
    bench.offer(chunk("live", 1))
    (batch,) = bench.schedule().batches
    assert (batch.generation, batch.seq) == (2, 0)
    assert batch.entries[0].item.block == 1
    assert batch.entries[0].item.start_frame == 0, "its slots are empty: it begins anew"


def test_a_fault_fails_a_lossless_stream_that_had_nothing_under_way_but_not_one_that_has_not_begun() -> None:
    bench = Bench()
    for name in ("idle", "new"):
        bench.stream(name, live=False)
    bench.offer(chunk("idle", 0, live=False))
    bench.run()
    assert bench.core.in_flight == {}
    assert set(bench.core.fault("another stream's batch was lost").failed) == {"idle"}, "its caches are empty now"


@pytest.mark.parametrize("live", [True, False])
def test_a_batch_that_is_not_reported_is_overdue(live: bool) -> None:
    bench = Bench()
    bench.stream("a", live=live, steps=1)
    for number in range(2):
        bench.offer(chunk("a", number, live=live))
        bench.run()
    bench.offer(chunk("a", 2, live=live))
    bench.schedule()
    assert bench.core.overdue(bench.now + 4_000 * MS, 5_000 * MS, 60_000 * MS) is None
    assert (bench.core.overdue(bench.now + 6_000 * MS, 5_000 * MS, 60_000 * MS) == 2) is live
    assert bench.core.overdue(bench.now + 61_000 * MS, 5_000 * MS, 60_000 * MS) == 2


def test_the_first_batch_of_a_shape_may_take_longer_and_so_may_what_is_behind_it() -> None:
    """A worker may compile for it, and a rebuilt pipeline would have to do the same again."""
    bench = Bench(stages=2)
    for name in ("a", "b"):
        bench.stream(name, steps=1)
        bench.offer(chunk(name, 0))
    bench.run()
    bench.offer(chunk("a", 1))
    bench.schedule()
    bench.offer(chunk("b", 1))
    bench.now += 100 * MS
    bench.schedule()
    first, second = bench.core.in_flight.values()
    assert (first.met, second.met) == (False, False)
    assert bench.core.overdue(bench.now + 20_000 * MS, 5_000 * MS, 60_000 * MS) is None
    assert bench.core.overdue(bench.now + 31_000 * MS, 5_000 * MS, 60_000 * MS) == min(bench.core.in_flight)
    bench.finish()
    assert bench.core.overdue(bench.now + 20_000 * MS, 5_000 * MS, 60_000 * MS) is None
    bench.finish()
    bench.offer(chunk("a", 2))
    bench.schedule()
    assert bench.core.overdue(bench.now + 6_000 * MS, 5_000 * MS, 60_000 * MS) is not None, "met before"


def test_results_of_a_stream_that_has_left_are_given_back() -> None:
    bench = Bench()
    bench.stream("a", steps=2, live=False)
    bench.offer(chunk("a", 0, live=False))
    bench.schedule()
    bench.offer(chunk("a", 1, live=False))
    assert bench.core.remove("a") == [REF], "a chunk that waited"
    bench.finish()
    assert bench.said[-1].released == [REF], "the next step's input"


def test_the_slow_beginnings_of_many_streams_teach_nothing_about_those_that_run() -> None:
    bench = Bench(step_ms=40.0)
    tokens = MODEL.tokens(96, 64)
    bench.stream("old")
    for number in range(12):
        bench.offer(chunk("old", number, captured_ms=bench.now // MS))
        bench.run()
    cost = bench.core.cost
    knew = cost.predict("stage.0", tokens), cost.predict("stage.0", 4 * tokens, 4), cost.error("stage.0")
    assert knew[0] == pytest.approx(40.0)
    bench.step_ms = 400.0
    for name in "abcdefgh":
        bench.stream(name)
        bench.offer(chunk(name, 0, captured_ms=bench.now // MS))
        bench.run()
    assert sum(entry.item.begins for batch in bench.ran for entry in batch.entries) == 2 * 9
    assert (cost.predict("stage.0", tokens), cost.predict("stage.0", 4 * tokens, 4), cost.error("stage.0")) == knew
    for number in range(1, 6):
        bench.offer(chunk("a", number, captured_ms=bench.now // MS))
        bench.run()
    assert cost.predict("stage.0", tokens) == pytest.approx(400.0, rel=0.1), "blocks that follow are believed at once"
