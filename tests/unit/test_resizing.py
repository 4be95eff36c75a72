"""A stream that changes its size: what is refused, what ingest fits and drops, what outputs of another size get."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from pydantic import ValidationError

from services.egress.fitted import fitted
from services.ingest.core import DropReason, Intake
from services.ingest.fit import Fitter
from services.ingest.sizing import Sizing
from services.ingest.sources.pattern import PatternSource
from services.scheduler.messenger import RefusedError
from services.scheduler.records import StreamRecord
from services.scheduler.resizing import check_size
from shared.contracts import commands
from shared.contracts.commands import Fit, Mode, NoSource, Source, StreamPatch, StreamSpec, TakeStream


def take(width: int, height: int, source: Source | None = None) -> TakeStream:
    spec = StreamSpec(source=source or commands.PatternSource(), prompt="ink")
    return TakeStream(instance="i", stream="a", epoch=1, spec=spec, width=width, height=height, noise=0.5, credits=2)


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"width": 96}, "give both"),
        ({"width": 96, "height": 64, "steps": 2}, "come alone"),
        ({"width": 96, "height": 64, "paused": True}, "come alone"),
        ({"width": 100, "height": 64}, "multiple of 16"),
        ({"width": 96, "height": 4096}, "less than or equal to 2048"),
    ],
)
def test_a_size_is_given_whole_and_alone(patch: dict[str, int], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        StreamPatch.model_validate(patch)
    assert StreamPatch(width=96, height=64).width == 96


def test_who_may_lose_nothing_or_stands_still_keeps_its_size() -> None:
    spec = StreamSpec(source=commands.PatternSource(), prompt="ink", mode=Mode.LIVE)
    live = StreamRecord("a", 1, spec, 160, 96, 0.5)
    check_size(live, 96, 64)
    live.paused = True
    with pytest.raises(RefusedError, match="resume it"):
        check_size(live, 96, 64)
    lossless = StreamRecord("b", 1, spec.model_copy(update={"mode": Mode.LOSSLESS}), 160, 96, 0.5)
    with pytest.raises(RefusedError, match="start another"):
        check_size(lossless, 96, 64)


def test_a_source_fits_to_the_new_size_from_its_next_picture_on() -> None:
    source = PatternSource(160, 96, 0, 10)
    sizing, pictures = Sizing(take(160, 96)), source.read()
    before = next(pictures)
    assert not sizing.adopt(take(160, 96), source)
    assert sizing.adopt(take(96, 64), source)
    after = next(pictures)
    assert after.pts > before.pts  # type: ignore[union-attr]
    assert not sizing.fits(before.pixels)  # type: ignore[union-attr]
    assert sizing.fits(after.pixels)  # type: ignore[union-attr]
    assert Sizing(take(160, 96, NoSource())).fits(np.empty((0, 0, 3), np.uint8)), "there are no pixels to fit"


def test_a_fitter_takes_another_target_in_the_middle_of_a_source() -> None:
    fitter = Fitter(64, 64, Fit.PAD)
    frame = av.VideoFrame.from_ndarray(np.full((90, 160, 3), 200, np.uint8), format="rgb24")
    frame.time_base = Fraction(1, 10)
    assert fitter.fit(frame, None).shape == (64, 64, 3)
    fitter.resize(96, 32)
    assert fitter.fit(frame, None).shape == (32, 96, 3)


def test_what_comes_meanwhile_is_counted_as_resized() -> None:
    intake: Intake[int] = Intake(live=True, credits=2)
    for n in range(3):
        intake.offer(n, 1, n, n)
    intake.hold(True, DropReason.RESIZED)
    intake.drop(intake.held_for)
    assert intake.totals().dropped == {"resized": 4}
    intake.hold(False)
    assert intake.held_for is DropReason.RECOVERING


def test_another_size_is_fitted_into_the_one_of_the_opening() -> None:
    wide = np.full((48, 96, 3), 200, np.uint8)
    assert fitted(wide, 96, 48) is wide
    high = fitted(wide, 64, 64)
    assert high.shape == (64, 64, 3)
    assert high[:16].max() == high[48:].max() == 0, "bars above and below"
    assert abs(int(high[32, 32, 0]) - 200) < 4
    assert fitted(wide, 192, 96).min() > 190, "the same shape fills it"
