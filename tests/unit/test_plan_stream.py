"""A stream's plan, told block by block: the first one alone, K up and down, a RoPE refresh, a lost pipeline."""

from __future__ import annotations

import json

import pytest

from shared.engine.plan.items import Item, SlotOp, SlotOpKind, check_batch
from shared.engine.plan.spec import spec_of
from shared.engine.plan.stream_plan import IllegalPlanMoveError, PlanPhase, StreamPlan
from shared.engine.plan.symbolic import SymbolicFault, SymbolicPipeline

STEPS = (700, 500, 400, 200)
RESET_0 = (SlotOp(SlotOpKind.RESET, 0),)


def fork(source: int, slot: int) -> SlotOp:
    return SlotOp(SlotOpKind.FORK, slot, source=source)


def rerotate(slot: int, frames: int) -> SlotOp:
    return SlotOp(SlotOpKind.REROTATE, slot, frames=frames)


def new_plan(**changes: object) -> StreamPlan:
    shape: dict[str, object] = {"ring": 6, "sinks": 3, "rope_refresh_at": 50} | changes
    return StreamPlan("anna", 7, **shape)  # type: ignore[arg-type]


def enter(plan: StreamPlan, steps: int, frames: int = 1, noise: float = 0.8) -> Item:
    return plan.enter(frames, noise, STEPS[:steps], seed=3, prompt_version=1)


def finish(plan: StreamPlan, item: Item) -> list[Item]:
    """Run a block from ``item`` to its end, each step as soon as the one before is done."""
    ran = [item]
    while not plan.done(ran[-1]):
        ran.append(plan.next(ran[-1]))
    return ran


def run(plan: StreamPlan, steps: int, frames: int = 1) -> list[Item]:
    return finish(plan, enter(plan, steps, frames))


# --- the first block -------------------------------------------------------------------------------------------------


def test_the_first_block_runs_its_steps_one_by_one_in_slot_0_each_resetting_it():
    plan = new_plan()
    items = run(plan, steps=4, frames=2)
    assert [(item.step, item.slot, item.ops) for item in items] == [(step, 0, RESET_0) for step in range(4)]
    assert {(item.start_frame, item.first_latent, item.frames) for item in items} == {(0, 0, 2)}


def test_nothing_enters_beside_the_first_block_until_its_last_step_is_scheduled():
    plan = new_plan()
    first = enter(plan, steps=2, frames=2)
    assert plan.phase is PlanPhase.FIRST
    assert not plan.can_enter()
    with pytest.raises(IllegalPlanMoveError, match="illegal enter of block 1 while first"):
        enter(plan, steps=2)
    plan.done(first)
    assert not plan.can_enter()
    plan.next(first)
    assert plan.can_enter()  # its last step is ahead of whatever is scheduled now
    assert plan.phase is PlanPhase.ROLLING


def test_a_first_block_of_one_step_lets_the_next_one_in_at_once():
    plan = new_plan()
    enter(plan, steps=1, frames=2)
    second = enter(plan, steps=1)
    assert (second.start_frame, second.first_latent, second.ops) == (2, 2, ())


def test_the_second_blocks_step_0_forks_slot_0_into_all_others():
    plan = new_plan()
    run(plan, steps=2, frames=2)
    items = run(plan, steps=4)
    assert items[0].ops == (fork(0, 1), fork(0, 2), fork(0, 3))
    assert [(item.slot, item.ops) for item in items[1:]] == [(1, ()), (2, ()), (3, ())]
    assert all(item.ops == () for item in run(plan, steps=4))


# --- order -----------------------------------------------------------------------------------------------------------


