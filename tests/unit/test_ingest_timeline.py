"""Timestamps: kept, repaired, resampled; and when a live frame is due."""

from __future__ import annotations

from fractions import Fraction

import pytest

from services.ingest.pacing import LivePacer, Pace
from services.ingest.timeline import ConstantRate, Monotonic, Timed

MS = 1_000_000


def repaired(*pts: int | None, duration: int = 10) -> list[int]:
    line = Monotonic()
    return [line.repair(stamp, duration) for stamp in pts]


def test_a_variable_frame_rate_is_left_alone() -> None:
    assert repaired(0, 3, 50, 51, 400) == [0, 3, 50, 51, 400]


def test_a_jump_ahead_is_kept() -> None:
    assert repaired(0, 10, 90_000, 90_010) == [0, 10, 90_000, 90_010]


def test_a_clock_that_starts_again_goes_on_where_it_was() -> None:
    assert repaired(0, 10, 20, 0, 10, 20) == [0, 10, 20, 30, 40, 50]


def test_one_wrong_stamp_does_not_shift_the_rest() -> None:
    assert repaired(0, 10, 20, 15, 40, 50) == [0, 10, 20, 30, 40, 50]


def test_missing_stamps_are_filled_in() -> None:
    assert repaired(None, None, 20, None) == [0, 10, 20, 30]


def resample(fps: float, *times: float, last: float = 0.1) -> list[tuple[float, int]]:
    """(time, source frame) of every output frame; times in seconds."""
    line: ConstantRate[int] = ConstantRate(Fraction(1, 1000), fps)
    out: list[Timed[int]] = []
    for number, time in enumerate(times):
        gap = times[number + 1] - time if number + 1 < len(times) else last
        out += line.feed(Timed(round(time * 1000), round(gap * 1000), number))
    out += line.flush()
    return [(float(frame.pts * line.time_base), frame.pixels) for frame in out]


def test_a_faster_source_loses_frames_evenly() -> None:
    out = resample(10, *(i / 30 for i in range(30)), last=1 / 30)
    assert [time for time, _ in out] == pytest.approx([i / 10 for i in range(10)])
    assert [frame for _, frame in out] == [1 + 3 * i for i in range(10)]


def test_a_slower_source_repeats_frames() -> None:
    assert [frame for _, frame in resample(10, 0.0, 0.2, 0.4, last=0.2)] == [0, 0, 1, 1, 2, 2]


def test_the_first_timestamp_is_kept() -> None:
    assert resample(10, 0.033, 0.133)[0][0] == pytest.approx(0.033)


def test_a_long_gap_is_kept_as_a_gap() -> None:
    out = resample(10, 0.0, 0.1, 100.0, 100.1)
    assert len(out) < 10
    assert out[-1][0] == pytest.approx(100.1)


def test_a_single_short_frame_still_gives_one() -> None:
    assert len(resample(5, 0.0, last=0.01)) == 1


def test_live_frames_are_due_at_the_source_s_pace() -> None:
    pacer = LivePacer(Fraction(1, 1000), behind_ns=300 * MS)
    start = 1_000_000 * MS
    assert pacer.due(500, start) == (Pace.WAIT, start)
    assert pacer.due(540, start + 1 * MS) == (Pace.WAIT, start + 40 * MS)
    assert pacer.due(600, start + 300 * MS) == (Pace.WAIT, start + 100 * MS)


def test_a_source_that_falls_behind_drops_and_then_starts_afresh() -> None:
    pacer = LivePacer(Fraction(1, 1000), behind_ns=300 * MS)
    start = 1_000_000 * MS
    pacer.due(0, start)
    assert pacer.due(40, start + 500 * MS)[0] is Pace.DROP
    late = start + 2000 * MS
    assert pacer.due(80, late) == (Pace.WAIT, late)
    assert pacer.due(120, late) == (Pace.WAIT, late + 40 * MS)


def test_a_jump_in_the_timestamps_is_not_waited_for() -> None:
    pacer = LivePacer(Fraction(1, 1000), behind_ns=300 * MS)
    start = 1_000_000 * MS
    pacer.due(0, start)
    assert pacer.due(3_600_000, start + 40 * MS) == (Pace.WAIT, start + 40 * MS)
