"""Pairs of latents for the DiT: a clip, and the same clip in a style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.filters import NO_STYLE, stylise
from training.linear_encoder import LinearCode
from training.runs import ClipPool

HARD = ("pencil", "ink", "blueprint", "neon", "comic", "watercolour", "pixel art", "stained glass")
"""Styles that fall farthest below what the autoencoder could show of them: drawn twice as often (see OFTEN)."""
OFTEN = 4.5
"""How often a style is drawn that a run is about; others once then, hard ones one and a half times."""
FRAMES = 29
"""Pixel frames of a clip: 8 latent frames."""


@dataclass(frozen=True)
class Pair:
    """A clip's latents [8, C, h, w], the same in a style, and the styled pixels [29, 3, H, W] for the pixel loss."""

    source: Tensor
    target: Tensor
    style: int
    pixels: Tensor


class PairSource:
    """Draws clips and encodes them plain and styled. Latents are normalised: (z − mean) / scale."""

    def __init__(
        self,
        code: LinearCode,
        pool: ClipPool,
        mean: Tensor,
        scale: Tensor,
        styles: tuple[str, ...],
        *,
        plain: float = 0.08,
        often: Sequence[str] = (),
    ) -> None:
        """``plain`` is the share of clips without a style; ``often``: styles drawn more often than even the hard ones, and one
        that is named twice twice as often as that.
        """
        self._code, self._pool, self._styles = code, pool, styles
        hard = 1.5 if often else 2.0
        weights = np.array(
            [0.0 if s == NO_STYLE else OFTEN * often.count(s) or (hard if s in HARD else 1.0) for s in styles]
        )
        self._shares = weights / weights.sum() * (1 - plain)
        self._shares[styles.index(NO_STYLE)] = plain
        self._mean, self._scale = mean.view(-1, 1, 1), scale.view(-1, 1, 1)

    @torch.no_grad()
    def draw(self, rng: np.random.Generator, batch: int, height: int, width: int) -> list[Pair]:
        """``batch`` pairs; each clip serves two styles."""
        pairs: list[Pair] = []
        while len(pairs) < batch:
            clip = self._pool.draw(1, FRAMES, height, width)[0]
            chosen = [self.style(rng) for _ in range(min(2, batch - len(pairs)))]
            styled = [stylise(self._styles[i], clip) for i in chosen]
            z = (self._code.encode(torch.stack([clip, *styled])) - self._mean) / self._scale
            pairs += [Pair(z[0], z[1 + n], i, styled[n]) for n, i in enumerate(chosen)]
        return pairs

    def style(self, rng: np.random.Generator) -> int:
        """One style's number, drawn by its share."""
        return int(rng.choice(len(self._styles), p=self._shares))
