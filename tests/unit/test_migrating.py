"""Which worker gives what of a stream to whom, and where a stream may go."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.fleet import Fleet, Pipeline
from services.scheduler.messenger import RefusedError
from services.scheduler.migrating import shares
from services.scheduler.moves import Moves
from services.scheduler.placement import ranges_of
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.clock import SystemClock
from shared.contracts.beats import Beat
from shared.contracts.moving import BlockRange, CutOver, ExportState

LAYERS = 10


def pipeline(name: str, cuts: tuple[int, ...], decode: int) -> Pipeline:
    blocks = ranges_of(cuts, LAYERS)
    workers = tuple(f"{name}-{stage}" for stage in range(len(blocks)))
    return Pipeline(name, "rheo-tiny", workers, blocks, decode)


CUTS = st.sets(st.integers(1, LAYERS - 1), max_size=4).map(lambda cuts: tuple(sorted(cuts)))


@given(CUTS, CUTS, st.integers(0, 4), st.integers(0, 4))
def test_every_block_and_both_caches_are_copied_once(
    old: tuple[int, ...], new: tuple[int, ...], old_decode: int, new_decode: int
) -> None:
    source = pipeline("a", old, min(old_decode, len(old)))
    target = pipeline("b", new, min(new_decode, len(new)))
    pieces = list(shares(source, target))
    blocks = [block for piece in pieces for block in piece.blocks]
    assert sorted(blocks) == list(range(LAYERS))
    for piece in pieces:
        assert set(piece.blocks) <= set(source.blocks[source.workers.index(piece.source)])
        assert set(piece.blocks) <= set(target.blocks[target.workers.index(piece.target)])
    assert [(p.source, p.target) for p in pieces if p.encode] == [("a-0", "b-0")]
    decode = (source.workers[source.decode_stage], target.workers[target.decode_stage])
    assert [(p.source, p.target) for p in pieces if p.decode] == [decode]


def beat(stage: int, first: int, last: int, generation: int = 1, incarnation: str = "a", pipeline: str = "p0") -> Beat:
    roles = ("text", "encode", "stage") if stage == 0 else ("stage", "decode")
    return Beat(
        service="worker",
        instance=f"{pipeline}-{stage}",
        incarnation=incarnation,
        roles=roles,
        pipeline=pipeline,
        stage=stage,
        stages=2,
        model="rheo-tiny",
        first_block=first,
        last_block=last,
        generation=generation,
    )


def test_a_pipeline_is_usable_while_its_blocks_follow_one_another_and_nobody_drains_it() -> None:
    fleet = Fleet(1.5)
    fleet.beat(beat(0, 0, 4), 0.0)
    fleet.beat(beat(1, 5, 9), 0.0)
    (whole,) = fleet.pipelines()
    assert whole.blocks == (range(5), range(5, 10))
    assert whole.decode_stage == 1

    fleet.cut(whole, ranges_of((7,), LAYERS), generation=2)
    assert fleet.pipelines()[0].blocks == (range(7), range(7, 10)), "heartbeats from before the cut are older"
    fleet.beat(beat(0, 0, 6, generation=2), 0.1)
    fleet.beat(beat(1, 7, 9, generation=2), 0.1)
    assert fleet.pipelines()[0].blocks == (range(7), range(7, 10))

    fleet.beat(beat(1, 5, 9, generation=0, incarnation="b"), 0.2)
    assert fleet.pipelines() == [], "one came back as it was started: nothing may be placed there"
    assert not fleet.pipelines(usable=False)[0].fits
    fleet.beat(beat(1, 7, 9, generation=3, incarnation="b"), 0.3)
    assert len(fleet.pipelines()) == 1

    fleet.draining["p0-1"] = "b"
    assert fleet.pipelines() == []
    assert fleet.pipelines(usable=False)[0].draining
    fleet.beat(beat(1, 7, 9, generation=3, incarnation="c"), 0.4)
    assert len(fleet.pipelines()) == 1, "a worker that was started anew is a new one"


async def test_nobody_waits_for_a_state_that_a_lost_worker_was_to_give() -> None:
    moves = Moves(MemoryBus(MemoryBroker()), SystemClock())
    state = ExportState(instance="w0", stream="s", epoch=1, move="a")
    other = state.model_copy(update={"instance": "w1"})
    cut = CutOver(
        instance="w0", pipeline="p0", move="b", term=1, generation=2, blocks=BlockRange(first=0, last=1), stage=0, stages=1
    )  # fmt: skip
    asked = [asyncio.create_task(moves.ask(each, 30.0)) for each in (state, other)]
    asked.append(asyncio.create_task(moves.ask(cut, 30.0)))
    await asyncio.sleep(0.01)
    moves.lost("w0", "was restarted")
    with pytest.raises(RefusedError, match="w0 was restarted"):
        await asyncio.wait_for(asked[0], 5.0)
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in asked[1:]), "a cut is asked of whoever is there now"
    for task in asked[1:]:
        task.cancel()
    await asyncio.gather(*asked[1:], return_exceptions=True)
