"""``rheocast run`` on real clips: the main job, whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import av
import numpy as np
import pytest
import pytest_asyncio

from shared.contracts.events import EventKind
from tests.e2e.conftest import Rheocast
from tests.support import clips
from tests.support.lab import Lab, difference, frames_of, seconds_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_clip_with_sound_comes_out_whole(rheocast: Rheocast, tmp_path: Path) -> None:
    source = clips.make_clip(tmp_path / "in.mp4", frames=50, width=832, height=480, fps=16, audio=True)
    result = rheocast("run", source, "out.mp4", "--prompt", "a pencil drawing", "--size", "320x192", "--json")
    assert result.code == 0, result.err
    output = tmp_path / "out.mp4"
    summary = result.summary
    assert summary["frames_in"] == summary["frames_out"] == summary["on_time"] == 50
    assert (summary["late"], summary["dropped"], summary["skipped"]) == (0, 0, 0)
    assert summary["model"] == "rheo-tiny"
    assert summary["fps"] > 0
    with av.open(str(output)) as container:
        video = container.streams.video[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (video.width, video.height) == (320, 192)
        assert len(container.streams.audio) == 1
    names = clips.boxes(output)
    assert names.index("moov") < names.index("mdat"), "faststart"
    assert np.allclose(seconds_of(output), seconds_of(source), atol=1e-3)
    assert abs(clips.sound_begins(output) - clips.sound_begins(source)) < 0.040
    assert not list(tmp_path.glob("*.part*")), "the part file is gone"


def test_realtime_shows_every_frame_in_time(rheocast: Rheocast, tmp_path: Path) -> None:
    source = clips.make_clip(tmp_path / "in.mp4", frames=96, width=320, height=192, fps=16)
    result = rheocast("run", source, "out.mp4", "--prompt", "a pencil drawing", "--realtime", "--json")
    assert result.code == 0, result.err
    summary = result.summary
    assert summary["frames_in"] == 96
    assert summary["on_time"] + summary["late"] + summary["dropped"] + summary["skipped"] == 96
    assert summary["frames_out"] == summary["on_time"] + summary["late"]
    frames = frames_of(tmp_path / "out.mp4")
    assert len(frames) == summary["frames_out"]
    assert all(np.any(a != b) for a, b in zip(frames, frames[1:], strict=False)), "no picture is repeated"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """A system that is there already, for runs that need not start one."""
    base = tmp_path_factory.getbasetemp()
    async with Lab.start(tmp_path_factory.mktemp("run"), roots=(base,)) as lab:
        yield lab


@pytest.mark.asyncio(loop_scope="module")
async def test_same_seed_same_pixels_and_two_stages_give_the_same_as_one(
    lab: Lab, rheocast: Rheocast, tmp_path: Path
) -> None:
    source = clips.make_clip(tmp_path / "in.mp4", frames=21, width=176, height=112)
    for name, more in (("one", ()), ("two", ("--stages", "2"))):
        options = ("--prompt", "a neon picture", "--size", "160x96", "--json", *more)
        result = rheocast("run", source, f"{name}.mp4", *options)
        assert result.code == 0, result.err
    for name, more in (("again", {}), ("other", {"seed": 7})):
        await lab.run(source, tmp_path / f"{name}.mp4", prompt="a neon picture", **more)
    one, again, two, other = (frames_of(tmp_path / f"{name}.mp4") for name in ("one", "again", "two", "other"))
    assert difference(one, again) == 0
    assert difference(one, two) <= 1
    assert difference(one, other) > 1, "the seed must matter"


@pytest.mark.asyncio(loop_scope="module")
async def test_variable_frame_rate_is_kept_and_fps_makes_it_constant(
    lab: Lab, rheocast: Rheocast, tmp_path: Path
) -> None:
    source = clips.make_vfr_clip(tmp_path / "vfr.mp4", frames=18)
    kept = await lab.run(source, tmp_path / "kept.mp4", width=96, height=64)
    assert kept.last.event is EventKind.STOPPED, kept.last.reason
    assert np.allclose(seconds_of(tmp_path / "kept.mp4"), seconds_of(source), atol=1e-3)
    options = ("--prompt", "a pencil drawing", "--size", "96x64", "--json", "--fps", "12")
    constant = rheocast("run", source, "constant.mp4", *options)
    assert constant.code == 0, constant.err
    times = np.diff(seconds_of(tmp_path / "constant.mp4"))
    assert np.allclose(times, 1 / 12, atol=1e-3)
