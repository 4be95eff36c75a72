"""Steadying: a picture that only moves does not flicker, and whatever is new is shown as it is."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from services.ingest.movement import Movement
from shared.media.flow import Flow, FlowError, FlowFinder, cells_of
from shared.media.steadying import Place, Steadier

HEIGHT, WIDTH = 96, 160
STEP = 3  # pixels that the source moves from frame to frame


def texture(seed: int, width: int = WIDTH) -> np.ndarray:
    """A soft random picture, float32 [H, width, 3]."""
    noise = np.random.default_rng(seed).uniform(0, 255, (HEIGHT, width, 3)).astype(np.float32)
    soft = cv2.GaussianBlur(noise, (0, 0), 3.0)
    return np.clip((soft - 127) * 4 + 127, 0, 255)


def moving(frames: int, seed: int = 0) -> list[np.ndarray]:
    """A picture that moves to the left, uint8 [H, W, 3] each."""
    wide = texture(seed, WIDTH + STEP * frames)
    return [wide[:, STEP * i : STEP * i + WIDTH].astype(np.uint8) for i in range(frames)]


def flickering(frames: list[np.ndarray], strength: float = 12.0) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [
        np.clip(cv2.GaussianBlur(rng.normal(0, 2 * strength, frame.shape), (0, 0), 1.0) + frame, 0, 255).astype(
            np.uint8
        )
        for frame in frames
    ]


def shown(made: list[np.ndarray], source: list[np.ndarray], strength: float = 0.5) -> list[np.ndarray]:
    """One chunk of frames through the filter."""
    flow, steadier = FlowFinder().chunk(source), Steadier(strength)
    return [steadier.frame(f, flow, Place(0, i, i == len(made) - 1)) for i, f in enumerate(made)]


def error(a: np.ndarray, b: np.ndarray) -> float:
    """Mean square away from the borders, where nothing can have come from."""
    inner = (slice(16, -16), slice(16, -16))
    return float(np.square(a[inner].astype(np.float32) - b[inner]).mean())


# --- flow ------------------------------------------------------------------------------------------------------------


def test_a_flow_says_where_each_cell_was() -> None:
    flow = FlowFinder().chunk(moving(4))
    assert flow.vectors.shape == (4, *cells_of(HEIGHT, WIDTH), 2)
    inner = flow.vectors[1:, 2:-2, 2:-2] / 4
    assert np.abs(inner[..., 0] - STEP).mean() < 0.3
    assert np.abs(inner[..., 1]).mean() < 0.3
    assert flow.change[1:, 2:-2, 2:-2].mean() < 6
    assert (flow.change[0] == 255).all(), "the first frame follows nothing"


def test_a_cut_is_seen_as_one_and_chunks_go_on_from_one_another() -> None:
    finder, clip = FlowFinder(), moving(4)
    finder.chunk(clip[:2])
    assert finder.chunk(clip[2:]).change[0, 2:-2, 2:-2].mean() < 6, "it goes on from the chunk before"
    assert finder.chunk(moving(1, seed=9)).change[0].mean() > 12
    assert (finder.chunk([np.zeros((64, 64, 3), np.uint8)]).change == 255).all(), "another size follows nothing"


def test_padding_has_cells_and_a_size_need_not_divide() -> None:
    flow = FlowFinder().chunk([np.zeros((50, 90, 3), np.uint8)] * 2, padding=2)
    assert flow.vectors.shape == (4, 7, 12, 2)
    assert Flow.from_bytes(flow.to_bytes(), 4, 50, 90).change.shape == (4, 7, 12)


def test_bytes_come_back_as_they_were_or_are_refused() -> None:
    flow = FlowFinder().chunk(moving(3))
    back = Flow.from_bytes(flow.to_bytes(), 3, HEIGHT, WIDTH)
    assert np.array_equal(back.vectors, flow.vectors)
    assert np.array_equal(back.change, flow.change)
    with pytest.raises(FlowError, match="4 frames of 160×96"):
        Flow.from_bytes(flow.to_bytes(), 4, HEIGHT, WIDTH)


@pytest.mark.parametrize("size", [(16, 160), (16, 640), (32, 16), (2048, 32)])
def test_sizes_that_are_too_small_to_search_follow_nothing(size: tuple[int, int]) -> None:
    frames = [np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8) for i in range(3)]
    flow = FlowFinder().chunk(frames)
    assert flow.vectors.shape == (3, *cells_of(*size), 2)
    assert (flow.change[1] == 255).all() == (min(size) < 32)


def test_a_large_picture_is_searched_at_a_fraction_of_its_size() -> None:
    wide = cv2.resize(texture(2, 320), (1290, 720))
    flow = FlowFinder().chunk([wide[:, 8 * i : 8 * i + 1280].astype(np.uint8) for i in range(2)])
    assert np.abs(flow.vectors[1, 4:-4, 4:-4, 0] / 4 - 8).mean() < 0.5
    assert flow.change[1, 4:-4, 4:-4].mean() < 6


def test_what_a_vector_cannot_say_is_not_trusted() -> None:
    wide = cv2.resize(texture(3, 400), (1600, 384))
    flow = FlowFinder().chunk([wide[:, 60 * i : 60 * i + 640].astype(np.uint8) for i in range(2)])
    far = np.abs(flow.vectors[1, ..., 0]) >= 127
    assert far.mean() > 0.1
    assert np.median(flow.change[1][far]) > 12, "it came from farther away than it says"


async def test_a_source_that_changes_its_size_goes_on() -> None:
    movement = Movement(with_flow=True)
    for height, width in ((96, 160), (64, 96), (16, 160)):
        frames = [np.full((height, width, 3), 9 * i, np.uint8) for i in range(4)]
        rmse, flow = await movement.of(frames, 0, False)
        assert rmse[0] == 0
        assert len(Flow.from_bytes(flow, 4, height, width).change) == 4
    assert (await movement.of(frames, 0, True))[1] == b"", "a skipped chunk needs none"
    assert (await Movement(with_flow=False).of(frames, 1, False))[1] == b""


# --- steadying -------------------------------------------------------------------------------------------------------


def test_what_flickers_on_a_moving_picture_is_averaged_out() -> None:
    true = moving(12)
    made = flickering(true)
    out = shown(made, true)
    before, after = (sum(error(f, t) for f, t in zip(each[4:], true[4:], strict=True)) for each in (made, out))
    assert after < 0.6 * before, "nearer to the truth"
    steps = [sum(error(b[:, :-STEP], a[:, STEP:]) for a, b in zip(c[4:], c[5:], strict=False)) for c in (made, out)]
    assert steps[1] < 0.4 * steps[0], "and less change along the motion"


def test_a_still_picture_keeps_its_detail() -> None:
    true = [moving(1)[0]] * 10
    out = shown(flickering(true), true)
    assert error(out[-1], true[-1]) < 0.6 * error(flickering(true)[-1], true[-1])
    assert error(shown(true, true)[-1], true[-1]) < 0.3, "what does not flicker is not touched"


def test_a_cut_of_the_source_is_not_mixed_with_what_was_before() -> None:
    before, after = moving(3), moving(3, seed=5)
    out = shown(before + after, before + after)
    assert error(out[3], after[0]) < 0.1 * error(before[-1], after[0])


def test_a_new_style_is_there_at_once() -> None:
    source = moving(6)
    made = source[:3] + [255 - frame for frame in source[3:]]
    out = shown(made, source)
    changed = error(made[2], made[3])
    assert error(out[3], made[3]) < 0.1 * changed


def test_a_grid_that_stands_still_is_not_carried_along() -> None:
    source = moving(12)
    grid = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    grid[::8], grid[:, ::8] = 255, 255
    made = [np.where(grid > 0, grid, cv2.resize(cv2.resize(f, (20, 12)), (WIDTH, HEIGHT))) for f in source]
    out = shown(made, source)
    assert np.array_equal(out[-1], made[-1]), "its lines do not move with the source"


def test_a_frame_whose_predecessor_was_not_shown_comes_out_as_it_went_in() -> None:
    true = moving(8)
    made, finder, steadier = flickering(true), FlowFinder(), Steadier(0.5)
    first, second = finder.chunk(true[:4]), finder.chunk(true[4:])
    for i in range(3):  # the last frame of the chunk is dropped
        steadier.frame(made[i], first, Place(0, i, False))
    assert steadier.frame(made[4], second, Place(1, 0, False)) is made[4]
    assert steadier.frame(made[5], second, Place(1, 1, False)) is not made[5]
    assert steadier.frame(made[7], second, Place(1, 3, True)) is made[7], "one was left out"
    assert steadier.frame(made[0], None, Place(2, 0, False)) is made[0], "nobody told how the source moves"
    assert steadier.frame(made[0][:64], first, Place(2, 1, False)).shape == (64, WIDTH, 3), "another size"


def test_after_a_long_time_without_movement_it_still_steadies() -> None:
    true = moving(4)
    still = Flow(np.zeros((1, *cells_of(HEIGHT, WIDTH), 2), np.int8), np.zeros((1, *cells_of(HEIGHT, WIDTH)), np.uint8))
    steadier, chunk = Steadier(0.5), FlowFinder().chunk(true)
    for i, frame in enumerate(flickering(true)):
        steadier.frame(frame, chunk, Place(0, i, i == 3))
    assert 0 < steadier.moves <= 1
    small = [f[:32, :32] for f in flickering([true[0]] * 2)]
    still = Flow(still.vectors[:, :4, :4], still.change[:, :4, :4])
    for i in range(8000):
        steadier.frame(small[i % 2], still, Place(1 + i, 0, True))
    assert steadier.moves == 1.0


def test_places_follow_one_another() -> None:
    assert Place(0, 1, False).follows(Place(0, 0, False))
    assert Place(1, 0, False).follows(Place(0, 4, True))
    assert not Place(1, 0, False).follows(Place(0, 3, False))
    assert not Place(2, 0, False).follows(Place(0, 4, True))
    assert not Place(0, 0, False).follows(None)


def test_a_strength_of_nothing_changes_nothing_and_one_of_all_is_refused() -> None:
    true = moving(3)
    made = flickering(true)
    assert all(a is b for a, b in zip(shown(made, true, strength=0.0), made, strict=True))
    with pytest.raises(ValueError, match="up to, not including"):
        Steadier(1.0)
