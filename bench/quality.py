"""How good the embedded model's pictures are, in the served setting: streamed, rolling KV cache, default noise.

``python -m bench.quality CLIP… --json`` measures on the clips given:

* styles: the autoencoder alone; per style its *ceiling* (the true filter's picture, encoded and decoded), the model's PSNR to
  the true filter, and the share of frames that lie nearest to their own style among all true styles;
* temporal: what changes along the source's optical flow, beside the true filter's, unsteadied and per-frame processing;
* motion: the noise controller beside fixed noise, on fast motion (PSNR) and on a still picture (flicker);
* prompts: a change in mid-stream, and a blend;
* speed: frames a second of the engine with 1 and 2 steps;
* long: ``--long`` simulated minutes with a table of ablations, at ``--long-size``.

``--only`` picks some of them. ``--sheet FILE`` writes a contact sheet of the first clip (PNG, JPEG or WebP by its suffix),
``--png FOLDER`` a comparison per clip: rows are styles, columns source, true filter, model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from bench.changes import PromptChange, change_prompt
from bench.clips import FAST, STILL, read_clip, with_motion
from bench.long_run import ABLATIONS, Long, LongRun, fixed_noise, long_run, squared_error
from bench.quality_report import report
from bench.rig import Rig, decibels, nearest, squared_errors
from bench.sheet import comparison, contact_sheet, save
from bench.temporal import carries, flicker, warp_error
from shared.engine.plan.registry import EMBEDDED_MODEL, model_folder
from shared.engine.plan.spec import ModelSpec
from training.filters import NO_STYLE, stylise
from training.prompts import all_styles

PARTS = ("styles", "temporal", "motion", "prompts", "speed", "long")
PROMPTS = {
    NO_STYLE: "no style",
    "pencil": "a pencil drawing",
    "ink": "black ink drawing",
    "blueprint": "a technical blueprint",
    "neon": "neon lights, glowing lines",
    "thermal": "thermal camera",
    "sepia": "an old sepia photograph",
    "night vision": "night vision goggles",
    "comic": "a comic book",
    "watercolour": "a soft watercolour painting",
    "vaporwave": "vaporwave, pink and teal",
    "x-ray": "an x-ray picture",
    "pixel art": "8-bit pixel art",
    "pop art": "a pop art poster",
    "aurora": "aurora borealis",
    "stained glass": "a stained glass window",
}
TEMPORAL_STYLES = ("pencil", "comic", "watercolour", "thermal")
MOTION_STYLES = (NO_STYLE, "pencil", "thermal")
ALL_CLIPS = "all"
CHANGES = (("thermal", "blueprint"), ("watercolour", "vaporwave"))


@dataclass(frozen=True)
class StyleFigures:
    """One style: dB to its true filter and the ceiling's (the autoencoder alone, not steadied), every clip counting the same;
    how far below that clip by clip; dB as made, not steadied; the share of frames nearest to it, and the usual mistake.
    """

    style: str
    prompt: str
    frames: int
    db: float
    ceiling_db: float
    below_by_clip: dict[str, float]
    made_db: float
    nearest: float
    mistaken_for: str


@dataclass(frozen=True)
class WarpError:
    """Temporal error of one style over all clips: as shown, the true filter's, as made (not steadied), and of per-frame
    processing by the same model (no KV cache, not steadied).
    """

    style: str
    shown: float
    true_filter: float
    made: float
    per_frame: float


@dataclass(frozen=True)
class MotionFigures:
    """One style under one setting of the noise, on one clip or on all: dB four times as fast, flicker on a still picture."""

    clip: str
    style: str
    noise: str
    fast_db: float
    still_flicker: float


@dataclass
class Quality:
    """Everything measured, with the setting it was measured in. Parts not asked for are empty."""

    model: str
    clips: list[str]
    width: int
    height: int
    steps: int
    s0: float
    frames: int
    autoencoder_db: dict[str, float] = field(default_factory=dict)
    no_style_db: float = math.nan
    below_ceiling_db: float = math.nan
    most_below_ceiling_db: float = math.nan
    made_below_ceiling_db: float = math.nan
    made_most_below_ceiling_db: float = math.nan
    nearest: float = math.nan
    styles: list[StyleFigures] = field(default_factory=list)
    temporal: list[WarpError] = field(default_factory=list)
    motion: list[MotionFigures] = field(default_factory=list)
    prompts: list[PromptChange] = field(default_factory=list)
    fps: dict[str, float] = field(default_factory=dict)
    long_minutes: float = 0.0
    long_style: str = ""
    long: list[LongRun] = field(default_factory=list)
    seconds: float = 0.0


def to_bytes(picture: Tensor) -> Tensor:
    """[n, 3, H, W] in [0, 1] → uint8 [n, H, W, 3]."""
    return (picture * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def true_video(clip: Tensor, style: str) -> Tensor:
    """The true filter's clip, uint8 like the source."""
    return to_bytes(stylise(style, clip.permute(0, 3, 1, 2).float() / 255))