def test_blocks_stream_through_the_slots_in_ascending_order():
    plan = new_plan()
    run(plan, steps=2, frames=2)
    one = enter(plan, steps=2)
    two = enter(plan, steps=2)
    plan.done(two)
    assert not plan.can_next(two)  # its answer overtook block 1's, which must write slot 1 first
    with pytest.raises(IllegalPlanMoveError, match="illegal next of block 2 step 0"):
        plan.next(two)
    plan.done(one)
    one = plan.next(one)
    assert plan.can_next(two)
    assert plan.next(two).slot == one.slot == 1
    assert plan.under_way == (1, 2)


def test_a_step_waits_for_the_one_before_and_an_answer_counts_once():
    plan = new_plan()
    item = enter(plan, steps=2, frames=2)
    with pytest.raises(IllegalPlanMoveError, match="illegal next of block 0 step 0"):
        plan.next(item)
    assert not plan.done(item)
    with pytest.raises(IllegalPlanMoveError, match="illegal done of block 0 step 0"):
        plan.done(item)
    last = plan.next(item)
    with pytest.raises(IllegalPlanMoveError, match="illegal next"):
        plan.next(item)
    assert plan.done(last)
    with pytest.raises(IllegalPlanMoveError, match="illegal next of block 0 step 1"):
        plan.next(last)


def test_what_a_block_is_bound_to_never_changes():
    plan = new_plan()
    first = plan.enter(2, 0.75, (650, 500), seed=9, prompt_version=4)
    assert plan.prompt_versions == {4}
    (_, last) = finish(plan, first)
    assert (last.noise_scale, last.timesteps, last.seed, last.prompt_version) == (0.75, (650, 500), 9, 4)
    assert (first.timestep, first.next_timestep, last.timestep, last.next_timestep) == (650, 500, 500, None)
    assert plan.prompt_versions == frozenset()
    still = finish(plan, plan.enter(1, 0.75, (650, 500), seed=9, prompt_version=4, still=True))
    assert [item.still for item in still] == [True, True]
    assert not last.still


# --- K up and down ---------------------------------------------------------------------------------------------------


def test_more_steps_fork_each_new_slot_before_its_source_takes_the_block():
    plan = new_plan()
    run(plan, steps=1, frames=2)
    run(plan, steps=1)
    items = run(plan, steps=3)
    assert [item.ops for item in items] == [(fork(0, 1),), (fork(1, 2),), ()]


def test_fewer_steps_let_blocks_under_way_finish_with_theirs():
    plan = new_plan()
    run(plan, steps=3, frames=2)
    long = enter(plan, steps=3)
    short = enter(plan, steps=1)
    plan.done(long)
    assert plan.done(short)
    assert [item.step for item in finish(plan, plan.next(long))] == [1, 2]


def test_a_slot_that_missed_blocks_is_forked_again():
    plan = new_plan()
    run(plan, steps=2, frames=2)
    run(plan, steps=2)
    run(plan, steps=1)  # slot 1 misses this block
    assert [item.ops for item in run(plan, steps=2)] == [(fork(0, 1),), ()]


def test_the_fork_waits_for_the_older_block_that_still_writes_that_slot():
    plan = new_plan()
    run(plan, steps=2, frames=2)
    old = enter(plan, steps=2)
    enter(plan, steps=1)
    assert plan.can_enter(steps=1)
    assert not plan.can_enter(steps=2)  # it would fork into slot 1 under block 1's feet
    assert not plan.can_enter()
    plan.done(old)
    plan.next(old)
    assert enter(plan, steps=2).ops == (fork(0, 1),)


# --- RoPE ------------------------------------------------------------------------------------------------------------


def test_start_frames_go_back_when_they_would_reach_the_limit():
    plan = StreamPlan.for_model("anna", 1, spec_of("wan2.1-1.3b"))
    starts = [run(plan, steps=1, frames=2)[0].start_frame]
    starts += [run(plan, steps=1)[0].start_frame for _ in range(60)]
    assert starts == [0, *range(2, 50), *range(5, 17)]


