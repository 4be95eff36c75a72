"""Reads what :mod:`training.estimates` wrote, in random cuts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Estimates:
    """A folder of estimates. The last ``held_out`` are never drawn; their clips may be, in other cuts and styles.

    Raises FileNotFoundError for a folder that was not finished, ValueError for one with too few.
    """

    def __init__(self, folder: Path, rng: np.random.Generator, held_out: int = 16) -> None:
        np.load(folder / "styles.npy")  # written last
        self._latents = np.load(folder / "latents.npy", mmap_mode="r")
        self._pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        self._rng, self._count = rng, len(self._latents) - held_out
        if self._count < 1:
            raise ValueError(f"{folder}: {len(self._latents)} estimates, of which {held_out} are held out: make more")

    def draw(self, batch: int, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """``batch`` cuts of 4n − 3 frames: latents [B, n, C, h, w], pixels [B, 4n − 3, 3, H, W]. Sides of whole cells."""
        latents: list[Tensor] = []
        pixels: list[Tensor] = []
        count = (frames + 3) // 4
        _, most, _, rows, columns = self._latents.shape
        for _ in range(batch):
            clip, t = int(self._rng.integers(self._count)), int(self._rng.integers(most - count + 1))
            y = int(self._rng.integers(rows - height // 8 + 1))
            x = int(self._rng.integers(columns - width // 8 + 1))
            cut = self._latents[clip, t : t + count, :, y : y + height // 8, x : x + width // 8]
            latents.append(torch.from_numpy(np.ascontiguousarray(cut)).float())
            # A clip's first latent frame is its first picture; later ones end with the picture that this cut begins with.
            shown = self._pixels[clip, 4 * t : 4 * t + frames, :, 8 * y : 8 * y + height, 8 * x : 8 * x + width]
            pixels.append(torch.from_numpy(np.ascontiguousarray(shown)).float().div_(255))
        return torch.stack(latents), torch.stack(pixels)

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Those that are never drawn, whole."""
        latents = torch.from_numpy(np.array(self._latents[self._count :])).float()
        return latents, torch.from_numpy(np.array(self._pixels[self._count :])).float().div_(255)
