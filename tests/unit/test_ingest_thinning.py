"""A lower rate leaves frames out evenly; the newest version of what was told holds."""

from __future__ import annotations

from fractions import Fraction

import pytest

from services.ingest.thinning import Thinner

BASE = Fraction(1, 90_000)


def kept(thinner: Thinner, source_fps: float, frames: int, first: int = 0) -> list[int]:
    return [n for n in range(frames) if thinner.keeps(first + round(n * 90_000 / source_fps), BASE)]


@pytest.mark.parametrize(("fps", "rate"), [(6.0, 0.75), (4.0, 0.5), (8.0, 1.0), (12.0, 1.0)])
def test_the_share_that_is_kept_and_its_evenness(fps: float, rate: float) -> None:
    thinner = Thinner()
    thinner.pace(1, fps)
    numbers = kept(thinner, 8.0, 80, first=1234)
    assert len(numbers) == pytest.approx(80 * rate, abs=1)
    gaps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_without_a_rate_everything_is_kept_and_old_words_do_not_count() -> None:
    thinner = Thinner()
    assert kept(thinner, 30.0, 10) == list(range(10))
    assert thinner.pace(2, 4.0)
    assert not thinner.pace(1, 0.0)
    assert not thinner.pace(2, 8.0)
    assert thinner.fps == 4.0
    assert thinner.pace(3, 0.0)
    assert kept(thinner, 30.0, 10) == list(range(10))