def test_a_refresh_rerotates_every_slot_when_its_first_new_block_reaches_it():
    plan = new_plan(rope_refresh_at=9)
    run(plan, steps=3, frames=2)
    for _ in range(6):
        run(plan, steps=3)
    old = enter(plan, steps=3)
    assert (old.start_frame, plan.next_start_frame) == (8, 5)
    new = enter(plan, steps=3)
    assert (new.start_frame, new.first_latent) == (5, 9)
    assert new.ops == (rerotate(0, -4),)  # frame 8, the newest in the cache, moves to 4
    assert [item.ops for item in finish(plan, old)] == [(), (), ()]  # the old block's slots are still as they were
    assert [item.ops for item in finish(plan, new)][1:] == [(rerotate(1, -4),), (rerotate(2, -4),)]
    assert all(item.ops == () for item in run(plan, steps=3))


def test_a_refresh_and_a_new_slot_together_rotate_first_and_then_fork():
    plan = new_plan(rope_refresh_at=9)
    run(plan, steps=1, frames=2)
    for _ in range(7):
        run(plan, steps=1)
    assert [item.ops for item in run(plan, steps=2)] == [(rerotate(0, -4), fork(0, 1)), ()]


def test_without_rerotation_cached_keys_stay_where_they_are():
    plan = new_plan(rope_refresh_at=9, rerotate=False)
    run(plan, steps=1, frames=2)
    items = [run(plan, steps=1)[0] for _ in range(9)]
    assert items[7].start_frame == 5
    assert all(item.ops == () for item in items)


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_blocks_must_fit_the_ring():
    plan = new_plan()
    with pytest.raises(ValueError, match="1…6 do"):
        enter(plan, steps=1, frames=7)
    enter(plan, steps=1, frames=4)
    with pytest.raises(ValueError, match="1…3 do"):
        enter(plan, steps=1, frames=4)
    assert enter(plan, steps=1, frames=3).start_frame == 4


@pytest.mark.parametrize("timesteps", [(), (0,), (700, 1200)])
def test_timesteps_must_be_levels_of_the_table(timesteps: tuple[int, ...]):
    with pytest.raises(ValueError, match="will not do"):
        new_plan().enter(1, 0.8, timesteps, 0, 1)


def test_a_refused_block_leaves_no_trace():
    plan = new_plan()
    before = plan.state()
    with pytest.raises(ValueError, match="does not fit"):
        enter(plan, steps=1, frames=9)
    assert plan.state() == before


def test_a_refresh_that_would_come_again_at_once_is_refused():
    with pytest.raises(ValueError, match="9 is the least"):
        new_plan(rope_refresh_at=8)
    with pytest.raises(ValueError, match="at least one place must roll"):
        new_plan(sinks=6)


# --- loss and takeover -----------------------------------------------------------------------------------------------


def test_after_a_lost_pipeline_the_next_block_is_a_first_one_but_its_noise_is_new():
    plan = new_plan()
    run(plan, steps=2, frames=2)
    run(plan, steps=2)
    lost = enter(plan, steps=2)
    assert plan.reset() == (2,)
    assert plan.phase is PlanPhase.EMPTY
    with pytest.raises(IllegalPlanMoveError, match="illegal done of block 2"):
        plan.done(lost)
    again = run(plan, steps=2)
    assert [item.ops for item in again] == [RESET_0, RESET_0]
    assert (again[0].block, again[0].start_frame, again[0].first_latent) == (3, 0, 4)
    assert run(plan, steps=2)[0].ops == (fork(0, 1),)


def test_another_scheduler_goes_on_in_the_middle_of_blocks():
    plan = new_plan()
    run(plan, steps=3, frames=2)
    done, running = enter(plan, steps=3), enter(plan, steps=3)
    plan.done(done)
    twin = StreamPlan.from_state(json.loads(json.dumps(plan.state())))
    assert twin.state() == plan.state()
    for it in (plan, twin):
        assert [item.ops for item in finish(it, it.next(done))] == [(), ()]
        assert [item.step for item in finish(it, running)] == [0, 1, 2]
    assert enter(twin, steps=4) == enter(plan, steps=4)
    with pytest.raises(ValueError, match="not the state"):
        StreamPlan.from_state({"stream": "anna"})


