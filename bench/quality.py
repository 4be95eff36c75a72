"""How good the embedded model's pictures are, in the served setting: streamed, rolling KV cache, default noise.

``python -m bench.quality CLIP… --json`` measures, per clip and over all of them:

* autoencoder dB: the clip encoded and decoded in a stream, without the DiT;
* per style, dB to the true filter's picture, and the share of frames that lie nearest to their own style's true picture
  among the true pictures of *all* styles (``nearest``);
* "no style" dB: the clip through the whole model under that prompt, against the clip.

``--png FOLDER`` also writes a sheet per clip: rows are styles, columns source, true filter, model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from shared.engine.model.autoencoder import Autoencoder
from shared.engine.model.loading import load_text_encoder, load_vae
from shared.engine.plan.registry import EMBEDDED_MODEL, model_folder
from shared.engine.plan.spec import FRAMES_PER_LATENT, ModelSpec
from shared.engine.stage import Stage
from shared.engine.stepper import Stepper
from training.filters import NO_STYLE, stylise
from training.prompts import all_styles

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


@dataclass(frozen=True)
class StyleFigures:
    """One style's result over all clips: frames, dB to its true filter, share of frames nearest to it, the usual mistake."""

    style: str
    prompt: str
    frames: int
    db: float
    nearest: float
    mistaken_for: str


@dataclass(frozen=True)
class Quality:
    """Everything measured, with the setting it was measured in."""

    model: str
    clips: list[str]
    width: int
    height: int
    steps: int
    s0: float
    frames: int
    autoencoder_db: float
    no_style_db: float
    nearest: float
    least_nearest: float
    styles: list[StyleFigures]
    seconds: float


