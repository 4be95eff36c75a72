"""The measures of bench.quality on pictures whose answer is known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch

from bench.changes import change_prompt, shares_of
from bench.clips import FAST, MODERATE, STILL, chunks_of, motion_of, places, read_clip, whole, with_motion
from bench.long_run import ABLATIONS, LongRun, fixed_noise, minutes_of
from bench.quality import (
    ALL_CLIPS,
    PROMPTS,
    MotionFigures,
    Quality,
    StyleFigures,
    WarpError,
    measure_styles,
    parse,
    to_bytes,
    true_video,
    without_nan,
)
from bench.quality_report import report
from bench.rig import chunk_of, nearest, squared_errors
from bench.sheet import GAP, LABEL, contact_sheet, save
from bench.temporal import carries, flicker, warp_error
from shared.engine.plan.spec import spec_of
from tests.support.clips import make_clip
from training.textures import fractal


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def panning() -> torch.Tensor:
    """A cloudy texture that moves two pixels a frame: uint8 [6, 64, 96, 3]."""
    field = fractal(np.random.default_rng(1), 64, 120, 1.3)
    frames = [np.repeat(field[:, 2 * i : 2 * i + 96, None], 3, 2) for i in range(6)]
    return torch.from_numpy((np.stack(frames) * 255).astype(np.uint8))


def test_a_source_runs_to_and_fro_without_a_cut():
    assert places(5, MODERATE, 0, 10) == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1]
    assert places(9, FAST, 0, 6) == [0, 4, 8, 4, 0, 4]
    assert places(9, STILL, 7, 3) == [0, 0, 0]
    assert places(5, MODERATE, 3, 4) == places(5, MODERATE, 0, 7)[3:]
    assert [whole(n) for n in (5, 8, 9)] == [5, 5, 9]


def test_chunks_carry_each_frames_motion(panning: torch.Tensor):
    clip = with_motion(panning, MODERATE, 13)
    chunks = list(chunks_of(clip))
    assert [len(frames) for frames, _ in chunks] == [5, 4, 4]
    assert torch.equal(torch.cat([frames for frames, _ in chunks]), clip)
    rmse = [value for _, row in chunks for value in row]
    assert rmse[0] == 0.0
    expected = (clip[5].float() - clip[4].float()).div(127.5).square().mean().sqrt()
    assert rmse[5] == pytest.approx(float(expected))
    assert motion_of(None, with_motion(panning, STILL, 5)) == [0.0] * 5


@pytest.mark.parametrize(("frame", "chunk"), [(0, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_frames_chunk(frame: int, chunk: int):
    assert chunk_of(frame) == chunk


def test_what_only_moves_has_no_temporal_error_and_what_flickers_has(panning: torch.Tensor):
    steps = carries(panning)
    assert np.mean([step.trusted.mean() for step in steps]) > 0.6
    calm = warp_error(panning, steps)
    noise = torch.randn(panning.shape, generator=torch.Generator().manual_seed(0)) * 255 * 0.05
    noisy = warp_error((panning + noise).clamp(0, 255).to(torch.uint8), steps)
    assert calm < 0.02
    assert noisy == pytest.approx(0.05 * 1.2, rel=0.3)  # √2 · 0.05, a little less for the interpolation
    assert math.isnan(warp_error(panning, []))


def test_flicker_is_the_change_of_a_still_picture():
    video = torch.zeros(4, 2, 2, 3, dtype=torch.uint8)
    assert flicker(video) == 0.0
    video[1::2] = 51
    assert flicker(video) == pytest.approx(0.2)


def test_a_frames_share_of_two_styles_is_found():
    old, new = torch.rand(3, 4, 4, 3), torch.rand(3, 4, 4, 3)
    wanted = torch.tensor([0.0, 0.3, 1.0])
    made = old + wanted.view(3, 1, 1, 1) * (new - old)
    share, left = shares_of(made, old, new)
    assert torch.allclose(share, wanted, atol=1e-5)
    assert left.max() < 1e-9
    assert shares_of(made + 0.1, old, new)[1].min() > 0


def test_the_nearest_style_is_found():
    made = torch.full((2, 4, 4, 3), 200, dtype=torch.uint8)
    truths = {"dark": torch.zeros(2, 4, 4, 3), "light": torch.full((2, 4, 4, 3), 0.9)}
    assert nearest(squared_errors(made, truths)) == ["light", "light"]


def test_pictures_become_bytes():
    assert to_bytes(torch.full((1, 3, 2, 2), 0.5)).shape == (1, 2, 2, 3)
    assert int(to_bytes(torch.full((1, 3, 1, 1), 0.5))[0, 0, 0, 0]) == 128


def test_a_clip_is_covered_and_cut_evenly(tmp_path):
    path = make_clip(tmp_path / "a.mp4", frames=11, width=96, height=96)
    clip = read_clip(path, 64, 32, 0)
    assert clip.shape == (9, 32, 64, 3)
    with pytest.raises(ValueError, match="too few"):
        read_clip(make_clip(tmp_path / "b.mp4", frames=3, width=32, height=32), 32, 32, 0)


def test_the_sheet_shows_the_source_above_the_styles(tmp_path, panning: torch.Tensor):
    red = torch.zeros_like(panning)
    red[..., 0] = 255
    sheet = contact_sheet(panning, {"red": red, "dark": red * 0, "third": red}, across=2, moments=2, scale=0.5)
    assert sheet.size == (2 * (96 + GAP) + GAP, 3 * (32 + LABEL + GAP) + GAP)
    assert sheet.getpixel((GAP + 10, GAP + 32 + LABEL + GAP + LABEL + 10)) == (255, 0, 0)
    save(sheet, tmp_path / "deep" / "sheet.webp")
    assert (tmp_path / "deep" / "sheet.webp").stat().st_size > 100


def test_ablations_change_what_they_say():
    spec = spec_of("rheo-tiny")
    changed = {name: change(spec) for name, change in ABLATIONS.items()}
    assert changed["as shipped"] == spec
    assert changed["no sinks"].sinks == 0
    assert changed["fixed sinks"].sink_threshold is None
    assert changed["no refresh"].rope_refresh_at == 0
    assert not changed["keys not turned"].rerotate
    assert changed["controller off"].noise.gain == 0.0
    assert fixed_noise(spec, 0.4).noise.s0 == 0.4


def test_unknown_names_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]):
    for arguments in (["a.mp4", "--styles", "cubism"], ["a.mp4", "--only", "colour"], ["a.mp4", "--long-style", "x"]):
        with pytest.raises(SystemExit) as ended:
            parse(arguments)
        assert ended.value.code == 2
        assert "known: " in capsys.readouterr().err.splitlines()[-1]
    assert parse(["a.mp4"]).styles == tuple(PROMPTS)
    for clips in (["one/a.mp4", "two/a.webm"], ["all.mp4"]):
        with pytest.raises(SystemExit):
            parse(clips)
        assert "must differ" in capsys.readouterr().err


def test_the_report_has_a_row_for_what_was_measured():
    quality = Quality("rheo-tiny", ["cat"], 320, 192, 2, 0.5, 81)
    assert len(report(quality).splitlines()) == 1
    quality.autoencoder_db["cat"] = 27.0
    quality.styles = [StyleFigures("ink", "black ink drawing", 81, 20.0, 23.0, {"cat": 3.04}, 19.5, 0.9, "pencil")]
    quality.temporal = [WarpError("ink", 0.02, 0.02, 0.03, 0.04)]
    quality.motion = [MotionFigures(ALL_CLIPS, "ink", "controller", 21.0, 0.004)]
    quality.long = [LongRun("no sinks", "fast", 22.0, 21.0, 21.5)]
    text = report(quality)
    assert "| ink | black ink drawing | 20.0 | 23.0 | 3.0 | 3.0 | 3.5 | 90% | pencil |" in text
    assert "| ink | 0.0200 | 0.0200 | 1.00 | 0.0300 | 0.0400 | 0.50 |" in text
    assert "| all | ink | controller | 21.00 | 0.0040 |" in text
    for heading, row in pairwise(line for line in text.splitlines() if line.startswith("|")):
        if set(row) <= set("| -"):
            assert heading.count("|") == row.count("|"), heading
    assert "| no sinks | fast | 22.00 | 21.00 | 21.50 | -0.50 |" in text


class TrueRig:
    """A model that makes every style's true picture, ``off`` brighter, behind an autoencoder that is half as far off."""

    def __init__(self, off: int, always: int = 0) -> None:
        self.off, self.always, self.styles = off, always, {prompt: style for style, prompt in PROMPTS.items()}
        self.fed = 0

    def reconstruct(self, clip: torch.Tensor) -> torch.Tensor:
        return (clip.int() + self.off // 2).clamp(0, 255).to(torch.uint8)

    def restyle(
        self,
        clip: torch.Tensor,
        prompt: str,
        changes: dict[int, str] | None = None,
        blend_chunks: int = 0,
        steadied: bool = True,
    ) -> torch.Tensor:
        self.fed = len(clip)
        made = true_video(clip, self.styles[prompt]).int()
        for at, other in (changes or {}).items():
            new = true_video(clip, self.styles[other]).int()
            for frame in range(len(clip)):
                share = min(1.0, max(0, chunk_of(frame) - at + 1) / (blend_chunks + 1))
                made[frame] = torch.lerp(made[frame].float(), new[frame].float(), share).int()
        return (made + (self.always if steadied else self.off)).clamp(0, 255).to(torch.uint8)

    def steadied(self, made: torch.Tensor, clip: torch.Tensor) -> torch.Tensor:
        return (made.int() - self.off // 4).clamp(0, 255).to(torch.uint8)


def test_a_style_is_as_far_below_its_ceiling_as_its_errors_say(panning: torch.Tensor):
    grey = (panning.float() * 0.3 + 90).to(torch.uint8)  # far from black and white, where nothing can be off
    quality = Quality("rheo-tiny", ["a", "b"], 96, 64, 2, 0.5, 12)
    clips = {"a": grey[:5], "b": grey.flip(0)}
    measure_styles(quality, TrueRig(8), clips, ("none", "thermal"), None)  # pyright: ignore[reportArgumentType]
    plain = next(each for each in quality.styles if each.style == "none")
    assert quality.autoencoder_db["a"] == pytest.approx(-20 * math.log10(4 / 255), abs=0.01)
    assert plain.ceiling_db - plain.db == pytest.approx(20 * math.log10(6 / 4), abs=0.1), "shown: 6 of 255 off"
    assert plain.ceiling_db - plain.made_db == pytest.approx(20 * math.log10(8 / 4), abs=0.1), "made: 8 off"
    assert list(plain.below_by_clip) == ["a", "b"]
    assert quality.most_below_ceiling_db == pytest.approx(quality.below_ceiling_db), "no style is no style"
    assert quality.nearest == 1.0


def test_a_change_is_seen_whole_however_short_the_clip(panning: torch.Tensor):
    rig = TrueRig(0, always=5)
    styles = ("thermal", "blueprint")
    for blend in (0, 6):
        change = change_prompt(rig, panning[:5], styles, (PROMPTS[styles[0]], PROMPTS[styles[1]]), blend)  # pyright: ignore[reportArgumentType]
        assert rig.fed == 4 * (blend + 8) + 1
        assert change.shares[-1] == pytest.approx(1.0, abs=0.02), "it ends with the new style by itself"
        assert (change.chunks_until, change.broken) == ((1 if blend == 0 else 4), 0)
        assert change.largest_jump == pytest.approx(1 / (blend + 1), abs=0.02)


def test_what_was_not_measured_is_null():
    quality = Quality("rheo-tiny", ["cat"], 320, 192, 2, 0.5, 81)
    told = json.loads(json.dumps(without_nan(asdict(quality)), allow_nan=False))
    assert (told["no_style_db"], told["frames"]) == (None, 81)


def test_a_short_rest_of_a_long_run_belongs_to_the_minute_before() -> None:
    assert minutes_of(7, 3) == [0, 0, 0, 1, 1, 1, 1]
    assert minutes_of(8, 3) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert minutes_of(1, 3) == [0]
