"""The decoder's linear part, fitted instead of trained: least squares from 3×3 latent cells to the pixels of the middle one.

It goes into the network as its shortcut. The decoder beside it starts by adding nothing and learns what is not linear:
edges, lines, flat colours. Of all linear maps this one errs least; descent on a deep decoder alone did not reach it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from shared.engine.model.tiny_vae import CELL, FRAMES, LEAD, TinyVae


def frames_to_cells(video: Tensor) -> Tensor:
    """[B, 4n, 3, 8h, 8w] → [B·n, 768, h, w], in the shortcut's order: frame, row, column, colour."""
    b, t, c, height, width = video.shape
    parts = video.reshape(b * t // FRAMES, FRAMES, c, height // CELL, CELL, width // CELL, CELL)
    return parts.permute(0, 1, 4, 6, 2, 3, 5).reshape(-1, FRAMES * CELL * CELL * c, height // CELL, width // CELL)


@torch.no_grad()
def start_decoder(vae: TinyVae, batches: Iterable[tuple[Tensor, Tensor]], ridge: float = 1e-5) -> None:
    """Writes the shortcut, and a zero for the last layer of what goes beside it.

    ``batches``: clips [B, 4n − 3, 3, H, W] and their latents [B, n, C, H/8, W/8], with or without noise. Raises ValueError
    for an autoencoder that has no shortcut.
    """
    if vae.shortcut is None:
        raise ValueError("this autoencoder has no shortcut to fit")
    known = vae.latent_channels * 9 + 1
    gram = torch.zeros(known, known, dtype=torch.float64)
    cross = torch.zeros(known, vae.shortcut.out_channels, dtype=torch.float64)
    for video, latents in batches:
        whole = torch.cat([video[:, :1].expand(-1, LEAD, -1, -1, -1), video], 1)
        x = fn.unfold(latents.flatten(0, 1), 3, padding=1)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1).transpose(1, 2).flatten(0, 1)
        y = frames_to_cells(whole).flatten(2).transpose(1, 2).flatten(0, 1)
        gram += (x.T @ x).double()
        cross += (x.T @ y).double()
    gram += ridge * gram.diagonal().mean() * torch.eye(known, dtype=torch.float64)
    solved = torch.linalg.solve(gram, cross).T.float()
    vae.shortcut.weight.copy_(solved[:, :-1].reshape(vae.shortcut.weight.shape))
    cast("nn.Parameter", vae.shortcut.bias).copy_(solved[:, -1])
    last = cast("nn.Conv2d", vae.decoder[-1])
    last.weight.zero_()
    cast("nn.Parameter", last.bias).zero_()
