"""Ingest's decisions: chunks, credits, drops. Time is a number."""

from __future__ import annotations

import pytest

from services.ingest.core import DropReason, Intake
from shared.contracts.events import SourceTotals


def offer(intake: Intake[int], count: int, first: int = 0) -> None:
    for index in range(first, first + count):
        intake.offer(index * 100, 100, index, index)


def test_five_frames_make_the_first_chunk_and_four_every_other() -> None:
    intake: Intake[int] = Intake(live=False, credits=8)
    sizes: list[int] = []
    for index in range(17):
        offer(intake, 1, index)
        while (chunk := intake.take(0.0)) is not None:
            sizes.append(len(chunk.frames))
            assert chunk.padding == 0
    assert sizes == [5, 4, 4, 4]


def test_the_last_partial_chunk_is_padded_and_padding_is_not_counted() -> None:
    intake: Intake[int] = Intake(live=False, credits=8)
    offer(intake, 5)
    assert intake.take(0.0) is not None
    offer(intake, 3, 5)
    assert intake.take(0.0) is None
    intake.end()
    chunk = intake.take(0.0)
    assert chunk is not None
    assert (len(chunk.frames), chunk.padding) == (3, 1)
    assert intake.totals() == SourceTotals(captured=8, numbered=8, chunks=2)


def test_a_lossless_source_waits_for_a_credit() -> None:
    intake: Intake[int] = Intake(live=False, credits=1)
    offer(intake, 5)
    assert intake.take(1.0) is not None
    offer(intake, 4, 5)
    assert intake.take(1.0) is None
    assert not intake.has_room
    with pytest.raises(ValueError, match="wait for a credit"):
        offer(intake, 1, 9)
    intake.closed(1, 2.0)
    chunk = intake.take(2.0)
    assert chunk is not None
    assert chunk.number == 1
    assert intake.has_room


def test_a_live_source_keeps_the_newest_frames_and_counts_the_rest() -> None:
    intake: Intake[int] = Intake(live=True, credits=1)
    offer(intake, 5)
    assert intake.take(0.0) is not None
    offer(intake, 10, 5)
    intake.closed(1, 1.0)
    chunk = intake.take(1.0)
    assert chunk is not None
    assert [frame.index for frame in chunk.frames] == [11, 12, 13, 14]
    totals = intake.totals()
    assert totals.dropped == {"no_credit": 6}
    assert totals.captured == totals.numbered + 6


def test_verdicts_are_cumulative_so_a_lost_or_repeated_one_changes_nothing() -> None:
    intake: Intake[int] = Intake(live=False, credits=3)
    for first in (0, 5, 9):
        offer(intake, 5 if first == 0 else 4, first)
        assert intake.take(0.0) is not None
    assert intake.in_flight == 3
    intake.closed(2, 1.0)
    intake.closed(1, 2.0)
    intake.closed(2, 3.0)
    assert intake.in_flight == 1
    intake.closed(99, 4.0)
    assert intake.in_flight == 0


def test_standing_still_is_measured_from_the_last_verdict() -> None:
    intake: Intake[int] = Intake(live=False, credits=2)
    assert intake.stalled_s(50.0) == 0
    offer(intake, 5)
    intake.take(100.0)
    offer(intake, 4, 5)
    intake.take(101.0)
    assert intake.stalled_s(130.0) == 30.0
    intake.closed(1, 140.0)
    assert intake.stalled_s(150.0) == 10.0
    assert intake.oldest_open == 1
    intake.closed(2, 160.0)
    assert intake.stalled_s(500.0) == 0


def test_a_pause_is_no_standstill_however_long_it_is() -> None:
    """A longer block of a lossless stream waits for the rest of its chunks meanwhile."""
    intake: Intake[int] = Intake(live=False, credits=2)
    offer(intake, 5)
    intake.take(100.0)
    intake.pause()
    assert intake.stalled_s(1000.0) == 0
    intake.resume()
    assert intake.stalled_s(1010.0) == 10.0


def test_stopping_drops_what_has_no_number() -> None:
    intake: Intake[int] = Intake(live=False, credits=2)
    offer(intake, 5)
    intake.take(0.0)
    offer(intake, 2, 5)
    intake.stop()
    assert intake.finished
    assert not intake.all_closed
    assert intake.totals().dropped == {DropReason.STOPPED.value: 2}
    intake.closed(1, 1.0)
    assert intake.all_closed


def test_a_successor_goes_on_where_the_mirror_stopped() -> None:
    mirror = SourceTotals(captured=15, numbered=13, chunks=3, dropped={"no_credit": 1})
    intake: Intake[int] = Intake(live=True, credits=4, totals=mirror, closed_chunks=2)
    assert intake.in_flight == 1
    offer(intake, 4, 15)
    chunk = intake.take(0.0)
    assert chunk is not None
    assert chunk.number == 3
    assert [frame.index for frame in chunk.frames] == [15, 16, 17, 18]
    totals = intake.totals()
    assert totals.captured == totals.numbered + sum(totals.dropped.values())
