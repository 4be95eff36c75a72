"""What the training commands share: clips from the pool, a schedule, a moving average, checkpoints, curves."""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class ClipPool:
    """Random crops of the pool's clips. ``held_out`` clips at the end are never drawn, for validation.

    Raises ValueError for a pool that was not finished.
    """

    def __init__(self, path: Path, rng: np.random.Generator, held_out: int = 8) -> None:
        self.clips = np.load(path, mmap_mode="r")
        note = path.with_name("pool.json")
        if note.exists() and (done := json.loads(note.read_text())["done"]) < len(self.clips):
            raise ValueError(
                f"{path}: {done} of {len(self.clips)} clips are drawn: run `python -m training.pool` to its end"
            )
        self.rng, self.count = rng, len(self.clips) - held_out

    def draw(self, batch: int, frames: int, height: int, width: int) -> Tensor:
        """float32 [batch, frames, 3, height, width] in [0, 1]; flipped and played backwards now and then."""
        _, total, _, full_h, full_w = self.clips.shape
        parts = []
        for _ in range(batch):
            clip = int(self.rng.integers(self.count))
            t = int(self.rng.integers(total - frames + 1))
            y = int(self.rng.integers((full_h - height) // 2 + 1)) * 2
            x = int(self.rng.integers((full_w - width) // 2 + 1)) * 2
            part = self.clips[clip, t : t + frames, :, y : y + height, x : x + width]
            part = part[..., ::-1] if self.rng.random() < 0.5 else part
            part = part[::-1] if self.rng.random() < 0.3 else part
            if self.rng.random() < 0.15:  # a still picture is a clip too
                part = np.repeat(part[:1], frames, 0)
            parts.append(torch.from_numpy(np.array(part)))
        return torch.stack(parts).float().div_(255)

    def validation(self, frames: int) -> Tensor:
        """The held-out clips, whole: float32 [held_out, frames, 3, H, W]."""
        return torch.from_numpy(np.array(self.clips[self.count :, :frames])).float().div_(255)


class Progress:
    """How far a run is, 0…1, by steps or by minutes, whichever ends first; minutes count over resumed runs."""

    def __init__(self, steps: int, minutes: float, spent_s: float = 0.0) -> None:
        self.steps, self.seconds = steps, minutes * 60
        self._start = time.monotonic() - spent_s

    @property
    def spent_s(self) -> float:
        """Seconds spent in training, resumed runs included."""
        return time.monotonic() - self._start

    def at(self, step: int) -> float:
        """The larger of the shares of steps and of time used."""
        return min(1.0, max(step / self.steps, self.spent_s / self.seconds if self.seconds else 0.0))


def learning_rate(progress: float, highest: float, warm: float = 0.03, lowest: float = 0.02) -> float:
    """A short linear rise, then a cosine down to ``lowest``·``highest``."""
    if progress < warm:
        return highest * (progress / warm * 0.95 + 0.05)
    return highest * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm))))


class MovingAverage:
    """An exponential moving average of a module's weights; young averages follow faster."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.weights = {k: v.detach().clone().float() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes the module's present weights in."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for key, value in module.state_dict().items():
            self.weights[key].lerp_(value.float(), 1 - decay)


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes safetensors atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, part)
    part.chmod(0o644)
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.chmod(0o644)
    os.replace(part, path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a resumable state atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    part.chmod(0o644)
    os.replace(part, path)


class Curves:
    """One CSV row per report; goes on in an existing file when resumed."""

    def __init__(self, path: Path, resumed: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._fields: list[str] | None = None
        if resumed and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self._fields = next(csv.reader(file), None)
        elif path.exists():
            path.unlink()

    def add(self, row: Mapping[str, float | int]) -> None:
        """Appends and prints the row. All rows have the fields of the first."""
        first = self._fields is None
        fields = self._fields = self._fields or list(row)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fields, extrasaction="ignore", restval="")
            if first:
                writer.writeheader()
            writer.writerow({k: f"{v:.6g}" for k, v in row.items()})
        print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio in dB of pictures in [0, 1]."""
    return float(-10 * torch.log10((a.float() - b.float()).square().mean().clamp(min=1e-10)))
