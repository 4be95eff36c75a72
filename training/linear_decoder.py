"""A good start for the tiny autoencoder's decoder: level by level, the least-squares inverse of the linear encoder.

Every level of the decoder doubles the size by repeating pixels and then mixes 3×3 neighbours. What the next finer level of the
encoder held is regressed on that. Signals carry an offset so that ReLUs pass them, one channel is constant (the convs
have no bias), MemBlocks start as the identity, and the channels left over are random features for training to use.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from shared.engine.model.tiny_vae import MemBlock, TGrow, TinyVae, TPool
from training.linear_encoder import SPREAD, fold_space, fold_time, principal

LIFT = 4.0
"""Offset of features, in standard deviations."""


class _Levels:
    """The encoder's linear features of a video, coarse to fine, and the maps between the levels."""

    def __init__(self, vae: TinyVae, video: Tensor) -> None:
        layers = list(vae.encoder)
        width = vae.latent_channels
        x = torch.cat([video, video.new_zeros(*video.shape[:2], width - 3, *video.shape[3:])], 2)
        self.features: list[Tensor] = []
        self.space: list[Tensor] = []
        for index in range(3):
            at = 2 + 5 * index
            pool, conv = cast("TPool", layers[at]), cast("nn.Conv2d", layers[at + 1])
            x = fold_time(x) if pool.stride == 2 else x
            x = torch.einsum("oc,btchw->btohw", pool.conv.weight[:, :, 0, 0], x)
            space = conv.weight[:, :, 1:, 1:].reshape(width, -1)
            self.space.append(space)
            x = torch.einsum("oc,btchw->btohw", space, fold_space(x))
            self.features.append(x)


def regress(features: Tensor, target: Tensor, ridge: float = 1e-4) -> Tensor:
    """Least squares of target [N, o, h, w] on 3×3 neighbourhoods of features [N, c, h, w] → conv weights [o, c, 3, 3]."""
    channels, outputs = features.shape[1], target.shape[1]
    gram = torch.zeros(channels * 9, channels * 9, dtype=torch.float64)
    cross = torch.zeros(channels * 9, outputs, dtype=torch.float64)
    for x, y in zip(features.split(2), target.split(2), strict=True):
        columns = fn.unfold(x, 3, padding=1)[..., ::3].transpose(1, 2).flatten(0, 1)
        wanted = y.flatten(2)[..., ::3].transpose(1, 2).flatten(0, 1)
        gram += (columns.T @ columns).double()
        cross += (columns.T @ wanted).double()
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram, cross).T.reshape(outputs, channels, 3, 3).float()


@torch.no_grad()
def start_decoder(vae: TinyVae, video: Tensor, latents: Tensor) -> None:
    """Writes the decoder's weights. video [B, 4n, 3, H, W] and its latents [B, n, C, H/8, W/8], with or without noise."""
    layers = list(vae.decoder)
    levels = _Levels(vae, video)
    coefficients = vae.latent_channels
    for module in vae.decoder.modules():
        if isinstance(module, MemBlock):
            cast("nn.Conv2d", module.conv[4]).weight.mul_(0.02)
            cast("nn.Parameter", module.conv[4].bias).zero_()
    entry = cast("nn.Conv2d", layers[1])
    weight = fn.pad(torch.eye(coefficients)[:, :, None, None], (1, 1, 1, 1)) / SPREAD
    entry.weight[:coefficients], entry.weight[coefficients] = weight, 0.0
    cast("nn.Parameter", entry.bias)[:coefficients], cast("nn.Parameter", entry.bias)[coefficients] = LIFT, 1.0
    x = layers[2](layers[1](layers[0](latents.flatten(0, 1))))
    batch = video.shape[0]
    for index in range(3):
        at = 3 + 6 * index
        for block in layers[at : at + 3]:
            x = block(x, batch, None)[0]
        x = layers[at + 3](x)
        grow, conv = cast("TGrow", layers[at + 4]), cast("nn.Conv2d", layers[at + 5])
        if index < 2:
            target = levels.features[1 - index].flatten(0, 1)
            scale = target.std((0, 2, 3), keepdim=True)
            keep = min(int((scale > 1e-6).sum()), conv.out_channels - 1)
            target = target[:, :keep] / scale[:, :keep] + LIFT
            target = torch.cat([target, torch.ones_like(target[:, :1])], 1)
            levels.space.append(scale.flatten())
        else:
            target = video.flatten(0, 1) + 0.2
        grow.conv.weight.copy_(_grow_map(grow, levels, x, target)[:, :, None, None])
        x = grow(x)
        conv.weight[: target.shape[1]] = regress(x, target)
        x = conv(x)
    last = cast("nn.Conv2d", layers[-1])
    last.weight.mul_(0.05)
    last.weight[:, :3] = fn.pad(torch.eye(3)[:, :, None, None], (1, 1, 1, 1))
    cast("nn.Parameter", last.bias).fill_(-0.2)


def _grow_map(grow: TGrow, levels: _Levels, x: Tensor, target: Tensor) -> Tensor:
    """[stride·C, C]: how a TGrow spreads its channels x [N, C, h, w] over the frames that it makes of each.

    ``target`` [N·stride, o, 2h, 2w] is what the next level is to hold: the coefficients and, last, a constant.
    """
    channels, stride = grow.channels, grow.conv.out_channels // grow.channels
    if stride == 1:
        return torch.eye(channels)
    if channels > 2 * target.shape[1]:
        return _frame_codes(x, target, stride)
    # The finest level: each frame's own 2×2 pixels, straight from the coefficients (the last place is the constant).
    kept = channels - 1
    inverse = levels.space[0].T.reshape(-1, 4, levels.space[0].shape[0])  # [inputs, 4 places, coefficients]
    scale = levels.space[-1][:kept]
    maps = []
    for frame in range(stride):
        pixels = inverse[3 * frame : 3 * frame + 3].reshape(12, -1)[:, :kept] * scale
        part = torch.zeros(channels, channels)
        part[:12, :kept] = pixels
        part[:12, kept] = -LIFT * pixels.sum(1)
        part[12, kept] = 1.0
        part[13:, : channels - 13] = torch.eye(channels)[: channels - 13, : channels - 13]
        maps.append(part)
    return torch.cat(maps)


def _frame_codes(x: Tensor, target: Tensor, stride: int) -> Tensor:
    """What one frame's 2×2 cells need most, as principal components of the cells; each frame's, regressed on x.

    All frames share the conv that follows, which turns the components back into cells.
    """
    channels = x.shape[1]
    cells = fold_space(target.unflatten(0, (-1, stride)))  # [N, stride, 4·o, h, w]
    rows = cells.movedim(2, -1).flatten(0, -2)
    directions = principal(rows[:: max(1, len(rows) // 100_000)], channels - 1)
    inputs = x[..., ::2, ::2].movedim(1, -1).flatten(0, -2).double()  # x is enlarged already
    gram = inputs.T @ inputs
    gram += 1e-6 * gram.diagonal().mean() * torch.eye(channels, dtype=torch.float64)
    maps = []
    for frame in range(stride):
        codes = (cells[:, frame].movedim(1, -1).flatten(0, -2) @ directions.T).double()
        wanted = torch.cat([codes, torch.ones_like(codes[:, :1])], 1)
        maps.append(torch.linalg.solve(gram, inputs.T @ wanted).T.float())
    return torch.cat(maps)
