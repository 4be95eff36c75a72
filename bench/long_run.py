"""A long stream under ablations: what sinks, refreshes and the noise controller do for the last minute.

The clip runs to and fro without a cut: standing still, as it is, and four times as fast. The three are streams of one
engine. Every frame is compared with the true filter's; a minute's figure is the PSNR of its mean squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from bench.clips import FIRST, MOTIONS, motion_of, places
from bench.rig import Rig, decibels
from shared.engine.plan.spec import FRAMES_PER_LATENT, ModelSpec
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
    "refresh, keys not turned": lambda spec: replace(spec, rerotate=False),
    "controller off": fixed_noise,
}
"""Adaptive sinks, RoPE refresh with the keys turned along and the noise controller on are what is shipped."""


@dataclass(frozen=True)
class LongRun:
    """One ablation under one motion: dB of the first, the worst and the last minute."""

    ablation: str
    motion: str
    first_db: float
    worst_db: float
    last_db: float


def squared_error(made: Tensor, source: Tensor, style: str) -> float:
    """Mean squared error to the true filter of the source; both uint8 [n, H, W, 3]."""
    truth = stylise(style, source.permute(0, 3, 1, 2).float() / 255).permute(0, 2, 3, 1)
    return float((made.float() / 255 - truth).square().mean())


def run_ablation(
    spec: ModelSpec, folder: Path, clip: Tensor, prompt: str, style: str, minutes: float, fps: int, steps: int
) -> dict[str, list[float]]:
    """dB of every minute (or part of one at the end) by motion."""
    rig = Rig(spec, folder, steps, 0)
    height, width = clip.shape[1:3]
    stepper, embedding = rig.stepper, rig.text.encode(prompt)
    for index, motion in enumerate(MOTIONS):
        stepper.open(motion, width, height, embedding, steps=steps, seed=index)
    chunks = max(2, round(minutes * 60 * fps / FRAMES_PER_LATENT))
    waiting: dict[str, list[Tensor]] = {motion: [] for motion in MOTIONS}
    before: dict[str, Tensor | None] = dict.fromkeys(MOTIONS)
    errors: dict[str, list[float]] = {motion: [] for motion in MOTIONS}
    at = 0
    for number in range(chunks + steps):
        fed: dict[str, Tensor] = {}
        if number < chunks:
            count = FRAMES_PER_LATENT if number else FIRST
            fed = {motion: clip[places(len(clip), motion, at, count)] for motion in MOTIONS}
            at += count
        moved = {motion: motion_of(before[motion], frames) for motion, frames in fed.items()}
        for motion, frames in fed.items():
            waiting[motion].append(frames)
            before[motion] = frames[-1]
        for motion, made in stepper.tick(fed, moved).items():
            done = 0
            while done < len(made):  # a tick may show the first block and its follower
                source = waiting[motion].pop(0)
                errors[motion].append(squared_error(made[done : done + len(source)], source, style))
                done += len(source)
    return {motion: _by_minute(row, fps) for motion, row in errors.items()}


def _by_minute(errors: Sequence[float], fps: int) -> list[float]:
    size = max(1, round(60 * fps / FRAMES_PER_LATENT))
    parts = [errors[i : i + size] for i in range(0, len(errors), size)]
    if len(parts) > 1 and len(parts[-1]) < size // 2:  # a short rest belongs to the minute before
        parts[-2] = [*parts[-2], *parts.pop()]
    return [decibels(sum(part) / len(part)) for part in parts]


def long_run(
    spec: ModelSpec,
    folder: Path,
    clip: Tensor,
    prompt: str,
    style: str,
    *,
    minutes: float,
    fps: int,
    steps: int,
    ablations: Mapping[str, Callable[[ModelSpec], ModelSpec]] = ABLATIONS,
    tell: Callable[[str], None] = lambda _: None,
) -> list[LongRun]:
    """Every ablation under every motion."""
    results: list[LongRun] = []
    for name, change in ablations.items():
        tell(f"long run: {name}")
        rows = run_ablation(change(spec), folder, clip, prompt, style, minutes, fps, steps)
        results += [LongRun(name, motion, db[0], min(db), db[-1]) for motion, db in rows.items()]
    return results