def measure_styles(quality: Quality, rig: Rig, clips: dict[str, Tensor], styles: tuple[str, ...], pngs: Path | None):
    """Fills in the autoencoder and every style."""
    shown, made, most = ({style: dict[str, float]() for style in styles} for _ in range(3))
    found: dict[str, list[str]] = {style: [] for style in styles}
    for name, clip in clips.items():
        truths = {style: true_video(clip, style).float() / 255 for style in all_styles()}
        plain = squared_errors(rig.reconstruct(clip), {NO_STYLE: truths[NO_STYLE]})[NO_STYLE]
        quality.autoencoder_db[name] = decibels(float(plain.mean()))
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        for style in styles:
            true, own = (truths[style] * 255).to(torch.uint8), {style: truths[style]}
            raw = rig.restyle(clip, PROMPTS[style], steadied=False)
            steadied = rig.steadied(raw, clip)
            errors = squared_errors(steadied, truths)
            shown[style][name] = float(errors[style].mean())
            made[style][name] = float(squared_errors(raw, own)[style].mean())
            most[style][name] = float(squared_errors(rig.reconstruct(true), own)[style].mean())
            found[style] += nearest(errors)
            rows[style] = (true[len(clip) // 2], steadied[len(clip) // 2])
        if pngs is not None:
            save(comparison(clip[len(clip) // 2], rows), pngs / f"{name}.png")

    def over_clips(errors: dict[str, float]) -> float:
        return decibels(sum(errors.values()) / len(errors))

    for style in styles:
        wrong = [each for each in found[style] if each != style]
        own, ceilings = shown[style], most[style]
        quality.styles.append(
            StyleFigures(
                style=style,
                prompt=PROMPTS[style],
                frames=len(found[style]),
                db=over_clips(own),
                ceiling_db=over_clips(ceilings),
                below_by_clip={name: decibels(ceilings[name]) - decibels(own[name]) for name in clips},
                made_db=over_clips(made[style]),
                nearest=1 - len(wrong) / len(found[style]),
                mistaken_for=max(set(wrong), key=wrong.count) if wrong else "",
            )
        )
    styled = [each for each in quality.styles if each.style != NO_STYLE]
    quality.no_style_db = next((each.db for each in quality.styles if each.style == NO_STYLE), math.nan)
    if styled:
        below, raw_below = ([s.ceiling_db - s.db for s in styled], [s.ceiling_db - s.made_db for s in styled])
        quality.below_ceiling_db, quality.most_below_ceiling_db = sum(below) / len(below), max(below)
        quality.made_below_ceiling_db = sum(raw_below) / len(raw_below)
        quality.made_most_below_ceiling_db = max(raw_below)
    quality.nearest = sum(each.nearest for each in quality.styles) / len(quality.styles)


def measure_temporal(rig: Rig, clips: dict[str, Tensor], styles: tuple[str, ...]) -> list[WarpError]:
    """Warp errors, averaged over the clips."""
    rows: list[WarpError] = []
    steps = {name: carries(clip) for name, clip in clips.items()}
    for style in styles:
        sums = [0.0] * 4
        for name, clip in clips.items():
            made = rig.restyle(clip, PROMPTS[style], steadied=False)
            videos = (
                rig.steadied(made, clip),
                true_video(clip, style),
                made,
                rig.restyle_alone(clip, PROMPTS[style]),
            )
            sums = [total + warp_error(video, steps[name]) for total, video in zip(sums, videos, strict=True)]
        rows.append(WarpError(style, *(total / len(clips) for total in sums)))
    return rows


def measure_motion(
    spec: ModelSpec, folder: Path, clips: dict[str, Tensor], styles: tuple[str, ...], steps: int, seed: int
) -> list[MotionFigures]:
    """The controller beside a fixed noise scale: that of a still picture, and that of full motion.

    Over all clips together and, if there are several, clip by clip.
    """
    least = spec.noise.s0 - spec.noise.gain
    settings = {
        "controller": spec,
        f"fixed {spec.noise.s0:.2f}": fixed_noise(spec),
        f"fixed {least:.2f}": fixed_noise(spec, least),
    }
    found: dict[tuple[str, str, str], tuple[float, float]] = {}
    for name, setting in settings.items():
        rig = Rig(setting, folder, steps, seed)
        for clip, frames in clips.items():
            fast, still = with_motion(frames, FAST, len(frames)), with_motion(frames, STILL, len(frames))
            for style in styles:
                error = squared_error(rig.restyle(fast, PROMPTS[style]), fast, style)
                # The first chunks of a still picture settle; what a viewer sees all the time is the rest.
                calm = flicker(rig.restyle(still, PROMPTS[style])[len(still) // 3 :])
                found[clip, style, name] = (error, calm)
    groups = {ALL_CLIPS: tuple(clips)} | ({clip: (clip,) for clip in clips} if len(clips) > 1 else {})
    rows: list[MotionFigures] = []
    for group, members in groups.items():
        for style in styles:
            for name in settings:
                pairs = [found[clip, style, name] for clip in members]
                error, calm = (sum(each) / len(pairs) for each in zip(*pairs, strict=True))
                rows.append(MotionFigures(group, style, name, decibels(error), calm))
    return rows


def measure_speed(spec: ModelSpec, folder: Path, clip: Tensor) -> dict[str, float]:
    """Frames a second of encode, denoise and decode, by steps and threads; the faster of two runs."""
    before = torch.get_num_threads()
    result: dict[str, float] = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for steps in (1, 2):
            rig = Rig(spec, folder, steps, 0)
            rig.restyle(clip[:13], PROMPTS["thermal"], steadied=False)
            took: list[float] = []
            for _ in range(2):
                began = time.monotonic()
                rig.restyle(clip, PROMPTS["thermal"], steadied=False)
                took.append(time.monotonic() - began)
            result[f"{steps} steps, {threads} threads"] = len(clip) / min(took)
    torch.set_num_threads(before)
    return result


def without_nan(value: Any) -> Any:
    """The same with None for what was not measured: NaN is no JSON."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [without_nan(each) for each in cast("list[Any]", value)]
    return None if isinstance(value, float) and math.isnan(value) else value


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; ends the process with a one-line error for what will not do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="+", type=Path, metavar="CLIP")
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--models-dir", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--s0", type=float, default=None, help="noise scale of a still picture; default: the model's")
    parser.add_argument("--styles", default="", help="comma-separated; default: all")
    parser.add_argument("--only", default="", help=f"comma-separated parts of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seconds", type=float, default=0, help="of each clip; default: all of it")
    parser.add_argument("--long", type=float, default=30, metavar="MINUTES", help="simulated minutes of the long run")
    parser.add_argument("--long-size", default="160x96", help="its size in pixels (a whole one takes hours)")
    parser.add_argument("--long-fps", type=int, default=16, help="its frames a second")
    parser.add_argument("--long-style", default="pencil")
    parser.add_argument("--long-only", default="", help=f"comma-separated ablations of: {', '.join(ABLATIONS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--sheet", type=Path, default=None, metavar="FILE")
    parser.add_argument("--png", type=Path, default=None, metavar="FOLDER")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    for name, known in (("only", PARTS), ("styles", PROMPTS), ("long_only", ABLATIONS)):
        asked = tuple(part.strip() for part in getattr(args, name).split(",") if part.strip())
        if unknown := [part for part in asked if part not in known]:
            parser.error(f"--{name.replace('_', '-')}: no such {', '.join(unknown)}; known: {', '.join(known)}")
        setattr(args, name, asked or tuple(known))
    stems = [path.stem for path in args.clips]
    if len({*stems, ALL_CLIPS}) <= len(stems):
        parser.error(f"clips are told apart by their names without suffix, which must differ, and not be {ALL_CLIPS!r}")
    if args.long_style not in PROMPTS:
        parser.error(f"--long-style: no such {args.long_style}; known: {', '.join(PROMPTS)}")
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    began = time.monotonic()
    torch.set_num_threads(args.threads)
    folder = model_folder(args.model, args.models_dir)
    spec = ModelSpec.from_json(folder / "spec.json")
    if args.s0 is not None:
        spec = replace(spec, noise=replace(spec.noise, s0=args.s0))
    width, height = spec.default_width, spec.default_height
    clips = {path.stem: read_clip(path, width, height, args.seconds) for path in args.clips}
    first = next(iter(clips.values()))
    frames = sum(len(clip) for clip in clips.values())
    quality = Quality(spec.name, list(clips), width, height, args.steps, spec.noise.s0, frames)
    rig = Rig(spec, folder, args.steps, args.seed)

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if "styles" in args.only:
        tell("styles")
        measure_styles(quality, rig, clips, args.styles, args.png)
    if "temporal" in args.only:
        tell("temporal")
        quality.temporal = measure_temporal(rig, clips, tuple(s for s in TEMPORAL_STYLES if s in args.styles))
    if "motion" in args.only:
        tell("motion")
        quality.motion = measure_motion(
            spec, folder, clips, tuple(s for s in MOTION_STYLES if s in args.styles), args.steps, args.seed
        )
    if "prompts" in args.only:
        tell("prompts")
        for change, blend in ((change, blend) for change in CHANGES for blend in (0, 6)):
            asked = (PROMPTS[change[0]], PROMPTS[change[1]])
            quality.prompts.append(change_prompt(rig, first, change, asked, blend))
    if "speed" in args.only:
        tell("speed")
        quality.fps = measure_speed(spec, folder, first)
    if "long" in args.only and args.long:
        size = tuple(int(side) for side in args.long_size.split("x"))
        small = read_clip(args.clips[0], size[0], size[1], args.seconds)
        quality.long_minutes, quality.long_style = args.long, args.long_style
        chosen = {name: ABLATIONS[name] for name in args.long_only}
        asked = PROMPTS[args.long_style]
        long = Long(asked, args.long_style, args.long, args.long_fps, args.steps, args.seed)
        quality.long = long_run(spec, folder, small, long, chosen, tell)
    if args.sheet is not None:
        made = {style: rig.restyle(first, PROMPTS[style]) for style in args.styles if style != NO_STYLE}
        save(contact_sheet(first, made, across=3, moments=2, scale=0.5), args.sheet)
    quality.seconds = time.monotonic() - began
    print(json.dumps(without_nan(asdict(quality))) if args.json else report(quality))


if __name__ == "__main__":
    main()
