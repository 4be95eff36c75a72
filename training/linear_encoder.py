"""A linear encoder inside the tiny autoencoder's architecture, fitted by principal components instead of gradient descent.

Each level of the encoder folds frames (TPool) and 2×2 pixels (the stride-2 conv) and keeps the 48 directions in which
clips vary most. Offsets keep every signal above zero, so the ReLUs pass it unchanged and the whole encoder is one
linear map of a 4×8×8-pixel block: [48, 4·3·8·8]. Two things follow: it is fitted in seconds on a CPU, and training
the decoder and the DiT can use the map itself, which costs next to nothing.

Power. Among linear codes for a noisy channel the best gives a component of deviation d an amplitude ∝ √d: what
matters more is sent louder. The latents' scale in the spec follows that rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from shared.engine.model.tiny_vae import FRAMES, LEAD, MemBlock, TinyVae, TPool

CELL = 8
"""Pixels per latent cell."""
SPREAD = 0.5
"""Standard deviation of the raw latents: small, because the decoder's soft clamp bends beyond 1.5."""


@dataclass(frozen=True)
class LinearCode:
    """The fitted map: latents [.., C] = blocks [.., 768] @ matrix.T + bias; a block is [4 frames, 3, 8, 8] flattened."""

    matrix: Tensor
    bias: Tensor

    def encode(self, video: Tensor) -> Tensor:
        """What ``TinyVae.encode_clip`` gives for a clip that starts here: [B, 4n − 3, 3, H, W] → [B, n, C, H/8, W/8]."""
        video = torch.cat([video[:, :1].expand(-1, LEAD, -1, -1, -1), video], 1)
        b, t, c, h, w = video.shape
        blocks = video.reshape(b, t // FRAMES, FRAMES, c, h // CELL, CELL, w // CELL, CELL)
        flat = blocks.permute(0, 1, 4, 6, 2, 3, 5, 7).reshape(b, t // FRAMES, h // CELL, w // CELL, -1)
        return (flat @ self.matrix.T + self.bias).permute(0, 1, 4, 2, 3)


def principal(samples: Tensor, keep: int) -> Tensor:
    """samples [N, D] → the ``keep`` directions of most variance, [keep, D] (rows of zeros where nothing varies)."""
    covariance = torch.cov(samples.T.double())
    variances, vectors = torch.linalg.eigh(covariance)
    rows = (vectors * (variances > 1e-9 * variances[-1])).flip(1).T[:keep].float()
    return torch.cat([rows, rows.new_zeros(keep - len(rows), rows.shape[1])])


def fold_time(x: Tensor) -> Tensor:
    """[B, T, C, h, w] → [B, T/2, 2C, h, w], the earlier frame's channels first."""
    return x.unflatten(1, (-1, 2)).flatten(2, 3)


def fold_space(x: Tensor) -> Tensor:
    """[B, T, C, h, w] → [B, T, 4C, h/2, w/2], ordered (C, row, column)."""
    b, t, c, h, w = x.shape
    return x.reshape(b, t, c, h // 2, 2, w // 2, 2).permute(0, 1, 2, 4, 6, 3, 5).reshape(b, t, c * 4, h // 2, w // 2)


def _rows(x: Tensor, most: int = 200_000) -> Tensor:
    flat = x.movedim(2, -1).flatten(0, -2)
    return flat[:: max(1, len(flat) // most)]


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("oc,btchw->btohw", matrix, x)


def markov_clips(shape: Sequence[int], seed: int, time: float = 0.9, space: float = 0.9, grey: float = 0.9) -> Tensor:
    """Clips [B, T, 3, H, W] of first-order Gauss–Markov noise in time, height and width; ``grey`` of it in all colours.

    Drawn scenes are smoother and move more evenly than the world does. Some of these among them keep the code from
    trusting that: its directions stay good for grass, gravel and water that no one drew.
    """
    batch, frames, colours, height, width = shape
    x = torch.randn(batch, frames, colours + 1, height, width, generator=torch.Generator().manual_seed(seed))
    x = grey**0.5 * x[:, :, -1:] + (1 - grey) ** 0.5 * x[:, :, :-1]
    for dim, memory in ((1, time), (3, space), (4, space)):
        parts = list(x.unbind(dim))
        for i in range(1, len(parts)):
            parts[i] = memory * parts[i - 1] + (1 - memory**2) ** 0.5 * parts[i]
        x = torch.stack(parts, dim)
    return 0.5 + 0.2 * x


@torch.no_grad()
def fit(vae: TinyVae, video: Tensor) -> LinearCode:
    """Fits on clips [B, 4n, 3, H, W] and writes the encoder's weights. The encoder must be as wide as the latents."""
    width = vae.latent_channels
    for module in vae.encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    layers = list(vae.encoder)
    entry = cast("nn.Conv2d", layers[0])
    for c in range(3):
        entry.weight[c, c, 1, 1] = 1.0
    x = torch.cat([video, video.new_zeros(*video.shape[:2], width - 3, *video.shape[3:])], 2)
    for index in range(3):
        at = 2 + 5 * index
        pool, conv, first_block = (
            cast("TPool", layers[at]),
            cast("nn.Conv2d", layers[at + 1]),
            cast("MemBlock", layers[at + 2]),
        )
        if pool.stride == 2:
            x = fold_time(x)
            time_map = _sparse_identity(width) if index == 0 else principal(_rows(x), width)
        else:
            time_map = torch.eye(width)
        pool.conv.weight.copy_(time_map[:, :, None, None])
        x = _apply(time_map, x)
        x = fold_space(x)
        space_map = principal(_rows(x), width)
        x = _apply(space_map, x)
        conv.weight[:, :, 1:, 1:] = space_map.reshape(width, width, 2, 2)
        # What follows must stay above zero for any picture, not only for those of the sample.
        low, high = x.amin((0, 1, 3, 4)), x.amax((0, 1, 3, 4))
        offset = (-low + 0.75 * (high - low)).clamp(min=0)
        cast("nn.Conv2d", first_block.conv[4]).bias.copy_(offset)  # type: ignore[union-attr]
        x = x + offset[:, None, None]
    last = cast("nn.Conv2d", layers[-1])
    mean, deviation = x.mean((0, 1, 3, 4)), x.std((0, 1, 3, 4))
    for c in range(width):
        last.weight[c, c, 1, 1] = SPREAD / deviation[c]
    cast("nn.Parameter", last.bias).copy_(-mean / deviation * SPREAD)
    return measure(vae)


def _sparse_identity(width: int) -> Tensor:
    """[width, 2·width]: the three colours of the first frame, then those of the second."""
    matrix = torch.zeros(width, 2 * width)
    for c in range(3):
        matrix[c, c] = matrix[3 + c, width + c] = 1.0
    return matrix


@torch.no_grad()
def measure(vae: TinyVae) -> LinearCode:
    """The linear map of a fitted encoder, read off by feeding it one unit block after the other.

    In double precision: the offsets that keep signals above zero are large, and a difference of two outputs loses digits.
    """
    exact, size = deepcopy(vae).double(), FRAMES * 3 * CELL * CELL
    grey = torch.full((1, FRAMES, 3, CELL, CELL), 0.5, dtype=torch.float64)
    units = torch.eye(size, dtype=torch.float64).reshape(size, FRAMES, 3, CELL, CELL) * 0.25
    middle = exact.encode_clip(grey).flatten()
    matrix = (torch.cat([exact.encode_clip(grey + part).flatten(1) for part in units.split(96)]) - middle) / 0.25
    return LinearCode(matrix.T.float().contiguous(), (middle - matrix.sum(0) * 0.5).float())


def amplitudes(vae: TinyVae, code: LinearCode, video: Tensor, gain: float) -> tuple[list[float], list[float]]:
    """(mean, scale) per latent channel for the spec: (z − mean)/scale has amplitude ∝ √d and mean square ``gain``².

    d is how much of the picture the channel carries: the length of its column in the least-squares inverse of the map.
    """
    z = code.encode(video).movedim(2, -1).flatten(0, -2)
    weight = torch.linalg.pinv(code.matrix.double()).norm(dim=0).float() * z.std(0)
    wanted = weight.sqrt()
    wanted = wanted * gain / wanted.square().mean().sqrt()
    return z.mean(0).tolist(), (z.std(0) / wanted).tolist()
