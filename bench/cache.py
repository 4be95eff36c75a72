"""Whether the cache's rules are right by their pictures: four ways to keep and turn what is cached, on the same streams.

``python -m bench.cache --clips 2 --seconds 16 --json``

* ``default``: oldest first out, sinks tested once the ring is full, cached keys re-rotated at a RoPE refresh;
* ``public``: the public code's rules, faults included;
* ``no re-rotation``: default, but cached keys keep their old rotation;
* ``fixed sinks``: default, but the first frames stay for good.

Clips are procedural, with a hard cut in the middle and long enough to pass a RoPE refresh. For every style: dB to the
true filter's picture over all frames, in the second after the cut, and in the two seconds after the refresh. ``jump`` is
what the refresh itself does: the root mean square difference, in levels of 255, between these two seconds and the same
two seconds of a stream that never refreshes. RoPE is relative, so a perfect refresh changes nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.clips import chunks_of
from bench.quality import PROMPTS
from shared.engine.model.autoencoder import Autoencoder
from shared.engine.model.loading import load_text_encoder, load_vae
from shared.engine.plan.registry import EMBEDDED_MODEL, model_folder
from shared.engine.plan.spec import FRAMES_PER_LATENT, ModelSpec
from shared.engine.stage import Stage
from shared.engine.stepper import Stepper
from training.filters import stylise
from training.procedural import make_clip

FIRST_SEED = 3_000_000


@dataclass(frozen=True, slots=True)
class Row:
    """One way's result: dB, and ``jump`` in levels of 255."""

    way: str
    all_frames: float
    after_cut: float
    after_refresh: float
    jump: float


def ways(spec: ModelSpec, folder: Path) -> Iterator[tuple[str, ModelSpec, Stage]]:
    """Name, spec and stage of each way."""
    weights = load_file(folder / "dit.safetensors")
    yield "default", spec, Stage.load(spec, weights)
    yield "public", replace(spec, rerotate=False), Stage.load(spec, weights, public_rule=True)
    yield "no re-rotation", replace(spec, rerotate=False), Stage.load(spec, weights)
    fixed = replace(spec, sink_threshold=None)
    yield "fixed sinks", fixed, Stage.load(fixed, weights)


def clip_of(seed: int, frames: int, height: int, width: int) -> Tensor:
    """Two scenes with a hard cut between them: uint8 [frames, H, W, 3]."""
    half = frames // 2
    parts = [torch.from_numpy(make_clip(seed + i, n, height, width)) for i, n in enumerate((half, frames - half))]
    return torch.cat(parts).permute(0, 2, 3, 1).contiguous()


def restyle(stepper: Stepper, clip: Tensor, embedding: Tensor, steps: int) -> Tensor:
    """The whole clip through the engine."""
    stepper.open("clip", clip.shape[2], clip.shape[1], embedding, steps=steps)
    parts: list[Tensor] = []
    for pixels, rmse in chunks_of(clip):
        parts += stepper.tick({"clip": pixels}, {"clip": rmse}).values()
    while sum(map(len, parts)) < len(clip):
        parts += stepper.tick({}).values()
    stepper.close("clip")
    return torch.cat(parts)


def decibels(errors: Tensor) -> float:
    """PSNR of the mean of squared errors of colours in [0, 1]."""
    return -10 * math.log10(float(errors.mean()))


def measure(spec: ModelSpec, folder: Path, args: argparse.Namespace) -> list[Row]:
    """Every way over all clips and styles."""
    frames = int(args.seconds * args.fps) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1
    cut, refresh = frames // 2, spec.rope_refresh_at * FRAMES_PER_LATENT
    if frames <= refresh + args.fps:
        raise SystemExit(f"{frames} frames do not pass the refresh at {refresh}: more --seconds are needed")
    vae, text = load_vae(spec, folder), load_text_encoder(spec, folder)
    height, width = args.height, args.width
    clips = [clip_of(FIRST_SEED + 10 * n, frames, height, width) for n in range(args.clips)]
    rows: list[Row] = []
    for name, own, stage in ways(spec, folder):
        stepper = Stepper(own, [stage], Autoencoder(vae, own, torch.device("cpu"), torch.float32))
        errors: list[Tensor] = []
        made = clips[0]
        for clip in clips:
            for style in args.styles:
                truth = stylise(style, clip.permute(0, 3, 1, 2).float() / 255).permute(0, 2, 3, 1)
                made = restyle(stepper, clip, text.encode(PROMPTS[style]), args.steps)
                errors.append((made.float() / 255 - truth).square().mean((1, 2, 3)))
        error, after = torch.stack(errors).mean(0), slice(refresh, refresh + 2 * args.fps)
        never = Stepper(replace(own, rope_refresh_at=0), [stage], stepper.autoencoder)
        other = restyle(never, clips[-1], text.encode(PROMPTS[args.styles[-1]]), args.steps)
        jump = float((made[after].float() - other[after].float()).square().mean().sqrt())
        rows.append(Row(name, decibels(error), decibels(error[cut : cut + args.fps]), decibels(error[after]), jump))
    return rows


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models-dir", type=Path, default=None)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=14)
    parser.add_argument("--fps", type=int, default=24)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--styles", type=lambda text: text.split(","), default=["pencil", "thermal", "comic"])
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = model_folder(EMBEDDED_MODEL, args.models_dir)
    rows = measure(ModelSpec.from_json(folder / "spec.json"), folder, args)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print(f"{'way':<16}{'all frames':>12}{'after cut':>12}{'after refresh':>15} dB{'jump':>8}")
    for row in rows:
        print(
            f"{row.way:<16}{row.all_frames:>12.2f}{row.after_cut:>12.2f}{row.after_refresh:>15.2f}   {row.jump:>8.3f}"
        )


if __name__ == "__main__":
    main()
