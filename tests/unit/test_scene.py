"""The drawn scene: it moves, has no seam, and is the same picture each time round."""

from __future__ import annotations

import numpy as np
import pytest

from services.ingest.sources.pattern import PatternSource
from services.ingest.sources.port import Picture
from services.ingest.sources.scene import KEPT_BYTES, LOOP_S, Scene


def _change(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())


@pytest.mark.parametrize(("width", "height"), [(160, 96), (96, 160), (16, 16)])
def test_it_moves_without_a_seam(width: int, height: int) -> None:
    scene = Scene(width, height, 8.0)
    assert scene.loop == LOOP_S * 8
    pictures = [scene.draw(index) for index in range(scene.loop + 1)]
    steps = [_change(one, other) for one, other in zip(pictures, pictures[1:], strict=False)]
    assert all(picture.shape == (height, width, 3) and picture.dtype == np.uint8 for picture in pictures)
    assert steps[-1] <= 1.1 * max(steps[:-1]), "the step into the next round is one like all the others"
    assert _change(pictures[0], pictures[scene.loop // 3]) > 2, "something moves"
    assert np.array_equal(pictures[0], pictures[scene.loop])


def test_a_large_one_is_not_kept() -> None:
    scene = Scene(832, 480, 30.0)
    assert scene.loop * 832 * 480 * 3 > KEPT_BYTES
    assert scene.draw(3) is not scene.draw(3)
    assert np.array_equal(scene.draw(3), scene.draw(3 + scene.loop))


def test_a_source_of_it_has_the_timestamps_of_its_rate() -> None:
    source = PatternSource(64, 48, 5, 10.0, "scene")
    pictures = [picture for picture in source.read() if isinstance(picture, Picture)]
    assert [picture.pts * source.time_base for picture in pictures] == [pytest.approx(n / 10) for n in range(5)]
    assert float(pictures[0].pixels.std()) > 30, "it is a picture, not a plane"
