"""A stream between two pipelines: which epoch a chunk carries, and where it waits."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.epochs import Epochs
from services.worker.holding import ChunkGate
from shared.bus.port import Received
from shared.contracts.events import ChunkCaptured, SourceTotals
from tests.support.messages import ref, stamp


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.integers(0, 40)), max_size=5))
def test_epochs_change_at_a_frame_block_and_never_for_a_chunk_that_has_its_number(
    changes: list[tuple[int, int, int]],
) -> None:
    epochs, numbered, told = Epochs(1), 0, dict[int, int]()
    for epoch, (more, length, start) in enumerate(changes, start=2):
        for number in range(numbered, numbered + more):
            told[number] = epochs.of(number)
        numbered += more
        first = epochs.adopt(epoch, numbered, length, start)
        assert numbered <= first < numbered + length
        assert (first - start) % length == 0
        assert epochs.adopt(epoch, numbered + 7, length, start) == first, "a repetition gets the same answer"
        assert epochs.of(first) == epoch
        assert epochs.first == 1
        for number, carried in told.items():
            assert epochs.of(number) >= carried or number < first
    with pytest.raises(ValueError, match="is over"):
        epochs.adopt(0, numbered)


def captured(chunk: int, epoch: int) -> Received:
    message = ChunkCaptured(stamp=stamp(chunk=chunk, epoch=epoch), pixels=ref(), rmse=(0.0,) * 4, totals=SourceTotals())
    return Received("rheo.stream.s.chunk", message, 0, {})


async def test_chunks_wait_for_their_epoch_and_come_in_order() -> None:
    seen: list[int] = []

    async def slow(received: Received) -> None:
        await asyncio.sleep(0.001)
        seen.append(received.message.stamp.chunk)

    old, new = ChunkGate(slow, 1, hold=False, size=8), ChunkGate(slow, 2, hold=True, size=8)
    for chunk in range(3):
        await old.on_chunk(captured(chunk, 1))
    for chunk in range(3, 6):
        await old.on_chunk(captured(chunk, 2))
        await new.on_chunk(captured(chunk, 2))
    assert seen == [0, 1, 2]
    assert (len(old), len(new)) == (3, 3)
    # Both ways it may end: the new one goes on …
    await asyncio.gather(new.go_on(2), *(new.on_chunk(captured(chunk, 2)) for chunk in (6, 7)))
    assert seen == [0, 1, 2, 3, 4, 5, 6, 7]
    # … or the old one does, with what it kept.
    seen.clear()
    await old.go_on(2)
    assert seen == [3, 4, 5]
    assert old.takes(1)
    assert old.takes(2)
    assert not old.takes(3)
    assert not new.takes(1)


async def test_what_waits_is_bounded_and_counted() -> None:
    async def nobody(_: Received) -> None:
        raise AssertionError("nothing may come through")

    gate = ChunkGate(nobody, 2, hold=True, size=2)
    for chunk in range(5):
        await gate.on_chunk(captured(chunk, 2))
    assert (len(gate), gate.lost) == (2, 3)
    await gate.go_on(2, hold=True)
    assert len(gate) == 2