# --- batches, and the engine the plan is checked with ----------------------------------------------------------------


def test_a_batch_holds_a_slot_once_and_one_length():
    plan = new_plan()
    (first,) = run(plan, steps=1, frames=2)
    second = enter(plan, steps=2)
    assert second.touches == {0, 1}
    check_batch([second])
    with pytest.raises(ValueError, match="two items of one batch touch slot 0 of stream anna"):
        check_batch([second, second])
    with pytest.raises(ValueError, match=r"\[1, 2\] latent frames cannot share"):
        check_batch([StreamPlan("ben", 1, ring=6, sinks=3).enter(2, 0.8, (700,), 0, 1), second])
    assert Item.from_plain(json.loads(json.dumps(first.to_plain()))) == first


def test_the_public_codes_lock_step_is_one_of_the_legal_orders():
    """Block t at step 0, t−1 at step 1, … in one batch, against each block by itself."""

    def pixels(lock_step: bool) -> list[str]:
        plan, pipeline = new_plan(), SymbolicPipeline(2, 4, 6, 3)
        clean: list[str] = []
        under_way: list[tuple[Item, str]] = []

        def tick(entries: list[tuple[Item, str]]) -> None:
            pipeline.submit(entries)
            under_way.clear()
            for result in (*pipeline.advance(0), *pipeline.advance(1)):
                if plan.done(result.item):
                    clean.append(result.clean)
                else:
                    under_way.append((result.item, result.next_input or ""))

        for number in range(16):
            ready = [(plan.next(item), given) for item, given in under_way if plan.can_next(item)]
            tick([*ready, (enter(plan, steps=3, frames=1 if number else 2), f"source {number}")])
            while under_way and (number == 0 or not lock_step):
                tick([(plan.next(item), given) for item, given in under_way])
        while under_way:
            tick([(plan.next(item), given) for item, given in under_way])
        return clean

    assert len(pixels(True)) == 16
    assert pixels(True) == pixels(False)


def test_the_symbolic_engine_sees_what_a_real_stage_could_not():
    plan, pipeline = new_plan(), SymbolicPipeline(1, 1, 6, 3)
    first = enter(plan, steps=1, frames=2)
    second, third = enter(plan, steps=2), enter(plan, steps=2)
    for item, reason in ((second, "is empty"), (first, "")):
        pipeline.submit([(item, "x")])
        if reason:
            with pytest.raises(SymbolicFault, match=reason):
                pipeline.advance(0)
        else:
            pipeline.advance(0)
    pipeline.submit([(third, "x")])
    pipeline.advance(0)
    pipeline.submit([(second, "x")])
    with pytest.raises(SymbolicFault, match="holds block 2, block 1 comes too late"):
        pipeline.advance(0)


def test_a_missing_batch_is_a_fault_and_an_old_generation_is_ignored():
    plan, pipeline = new_plan(), SymbolicPipeline(2, 2, 6, 3)
    stage = pipeline.stages[0]
    old = pipeline.submit([(enter(plan, steps=1, frames=2), "x")])
    pipeline.submit([(enter(plan, steps=1), "x")])
    skipped = pipeline.submit([(enter(plan, steps=1), "x")])
    pipeline.advance(0)
    with pytest.raises(SymbolicFault, match="expected batch 1 of generation 0, got 2"):
        stage.run(skipped)
    pipeline.crash(stage=1)
    assert pipeline.busy() == ()
    plan.reset()
    pipeline.submit([(enter(plan, steps=1), "x")])
    pipeline.advance(0)
    assert stage.run(old) is None
    (result,) = pipeline.advance(1)
    assert result.item.block == 3
