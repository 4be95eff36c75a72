"""Each policy chooses what its name says; a frame block grows only where that helps, and never beyond what a ring can hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from services.scheduler.batching import Ready, choose
from services.scheduler.core import PipelineCore
from services.scheduler.cost_model import CostModel
from services.scheduler.forecast import Forecast
from services.scheduler.messenger import RefusedError
from services.scheduler.placing import check_settings
from services.scheduler.policies import LOSSLESS_ORDER_NS, POLICIES, SLACK
from services.scheduler.stream_queue import StreamQueue, StreamSettings, Work
from shared.contracts.events import ChunkStamp, FrameStamp, MotionEstimated
from shared.engine.plan.items import Item
from shared.engine.plan.spec import PRESETS
from shared.engine.plan.stream_plan import StreamPlan
from tests.unit.test_scheduler_core import MS, REF, chunk

MODEL = PRESETS["nano"]
TOKENS = MODEL.tokens(96, 64)
MEASURED = 12


def costs(ms: Callable[[float], float]) -> CostModel:
    """``ms(latent tokens)`` of a forward, for up to four items of T up to four; nothing is left of the assumed error."""
    model = CostModel()
    for units in {TOKENS * frames * items for frames in range(1, 5) for items in range(1, 5)}:
        for items in range(1, 5):
            for _ in range(MEASURED):
                model.observe("stage.0", units, ms(units), items)
    return model


def forecast(ms: Callable[[float], float]) -> Forecast:
    made = Forecast(costs(ms), 1)
    made.renew()
    return made


def work(stream: str, deadline_ms: int, ready_ms: int = 0, number: int = 0) -> Work:
    live = deadline_ms > 0
    frames = (FrameStamp(index=number, pts=number, captured_ns=1, deadline_ns=deadline_ms * MS),)
    stamp = ChunkStamp(stream=stream, epoch=1, chunk=number, frames=frames, live=live)
    return Work(stream, 1, (stamp,), (REF,), deadline_ms * MS, deadline_ms * MS, ready_ms * MS)


def ready(policy: str, predicted: Forecast, each: Work, left: int = 1, frames: int = 1) -> Ready:
    made = Ready(each, (frames, 0, 64, 96), TOKENS * frames, TOKENS * frames, left)
    made.plan(predicted, POLICIES[policy])
    return made


def chosen(policy: str, predicted: Forecast, *found: Ready) -> list[str]:
    ordered = sorted(found, key=lambda each: each.key)
    members = choose(ordered, 0, predicted, POLICIES[policy], max_items=4)
    return [f"{member.work.stream}{member.work.stamps[0].chunk}" for member in members]


def first(policy: str, predicted: Forecast, *works: tuple[Work, int]) -> str:
    return min((ready(policy, predicted, each, left) for each, left in works), key=lambda each: each.key).work.stream


def test_slack_counts_the_work_left_edf_the_deadline_and_the_others_who_came_first() -> None:
    predicted = forecast(lambda tokens: 10.0 * tokens / TOKENS)
    much, little, early = (work("much", 100, 2), 4), (work("little", 90, 3), 1), (work("early", 500, 1), 1)
    assert first("slack", predicted, much, little, early) == "much", "60 ms of slack against 80 and 490"
    assert first("edf", predicted, much, little, early) == "little"
    assert first("fifo", predicted, much, little, early) == "early"
    assert first("maxbatch", predicted, much, little, early) == "early"


@pytest.mark.parametrize("name", ["slack", "edf"])
def test_lossless_work_goes_after_all_live_work_the_oldest_first(name: str) -> None:
    order = POLICIES[name].order
    live, old, new = work("live", 10**9, 9), work("old", 0, 1), work("new", 0, 2)
    assert order(live, 0) < LOSSLESS_ORDER_NS <= order(old, 0) < order(new, 0)


def test_slack_grows_while_deadlines_hold_fifo_keeps_to_one_stream_maxbatch_takes_whoever_fits() -> None:
    predicted = forecast(lambda tokens: 20.0 + 10.0 * tokens / TOKENS)  # 30 ms, two 40, three 50, four 60

    def choice(policy: str) -> list[str]:
        works = (work("a", 45, 1), work("b", 200, 2), work("a", 300, 3, 1), work("c", 400, 4), work("d", 500, 5))
        return chosen(policy, predicted, *(ready(policy, predicted, each) for each in works))

    assert choice("slack") == choice("edf") == ["a0", "b0"], "with three a0 would end at 50, due at 45"
    assert choice("fifo") == ["a0", "a1"]
    assert choice("maxbatch") == ["a0", "b0", "a1", "c0"], "four are the most"


def test_slack_does_not_share_what_sharing_does_not_make_faster_and_maxbatch_does() -> None:
    predicted = forecast(lambda tokens: 30.0 * tokens / TOKENS)
    found = {
        name: chosen(name, predicted, *(ready(name, predicted, work(who, 900)) for who in "ab"))
        for name in ("slack", "maxbatch")
    }
    assert found == {"slack": ["a0"], "maxbatch": ["a0", "b0"]}


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_no_policy_puts_two_buckets_into_a_forward(name: str) -> None:
    predicted = forecast(lambda tokens: 20.0 + tokens / TOKENS)
    found = (ready(name, predicted, work("a", 900)), ready(name, predicted, work("b", 901), frames=2))
    assert chosen(name, predicted, *found) == ["a0"]
    assert choose([], 0, predicted, POLICIES[name], max_items=4) == []


def test_a_live_chunk_of_another_bucket_is_not_made_late_by_a_batch_that_grows() -> None:
    predicted = forecast(lambda tokens: 20.0 + 10.0 * tokens / TOKENS)
    a, b = (ready("slack", predicted, work(who, 200)) for who in "ab")
    assert chosen("slack", predicted, a, b, ready("slack", predicted, work("z", 300), frames=2)) == ["a0", "b0"]
    tight = ready("slack", predicted, work("z", 75), frames=2)  # 40 ms: after 30 of one it is in time, after 40 not
    assert [each.work.stream for each in choose([a, b, tight], 0, predicted, SLACK, 4)] == ["a"]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_only_slack_and_edf_drop_what_is_too_late(name: str) -> None:
    core = PipelineCore("p0", 1, 1, costs(lambda tokens: 400.0), policy=POLICIES[name])
    core.add(stream("a"))
    core.offer(chunk("a", 0), 0)
    decisions = core.schedule(250 * MS)
    late = name in ("slack", "edf")
    assert [drop.reason for drop in decisions.drops] == (["stale"] if late else [])
    assert len(decisions.batches) == (0 if late else 1)


def stream(name: str, longest: int = 0) -> StreamQueue:
    asked = StreamSettings(steps=1, seed=1, prompt_version=1, max_frames_per_block=longest)
    return StreamQueue(name, 1, True, 64, 96, MODEL, StreamPlan.for_model(name, 1, MODEL), asked)


def second_block(ms: Callable[[float], float], longest: int, deadline_ms: int = 5000, waiting: int = 5) -> int:
    """T of the block after a stream's first one, with so many chunks waiting."""
    core = PipelineCore("p0", 1, 1, costs(ms))
    queue = stream("a", longest)
    queue.plan.done(enter(queue))
    core.add(queue)
    for number in range(1, waiting + 1):
        core.offer(due(chunk("a", number), deadline_ms), 0)
    entry = core.schedule(0).batches[0].entries[0]
    assert entry.stamps[0].chunk == 1
    return entry.item.frames


