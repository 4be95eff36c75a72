"""Whatever order verdicts come in, and however often, each chunk counts once and the watermark is right."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contracts.events import LedgerTotals
from shared.session.memory import MemoryStore
from shared.session.port import totals_of
from shared.session.state import LEGAL_MOVES, IllegalMoveError, StreamState
from tests.support.messages import spec

VERDICTS = st.dictionaries(
    st.sampled_from(["on_time", "late", "skipped", "egress:lost", "scheduler:stale"]), st.integers(0, 5), max_size=3
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), VERDICTS), max_size=80))
def test_the_ledger_is_what_the_first_verdicts_say(verdicts: list[tuple[int, dict[str, int]]]) -> None:
    async def story() -> None:
        store = MemoryStore()
        first: dict[int, dict[str, int]] = {}
        for chunk, verdict in verdicts:
            assert await store.close_chunk("s", chunk, verdict) is (chunk not in first)
            first.setdefault(chunk, verdict)
        counts: dict[str, int] = {}
        for verdict in first.values():
            for name, frames in verdict.items():
                if frames:
                    counts[name] = counts.get(name, 0) + frames
        totals, closed, through = await store.ledger("s")
        assert totals == totals_of(counts, 0)
        assert totals.closed == sum(counts.values())
        assert closed == len(first)
        assert through == next(chunk for chunk in range(100) if chunk not in first)

    asyncio.run(story())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(StreamState), max_size=12))
def test_no_sequence_of_moves_leaves_an_end_or_goes_back_to_the_start(moves: list[StreamState]) -> None:
    async def story() -> None:
        store = MemoryStore()
        await store.create("s", spec())
        state = StreamState.STARTING
        for to in moves:
            if to in LEGAL_MOVES[state]:
                assert state not in (StreamState.STOPPED, StreamState.FAILED)
                assert to is not StreamState.STARTING
                assert await store.move("s", to) is state
                state = to
            else:
                with pytest.raises(IllegalMoveError):
                    await store.move("s", to)
        session = await store.get("s")
        assert session is not None
        assert session["state"] is state

    asyncio.run(story())


def test_an_empty_ledger_adds_up() -> None:
    assert LedgerTotals().closed == 0
