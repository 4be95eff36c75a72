"""Similarity skip: static scenes are skipped, the first thing that moves never is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.core import DropReason, Intake
from services.ingest.similar import SETTLE_CHUNKS, SimilarityFilter, tile_difference

S = 1_000_000_000
CHUNK_NS = S // 4
RANDOM = np.random.default_rng(1)
STILL = RANDOM.integers(0, 256, (96, 160, 3), dtype=np.uint8)


class Scene:
    """Feeds a filter chunk by chunk, four a second."""

    def __init__(self, threshold: float = 0.03, longest_s: float = 60.0) -> None:
        self.filter = SimilarityFilter(threshold, int(longest_s * S))
        self.now = S

    def skips(self, *frames: np.ndarray) -> bool:
        self.now += CHUNK_NS
        return self.filter.skips(frames, self.now)

    def settle(self, picture: np.ndarray = STILL) -> None:
        for _ in range(SETTLE_CHUNKS + 1):
            assert not self.skips(*[picture] * 4)


def test_off_by_default() -> None:
    scene = Scene(threshold=0.0)
    assert not any(scene.skips(*[STILL] * 4) for _ in range(50))


def test_a_still_scene_is_skipped_once_its_picture_has_settled() -> None:
    scene = Scene()
    scene.settle()
    assert all(scene.skips(*[STILL] * 4) for _ in range(100))
    assert scene.filter.skipped == 400


def test_noise_of_a_camera_is_no_movement() -> None:
    scene = Scene()
    quiet = STILL.astype(np.int16) // 2 + 60
    noisy = [np.clip(quiet + RANDOM.integers(-2, 3, quiet.shape), 0, 255).astype(np.uint8) for _ in range(4)]
    for _ in range(SETTLE_CHUNKS + 1):
        scene.skips(*noisy)
    assert all(scene.skips(*noisy) for _ in range(10))


@given(
    row=st.integers(0, 80),
    column=st.integers(0, 144),
    position=st.integers(0, 3),
    level=st.integers(40, 255),
)
def test_the_first_frame_in_which_anything_moves_is_never_skipped(
    row: int, column: int, position: int, level: int
) -> None:
    scene = Scene()
    grey = np.full((96, 160, 3), 20, np.uint8)
    scene.settle(grey)
    assert scene.skips(*[grey] * 4)
    moved = grey.copy()
    moved[row : row + 16, column : column + 16] = level  # a thousandth of a picture, or less
    frames = [grey] * 4
    frames[position] = moved
    assert not scene.skips(*frames)
    assert not scene.skips(*[grey] * 4), "what moved is followed by its settling"


def test_slow_changes_add_up_and_are_seen() -> None:
    scene = Scene()
    picture = np.full((96, 160, 3), 50, np.uint8)
    scene.settle(picture)
    sent = 0
    for level in range(51, 91):  # one level a chunk: below the threshold each
        sent += not scene.skips(*[np.full((96, 160, 3), level, np.uint8)] * 4)
    assert sent >= 8


def test_a_still_picture_is_made_anew_now_and_then_and_after_a_change() -> None:
    scene = Scene(longest_s=5.0)
    scene.settle()
    skips = [scene.skips(*[STILL] * 4) for _ in range(80)]
    assert skips.count(False) == 4, "every five seconds one chunk"
    scene.filter.refresh()
    assert [scene.skips(*[STILL] * 4) for _ in range(6)] == [False] * SETTLE_CHUNKS + [True] * 2


@pytest.mark.parametrize("shape", [(96, 160, 3), (1088, 1920, 3), (720, 1280, 3)])
def test_every_tile_counts_at_any_size(shape: tuple[int, int, int]) -> None:
    still = np.zeros(shape, np.uint8)
    for row, column in ((0, 0), (shape[0] - 16, shape[1] - 16), (shape[0] // 32 * 16, 16)):
        moved = still.copy()
        moved[row : row + 16, column : column + 16] = 51
        assert abs(tile_difference(moved, still) - 51 / 127.5) < 1e-5
    assert tile_difference(still, still) == 0.0


def test_a_held_intake_numbers_nothing_and_counts_what_it_gives_up() -> None:
    intake: Intake[int] = Intake(live=True, credits=4)
    for index in range(3):
        intake.offer(index, 1, index, index)
    intake.hold(True)
    intake.drop(DropReason.RECOVERING, 6)
    assert intake.take(0.0) is None
    intake.hold(False)
    for index in range(9, 14):
        intake.offer(index, 1, index, index)
    chunk = intake.take(0.0)
    assert chunk is not None
    assert chunk.number == 0
    assert [frame.index for frame in chunk.frames] == [9, 10, 11, 12, 13]
    assert intake.totals().dropped == {"recovering": 9}
