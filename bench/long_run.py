"""A long stream under ablations: what sinks, refreshes and the noise controller do for the last minute.

The clip runs to and fro without a cut: standing still, as it is, and four times as fast. The three are streams of one
engine. The frames of the first, the last and every fifth minute are compared with the true filter's; the others are made,
but not decoded, except for some chunks before that fill the decoder's memory. A minute's figure is the PSNR of its mean squared
error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.clips import FIRST, MOTIONS, motion_of, places
from bench.rig import Rig, decibels
from shared.engine.model.autoencoder import Autoencoder
from shared.engine.plan.spec import FRAMES_PER_LATENT, ModelSpec
from shared.engine.stepper import Stepper
from training.filters import stylise


def fixed_noise(spec: ModelSpec, s: float | None = None) -> ModelSpec:
    """The noise controller off: this noise scale (None: that of a still picture) whatever moves."""
    s = spec.noise.s0 if s is None else s
    return replace(spec, noise=replace(spec.noise, s0=s, gain=0.0, s_max=s, s_min=s, still_below=0.0))


ABLATIONS: dict[str, Callable[[ModelSpec], ModelSpec]] = {
    "as shipped": lambda spec: spec,
    "no sinks": lambda spec: replace(spec, sinks=0),
    "fixed sinks": lambda spec: replace(spec, sink_threshold=None),
    "no refresh": lambda spec: replace(spec, rope_refresh_at=0),
    "keys not turned": lambda spec: replace(spec, rerotate=False),
    "controller off": fixed_noise,
}
"""Adaptive sinks, RoPE refresh with the keys turned along and the noise controller on are what is shipped."""


EVERY = 5
"""Minutes from one that is measured to the next."""
MEMORY = 8
"""Chunks that the decoder remembers something of, at most."""


@dataclass(frozen=True)
class LongRun:
    """One ablation under one motion: dB of the first minute, the worst of those that are measured, and the last."""

    ablation: str
    motion: str
    first_db: float
    worst_db: float
    last_db: float


class PartlyShown:
    """An autoencoder that decodes only while ``showing``; otherwise its pictures are black."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._whole, self.showing = autoencoder, True
        self.encoder_state, self.decoder_state = autoencoder.encoder_state, autoencoder.decoder_state
        self.encode = autoencoder.encode

    def decode(self, state: Any, latents: Tensor) -> Tensor:
        """latents [m, C, h, w] → uint8 [n, H, W, 3]."""
        if self.showing:
            return self._whole.decode(state, latents)
        frames, height, width = FRAMES_PER_LATENT * len(latents), 8 * latents.shape[2], 8 * latents.shape[3]
        return torch.zeros(frames, height, width, 3, dtype=torch.uint8)


def squared_error(made: Tensor, source: Tensor, style: str) -> float:
    """Mean squared error to the true filter of the source; both uint8 [n, H, W, 3]."""
    truth = stylise(style, source.permute(0, 3, 1, 2).float() / 255).permute(0, 2, 3, 1)
    return float((made.float() / 255 - truth).square().mean())


def minutes_of(chunks: int, size: int) -> list[int]:
    """The minute of every chunk, ``size`` of them in each; a rest of less than half a minute belongs to the one before."""
    last = max(0, (chunks + size // 2) // size - 1)
    return [min(chunk // size, last) for chunk in range(chunks)]


@dataclass(frozen=True)
class Long:
    """What every ablation runs with: a prompt and the style that it asks for, simulated ``minutes`` at ``fps``, steps, seed."""

    prompt: str
    style: str
    minutes: float
    fps: int
    steps: int
    seed: int = 0


def run_ablation(spec: ModelSpec, folder: Path, clip: Tensor, long: Long) -> dict[str, list[float]]:
    """dB of every measured minute (or part of one at the end) by motion."""
    steps = long.steps
    rig = Rig(spec, folder, steps, long.seed)
    shown = PartlyShown(rig.autoencoder)
    stepper, embedding = Stepper(spec, [rig.stage], shown), rig.text.encode(long.prompt)
    height, width = clip.shape[1:3]
    for index, motion in enumerate(MOTIONS):
        stepper.open(motion, width, height, embedding, steps=steps, seed=long.seed + index)
    chunks = max(2, round(long.minutes * 60 * long.fps / FRAMES_PER_LATENT))
    minute_of = minutes_of(chunks, max(1, round(60 * long.fps / FRAMES_PER_LATENT)))
    measured = {minute for minute in set(minute_of) if minute % EVERY == 0 or minute == minute_of[-1]}
    waiting: dict[str, list[tuple[int, Tensor]]] = {motion: [] for motion in MOTIONS}
    before: dict[str, Tensor | None] = dict.fromkeys(MOTIONS)
    errors: dict[str, dict[int, list[float]]] = {motion: {} for motion in MOTIONS}
    at = 0
    for number in range(chunks + steps):
        fed: dict[str, Tensor] = {}
        if number < chunks:
            count = FRAMES_PER_LATENT if number else FIRST
            fed = {motion: clip[places(len(clip), motion, at, count)] for motion in MOTIONS}
            at += count
        moved = {motion: motion_of(before[motion], frames) for motion, frames in fed.items()}
        for motion, frames in fed.items():
            waiting[motion].append((number, frames))
            before[motion] = frames[-1]
        # What comes out now went in up to K ticks ago.
        near = range(number - steps, number + MEMORY + 1)
        shown.showing = any(minute_of[min(max(chunk, 0), chunks - 1)] in measured for chunk in near)
        for motion, made in stepper.tick(fed, moved).items():
            done = 0
            while done < len(made):  # a tick may show the first block and its follower
                chunk, source = waiting[motion].pop(0)
                if (minute := minute_of[chunk]) in measured:
                    error = squared_error(made[done : done + len(source)], source, long.style)
                    errors[motion].setdefault(minute, []).append(error)
                done += len(source)
    return {motion: [decibels(sum(part) / len(part)) for part in row.values()] for motion, row in errors.items()}


def long_run(
    spec: ModelSpec,
    folder: Path,
    clip: Tensor,
    long: Long,
    ablations: Mapping[str, Callable[[ModelSpec], ModelSpec]] = ABLATIONS,
    tell: Callable[[str], None] = lambda _: None,
) -> list[LongRun]:
    """Every ablation under every motion."""
    results: list[LongRun] = []
    for name, change in ablations.items():
        tell(f"long run: {name}")
        rows = run_ablation(change(spec), folder, clip, long)
        results += [LongRun(name, motion, db[0], min(db), db[-1]) for motion, db in rows.items()]
    return results
