"""Pictures of every shape come to the stream's size, upright and undistorted."""

from __future__ import annotations

import asyncio
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from services.ingest.feed import Feed
from services.ingest.fit import Fitter, ShapeError, plan_fit
from services.ingest.heard import Heard
from services.ingest.links import Links
from services.ingest.reader import End, Item, Reader
from services.ingest.rmse import chunk_rmse, frame_rmse
from services.ingest.sources.file import FileSource
from services.ingest.sources.pattern import PatternSource, read_index
from services.ingest.sources.port import Picture
from services.ingest.sources.pushed import PushedSource
from shared.bus.memory import MemoryBus
from shared.bus.port import Received
from shared.contracts.commands import Fit
from shared.contracts.sources import PushedFrame
from shared.media.addresses import AddressRules
from shared.media.jpeg import JpegEncoder
from shared.media.orientation import from_matrix
from tests.support import clips

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 220, 30), (30, 30, 220), (230, 230, 230)


def read(path: Path, width: int = 96, height: int = 64, fit: Fit = Fit.CROP) -> list[np.ndarray]:
    source = FileSource(path, width, height, fit, None, False)
    frames = [item.pixels for item in source.read() if isinstance(item, Picture)]
    source.close()
    return frames


def quarters(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The colours in the middle of the four quarters: top left, top right, bottom left, bottom right."""
    height, width = pixels.shape[:2]
    return [
        tuple(int(v) for v in pixels[y, x])
        for y in (height // 4, 3 * height // 4)
        for x in (width // 4, 3 * width // 4)
    ]


def alike(found: list[tuple[int, ...]], *wanted: tuple[int, ...]) -> bool:
    return all(np.abs(np.subtract(a, b)).max() < 30 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("size", "fit", "scaled", "offset"),
    [
        ((1920, 1080), Fit.CROP, (341, 192), (-11, 0)),
        ((1920, 1080), Fit.PAD, (320, 180), (0, 6)),
        ((1080, 1920), Fit.CROP, (320, 569), (0, -189)),
        ((1080, 1920), Fit.PAD, (108, 192), (106, 0)),
        ((320, 192), Fit.CROP, (320, 192), (0, 0)),
    ],
)
def test_the_aspect_is_kept(size: tuple[int, int], fit: Fit, scaled: tuple[int, int], offset: tuple[int, int]) -> None:
    plan = plan_fit(*size, 320, 192, fit)
    assert plan.scaled == scaled
    assert abs(plan.offset[0] - offset[0]) <= 1
    assert abs(plan.offset[1] - offset[1]) <= 1


@pytest.mark.parametrize("size", [(8, 14_900), (14_900, 8), (1, 65_535)])
def test_a_picture_far_too_long_is_not_cropped_but_padded(size: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match="fit pad"):
        plan_fit(*size, 832, 480, Fit.CROP)
    frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), 90, np.uint8), format="rgb24")
    fitter = Fitter(832, 480, Fit.CROP)
    for _ in range(2):
        with pytest.raises(ShapeError):
            fitter.fit(frame, None)
    assert Fitter(832, 480, Fit.PAD).fit(frame, None).shape == (480, 832, 3)
    assert plan_fit(3840, 480, 480, 832, Fit.CROP).scaled == (6656, 832), "a panorama on a phone is cropped"


async def test_of_pushed_pictures_one_far_too_long_is_left_out() -> None:
    bus = MemoryBus()
    heard, feed = Heard("s", bus), Feed[Item](asyncio.get_running_loop(), asyncio.Event(), 8)
    links = Links("s", lambda: 1, bus, feed, AddressRules())
    source = PushedSource(96, 64, Fit.CROP, None, 0.0, links, heard)
    encoder = JpegEncoder()
    shapes = [(48, 64), (14_900, 8), (64, 48)]
    for number, shape in enumerate(shapes):
        data = encoder.encode(np.full((*shape, 3), 90, np.uint8))
        message = PushedFrame(
            stream="s", captured_ns=time.time_ns(), format="jpeg", data=data, last=number == len(shapes) - 1
        )
        await heard._on_push(Received("x", message, time.time_ns(), {}))
    pictures = await asyncio.to_thread(lambda: list(source.read()))
    assert [picture.pixels.shape for picture in pictures] == [(64, 96, 3)] * 2
    assert heard.counters["pushed_unreadable"] == 1


async def test_a_source_far_too_long_ends_with_a_line_that_names_the_fix(tmp_path: Path) -> None:
    path = clips.make_clip(tmp_path / "in.mp4", width=16, height=2048, frames=2)
    woken = asyncio.Event()
    feed = Feed[Item](asyncio.get_running_loop(), woken, 8)
    reader = Reader("s", lambda: FileSource(path, 832, 480, Fit.CROP, None, False), feed, behind_ns=None)
    reader.start()
    await asyncio.wait_for(woken.wait(), 10)
    end = feed.pop()
    await reader.stop()
    assert isinstance(end, End)
    assert end.error is not None
    assert end.error.startswith("the source cannot be shown: a picture of 16×2048 is too far")


@pytest.mark.parametrize(
    ("degrees", "wanted"),
    [
        (0, (RED, GREEN, BLUE, WHITE)),
        (90, (GREEN, WHITE, RED, BLUE)),
        (180, (WHITE, BLUE, GREEN, RED)),
        (-90, (BLUE, RED, WHITE, GREEN)),
    ],
)
def test_rotation_is_applied(tmp_path: Path, degrees: int, wanted: tuple[tuple[int, ...], ...]) -> None:
    path = clips.make_clip(tmp_path / "in.mp4", width=96, height=96, frames=2, rotation=degrees, picture=clips.corners)
    assert alike(quarters(read(path, 64, 64)[0]), *wanted)


def test_a_mirrored_matrix_is_understood() -> None:
    picture = np.arange(6).reshape(2, 3)
    one = 1 << 16
    assert from_matrix(-one, 0, 0, one).apply(picture).tolist() == [[2, 1, 0], [5, 4, 3]]
    assert from_matrix(0, one, one, 0).apply(picture).tolist() == picture.T.tolist()


def test_padding_is_black_and_even(tmp_path: Path) -> None:
    path = clips.make_clip(tmp_path / "in.mp4", width=64, height=64, frames=2, picture=clips.corners)
    pixels = read(path, 128, 64, Fit.PAD)[0]
    assert pixels[:, :30].max() == 0
    assert pixels[:, -30:].max() == 0
    assert alike(quarters(pixels[:, 32:96]), RED, GREEN, BLUE, WHITE)


def test_cropping_cuts_both_sides_evenly(tmp_path: Path) -> None:
    path = clips.make_clip(tmp_path / "in.mp4", width=128, height=64, frames=2, picture=clips.corners)
    assert alike(quarters(read(path, 64, 64)[0]), RED, GREEN, BLUE, WHITE)


def test_pixels_that_are_not_square_are_shown_as_meant(tmp_path: Path) -> None:
    path = clips.make_clip(
        tmp_path / "in.mp4", width=64, height=64, frames=2, sample_aspect=Fraction(2, 1), picture=clips.corners
    )
    pixels = read(path, 128, 64, Fit.PAD)[0]
    assert pixels.min(axis=2).max() > 100, "shown twice as wide, it fills the target"
    assert pixels[:, 2].max() > 100


ODD: dict[str, dict[str, Any]] = {
    "odd.mkv": {"width": 333, "height": 187, "pix_fmt": "yuv444p"},
    "tiny.mp4": {"width": 16, "height": 16},
    "portrait.mp4": {"width": 90, "height": 160},
    "ten-bit.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le"},
    "alpha-prores.mov": {"codec": "prores_ks", "pix_fmt": "yuva444p10le"},
    "alpha-rle.mov": {"codec": "qtrle", "pix_fmt": "argb"},
    "alpha-png.mov": {"codec": "png", "pix_fmt": "rgba"},
    "alpha.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p"},
    "grey.mov": {"codec": "png", "pix_fmt": "gray"},
    "4k.mp4": {"width": 3840, "height": 2160},
}


@pytest.mark.parametrize("name", list(ODD))
@pytest.mark.parametrize("fit", list(Fit))
def test_every_kind_of_picture_is_taken(tmp_path: Path, name: str, fit: Fit) -> None:
    path = clips.make_clip(tmp_path / name, frames=2, picture=clips.corners, **ODD[name])
    frames = read(path, 96, 64, fit)
    assert len(frames) == 2
    assert all(frame.shape == (64, 96, 3) and frame.dtype == np.uint8 and frame.flags.c_contiguous for frame in frames)
    if name != "grey.mov":
        inside = frames[0] if fit is Fit.CROP else frames[0][:, frames[0].max(axis=(0, 2)) > 60]
        assert alike(quarters(inside), RED, GREEN, BLUE, WHITE)


def test_the_pattern_tells_its_frames_apart() -> None:
    source = PatternSource(160, 96, 40, None)
    frames = [item for item in source.read() if isinstance(item, Picture)]
    assert [read_index(frame.pixels) for frame in frames] == list(range(40))
    assert frame_rmse(frames[1].pixels, frames[0].pixels) > 0.01


def test_rmse_is_that_of_pixels_between_minus_one_and_one() -> None:
    black, grey = np.zeros((64, 96, 3), np.uint8), np.full((64, 96, 3), 51, np.uint8)
    assert frame_rmse(grey, black) == pytest.approx(0.4)
    assert frame_rmse(black, grey) == pytest.approx(0.4)
    assert chunk_rmse([black, grey, grey], None, 1) == pytest.approx((0.0, 0.4, 0.0, 0.0))
    assert chunk_rmse([black], grey, 0) == pytest.approx((0.4,))


def test_rmse_of_a_large_picture_is_close_on_a_part_of_its_rows() -> None:
    random = np.random.default_rng(0)
    a, b = (random.integers(0, 256, (720, 1280, 3), dtype=np.uint8) for _ in range(2))
    exact = float(np.sqrt(np.mean((a.astype(float) - b) ** 2))) / 127.5
    assert frame_rmse(a, b) == pytest.approx(exact, rel=0.01)
