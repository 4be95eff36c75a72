"""Rotary positions over time, height and width, in real float32 arithmetic.

A head's D channels are D/2 interleaved pairs: the first c − 2⌊c/3⌋ (c = D/2) turn with the frame, the next ⌊c/3⌋ with the
row, the last ⌊c/3⌋ with the column. Angles are made in float64 on the host, once per forward and only for the frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

RopeTable = tuple[Tensor, Tensor]
"""(cos, ∓sin), float32, broadcastable to [B, L, heads, D]: every pair has (cos, cos) and (−sin, sin)."""


def rotate(x: Tensor, table: RopeTable) -> Tensor:
    """x [B, L, heads, D] turned by the table; computed in float32, returned in x's dtype."""
    cos, sin = table
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(wide * cos, swapped, sin).to(x.dtype)


class Rope:
    """Angles of one head size. Spatial parts are kept per latent size and device."""

    def __init__(self, head_dim: int, theta: float = 10000.0) -> None:
        pairs = head_dim // 2
        side = pairs // 3
        self._time = _frequencies(pairs - 2 * side, theta)
        self._side = _frequencies(side, theta)
        self._spatial: dict[tuple[int, int, str], RopeTable] = {}

    def table(
        self, starts: Sequence[int], frames: int, rows: int, columns: int, device: torch.device | str = "cpu"
    ) -> RopeTable:
        """Tables of B clips of ``frames`` frames of rows × columns tokens; clip b's first frame stands at starts[b].

        Each part of the result is [B, frames·rows·columns, 1, D].
        """
        return self.join(self.turn(starts, frames).to(device, non_blocking=True), rows, columns)

    def turn(self, starts: Sequence[int], frames: int) -> Tensor:
        """The part of :meth:`table` that changes with every forward: [2, B, frames, 2·pairs] float32 on the host."""
        positions = torch.tensor(starts, dtype=torch.float64)[:, None] + torch.arange(frames, dtype=torch.float64)
        return torch.stack(_pairs(positions[..., None] * self._time))

    def join(self, turn: Tensor, rows: int, columns: int) -> RopeTable:
        """:meth:`turn`'s result on the device, with the part of a latent frame's places put to it."""
        batch, frames = turn.shape[1:3]
        tables = [
            torch.cat(
                [
                    time[:, :, None].expand(-1, -1, rows * columns, -1),
                    space[None, None].expand(batch, frames, -1, -1),
                ],
                -1,
            ).flatten(1, 2)[:, :, None]
            for time, space in zip(turn, self._space(rows, columns, turn.device), strict=True)
        ]
        return tables[0], tables[1]

    def shift(self, frames: int, device: torch.device | str = "cpu") -> RopeTable:
        """The table, [D] each, that moves an already turned key by ``frames`` frames (may be negative)."""
        still = torch.zeros(2 * self._side.numel(), dtype=torch.float64)
        angle = torch.cat([self._time * float(frames), still])
        cos, sin = _pairs(angle)
        return cos.to(device), sin.to(device)

    def _space(self, rows: int, columns: int, device: torch.device | str) -> RopeTable:
        """The table of one latent frame's tokens: [rows·columns, 4·⌊c/3⌋] each."""
        key = (rows, columns, str(device))
        if key not in self._spatial:
            down = torch.arange(rows, dtype=torch.float64)[:, None, None] * self._side
            right = torch.arange(columns, dtype=torch.float64)[None, :, None] * self._side
            angle = torch.cat([down.expand(-1, columns, -1), right.expand(rows, -1, -1)], -1).flatten(0, 1)
            cos, sin = _pairs(angle)
            self._spatial[key] = (cos.to(device), sin.to(device))
        return self._spatial[key]


def _pairs(angle: Tensor) -> RopeTable:
    """Angles [..., n] → (cos, ∓sin) [..., 2n] float32."""
    cos, sin = angle.cos().float(), angle.sin().float()
    return cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)


def _frequencies(pairs: int, theta: float) -> Tensor:
    # On the CPU even while a module is built on the meta device.
    return theta ** -(torch.arange(pairs, dtype=torch.float64, device="cpu") / max(pairs, 1))
