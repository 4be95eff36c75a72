"""What serving does to a clip, as a training task: the rolling cache as a mask, noise levels, and the order of steps.

A clip has 8 latent frames; the first two are a stream's first block. In serving that block runs all its K steps in one slot,
each step resetting it, and its last step's keys and values are then copied to every slot. So whatever step the later frames
run at, the first block they look back to stands at step K−1. The later frames enter alone and see the sinks (frames
0, 1, 2), the newest ``ring − sinks`` frames, themselves included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.engine.model.dit import noise_levels
from shared.engine.plan.noise_controller import first_timestep, step_timesteps
from shared.engine.plan.spec import ModelSpec

FIRST = 2
"""Latent frames of a stream's first block."""
STEP_COUNTS, STEP_SHARES = (1, 2, 3, 4), (0.25, 0.45, 0.15, 0.15)


@dataclass(frozen=True)
class Draw:
    """One clip's noise scale s, the timesteps that s leads to, as in serving, and the later step trained."""

    noise_scale: float
    timesteps: tuple[int, ...]
    step: int

    @property
    def steps(self) -> int:
        """K."""
        return len(self.timesteps)


def draw_task(rng: np.random.Generator, spec: ModelSpec, fewest: int = 1, exactly: int | None = None) -> Draw:
    """A random task of at least ``fewest`` steps, or ``exactly`` so many: mostly the default range of noise, now and then
    what a user may set.
    """
    count = exactly or max(fewest, int(rng.choice(STEP_COUNTS, p=STEP_SHARES)))
    low, high = spec.noise.s0 - spec.noise.gain, spec.noise.s0
    s = float(rng.uniform(low - 0.01, high + 0.01) if rng.random() < 0.85 else rng.uniform(low - 0.05, 0.8))
    steps = spec.steps[:count]
    step = int(rng.integers(1, count)) if count > 1 else 0
    return Draw(s, step_timesteps(first_timestep(s), steps), step)


def look_back(frames: int, tokens: int, ring: int, sinks: int) -> Tensor:
    """The rolling cache as a mask [frames·tokens, frames·tokens], True = may look."""
    f = torch.arange(frames)
    q, k = f[:, None], f[None]
    mask = (k <= q) & ((k < sinks) | (k > q - (ring - sinks)) | (q < ring))
    mask[:FIRST, :FIRST] = True
    return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def frame_positions(rng: np.random.Generator, frames: int, refresh_at: int) -> list[int]:
    """RoPE positions of a clip: in order, or with a long time between the sinks and the rest, as a long stream has."""
    gap = int(rng.integers(0, max(1, refresh_at - frames))) if rng.random() < 0.5 else 0
    return [f if f < FIRST + 1 else f + gap for f in range(frames)]


def sigmas(timesteps: Tensor, spec: ModelSpec) -> Tensor:
    """Nominal timesteps [B, F] → σ [B, F, 1, 1, 1] from the model's table."""
    return noise_levels(timesteps, spec.sigma_shift)


def enter(latents: Tensor, noise_scale: Tensor, noise: Tensor) -> Tensor:
    """Step 0's input: ε·s + latents·(1−s); noise_scale [B]."""
    s = noise_scale[:, None, None, None, None]
    return noise * s + latents * (1 - s)