def enter(queue: StreamQueue) -> Item:
    """The stream's first block, so that the plan is past its beginning."""
    queue.offer(chunk(queue.stream, 0), 0)
    candidate = queue.candidate()
    assert candidate is not None
    bound, _ = queue.enter(candidate)
    assert bound.item is not None
    return bound.item


def due(event: MotionEstimated, deadline_ms: int) -> MotionEstimated:
    frames = tuple(frame.model_copy(update={"deadline_ns": deadline_ms * MS}) for frame in event.stamp.frames)
    return event.model_copy(update={"stamp": event.stamp.model_copy(update={"frames": frames})})


def test_a_frame_block_grows_where_it_saves_time_per_frame() -> None:
    assert second_block(lambda tokens: 40.0 + tokens / TOKENS, longest=3) == 3
    assert second_block(lambda tokens: 40.0 + tokens / TOKENS, longest=3, waiting=2) == 2, "no longer than what waits"
    assert second_block(lambda tokens: 40.0 + tokens / TOKENS, longest=0) == 1, "its T stays"


def test_it_does_not_grow_for_less_than_a_tenth_nor_past_its_first_frames_deadline() -> None:
    assert second_block(lambda tokens: 40.0 * tokens / TOKENS, longest=3) == 1
    assert second_block(lambda tokens: 4.0 + 40.0 * tokens / TOKENS, longest=3) == 1, "6 % of a frame"
    assert second_block(lambda tokens: 40.0 + 10.0 * tokens / TOKENS, longest=3, deadline_ms=65) == 2, "three end at 70"
    assert second_block(lambda tokens: 40.0 + 10.0 * tokens / TOKENS, longest=3, deadline_ms=55) == 1


def test_no_block_may_be_asked_to_grow_beyond_the_ring_without_its_sinks() -> None:
    most = MODEL.ring - MODEL.sinks
    check_settings(MODEL, 1, most)
    with pytest.raises(RefusedError, match=f"give 1…{most}"):
        check_settings(MODEL, 1, most + 1)
    assert second_block(lambda tokens: 40.0 + tokens / TOKENS, longest=most, waiting=most + 2) == most
    queue = stream("a", most)
    queue.plan.done(enter(queue))
    assert queue.plan.most_frames() == most