def read_clip(path: Path, width: int, height: int, seconds: float) -> Tensor:
    """The clip's frames at this size, uint8 [n, H, W, 3], n = 4k + 1 as a stream's chunks need it."""
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        for frame in container.decode(stream):
            if seconds and len(frames) >= seconds * rate:
                break
            frames.append(frame.reformat(width, height, "rgb24", interpolation="AREA").to_ndarray())
    keep = (len(frames) - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1
    if keep < FRAMES_PER_LATENT + 1:
        raise ValueError(f"{path}: {len(frames)} frames are too few, a stream starts with {FRAMES_PER_LATENT + 1}")
    return torch.from_numpy(np.stack(frames[:keep]))


def chunks_of(clip: Tensor) -> Iterator[tuple[Tensor, list[float]]]:
    """A stream's chunks with each frame's RMSE to the one before (pixels in [−1, 1]), as ingest measures it."""
    step = (clip[1:].float() - clip[:-1].float()).div(127.5).square().mean((1, 2, 3)).sqrt().tolist()
    rmse = [0.0, *step]
    first = FRAMES_PER_LATENT + 1
    yield clip[:first], rmse[:first]
    for at in range(first, len(clip), FRAMES_PER_LATENT):
        yield clip[at : at + FRAMES_PER_LATENT], rmse[at : at + FRAMES_PER_LATENT]


class Rig:
    """The model, ready to run clips."""

    def __init__(self, spec: ModelSpec, folder: Path, steps: int, seed: int) -> None:
        self.spec, self.steps, self.seed = spec, steps, seed
        self.autoencoder = Autoencoder(load_vae(spec, folder), spec, torch.device("cpu"), torch.float32)
        self.text = load_text_encoder(spec, folder)
        self.stepper = Stepper(spec, [Stage.load(spec, folder)], self.autoencoder)

    def reconstruct(self, clip: Tensor) -> Tensor:
        """Encoded and decoded in a stream, without the DiT: uint8 like the clip."""
        encoder, decoder = self.autoencoder.encoder_state(), self.autoencoder.decoder_state()
        parts = [self.autoencoder.decode(decoder, self.autoencoder.encode(encoder, c)) for c, _ in chunks_of(clip)]
        return torch.cat(parts)

    def restyle(self, clip: Tensor, prompt: str) -> Tensor:
        """The clip as a viewer would get it: uint8 like the clip."""
        height, width = clip.shape[1:3]
        self.stepper.open("clip", width, height, self.text.encode(prompt), steps=self.steps, seed=self.seed)
        parts: list[Tensor] = []
        for pixels, rmse in chunks_of(clip):
            parts += self.stepper.tick({"clip": pixels}, {"clip": rmse}).values()
        while sum(len(part) for part in parts) < len(clip):
            parts += self.stepper.tick({}).values()
        self.stepper.close("clip")
        return torch.cat(parts)


def squared_errors(made: Tensor, truths: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean squared error of every frame to every style's true frame, colours in [0, 1]."""
    picture = made.float() / 255
    return {style: (picture - truth).square().mean((1, 2, 3)) for style, truth in truths.items()}


def decibels(error: float) -> float:
    """PSNR of a mean squared error of colours in [0, 1]."""
    return -10 * math.log10(max(error, 1e-10))


def measure(rig: Rig, clips: dict[str, Tensor], styles: tuple[str, ...], sheets: Path | None) -> Quality:
    """All figures over all clips."""
    began = time.monotonic()
    own: dict[str, list[Tensor]] = {style: [] for style in styles}
    found: dict[str, list[str]] = {style: [] for style in styles}
    rebuilt: list[Tensor] = []
    for name, clip in clips.items():
        pixels = clip.permute(0, 3, 1, 2).float() / 255
        truths = {style: stylise(style, pixels).permute(0, 2, 3, 1) for style in all_styles()}
        rebuilt.append(squared_errors(rig.reconstruct(clip), {NO_STYLE: truths[NO_STYLE]})[NO_STYLE])
        rows: list[Tensor] = []
        for style in styles:
            made = rig.restyle(clip, PROMPTS[style])
            errors = squared_errors(made, truths)
            names = list(errors)
            nearest = torch.stack([errors[each] for each in names]).argmin(0)
            own[style].append(errors[style])
            found[style] += [names[i] for i in nearest.tolist()]
            middle = len(clip) // 2
            true = (truths[style][middle] * 255).round().to(torch.uint8)
            rows.append(torch.cat([clip[middle], true, made[middle]], 1))
        if sheets is not None:
            write_sheet(sheets / f"{name}.png", rows)
    figures = []
    for style in styles:
        wrong = [each for each in found[style] if each != style]
        share = 1 - len(wrong) / len(found[style])
        usual = max(set(wrong), key=wrong.count) if wrong else ""
        db = decibels(float(torch.cat(own[style]).mean()))
        figures.append(StyleFigures(style, PROMPTS[style], len(found[style]), db, share, usual))
    plain = next((each.db for each in figures if each.style == NO_STYLE), math.nan)
    height, width = next(iter(clips.values())).shape[1:3]
    return Quality(
        model=rig.spec.name,
        clips=list(clips),
        width=width,
        height=height,
        steps=rig.steps,
        s0=rig.spec.noise.s0,
        frames=sum(len(clip) for clip in clips.values()),
        autoencoder_db=decibels(float(torch.cat(rebuilt).mean())),
        no_style_db=plain,
        nearest=sum(each.nearest for each in figures) / len(figures),
        least_nearest=min(each.nearest for each in figures),
        styles=figures,
        seconds=time.monotonic() - began,
    )


def write_sheet(path: Path, rows: list[Tensor]) -> None:
    """Rows of uint8 [H, W, 3] pictures below each other, as PNG."""
    sheet = torch.cat(rows).contiguous().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = sheet.shape[1], sheet.shape[0], "rgb24"  # type: ignore[attr-defined]
        container.mux(stream.encode(av.VideoFrame.from_ndarray(sheet, "rgb24")))  # type: ignore[attr-defined]


def report(quality: Quality) -> str:
    """A table for people."""
    lines = [
        f"{quality.model} at {quality.width}×{quality.height}, {quality.steps} steps, s0 {quality.s0}, {quality.frames} frames",
        f"autoencoder {quality.autoencoder_db:.2f} dB, no style {quality.no_style_db:.2f} dB, "
        f"nearest to its own style: {quality.nearest:.1%} of frames, at worst {quality.least_nearest:.1%}",
        f"{'style':<14}{'dB':>7}{'nearest':>9}  mistaken for",
    ]
    lines += [f"{each.style:<14}{each.db:>7.2f}{each.nearest:>9.1%}  {each.mistaken_for}" for each in quality.styles]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="+", type=Path, metavar="CLIP")
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--models-dir", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--s0", type=float, default=None, help="noise scale of a still picture; default: the model's")
    parser.add_argument("--styles", default="", help="comma-separated; default: all")
    parser.add_argument("--seconds", type=float, default=0, help="of each clip; default: all of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--png", type=Path, default=None, metavar="FOLDER")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = model_folder(args.model, args.models_dir)
    spec = ModelSpec.from_json(folder / "spec.json")
    if args.s0 is not None:
        spec = replace(spec, noise=replace(spec.noise, s0=args.s0))
    styles = tuple(name.strip() for name in args.styles.split(",")) if args.styles else all_styles()
    if unknown := sorted(set(styles) - set(PROMPTS)):
        parser.error(f"no such style: {', '.join(unknown)}; known: {', '.join(PROMPTS)}")
    clips = {path.stem: read_clip(path, spec.default_width, spec.default_height, args.seconds) for path in args.clips}
    quality = measure(Rig(spec, folder, args.steps, args.seed), clips, styles, args.png)
    print(json.dumps(asdict(quality)) if args.json else report(quality))


if __name__ == "__main__":
    main()
