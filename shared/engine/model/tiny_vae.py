"""The tiny causal autoencoder (the TAEHV architecture), with widths as parameters.

The module holds weights only. What a stream has seen lives in a :class:`VaeMemory` that the stream owns, so one module
serves any number of streams, and a clip fed in parts gives what the whole clip gives.

Time. Four pixel frames make one latent frame. The first picture of a clip is seen as four equal frames, so 1 + 4n
frames make 1 + n latents: a stream's first chunk has 5 frames and makes 2 latents, every later one has 4 and makes 1.
The decoder's first 3 frames are the copies of that first picture and are dropped.

Parameter names are those of the published TAEHV weights (``encoder.4.conv.0.weight`` …).

A shortcut may lead past the decoder: one convolution at the latents' size makes all pixels of a cell, and the decoder adds
what is not linear. No published model has one; the embedded one does (docs/adr/0025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

FRAMES = 4
"""Pixel frames per latent frame."""
LEAD = FRAMES - 1
"""Copies of the first picture put in front when encoding; frames dropped in front when decoding."""
CELL = 8
"""Pixels per side of a latent cell."""


@dataclass(slots=True)
class VaeMemory:
    """One direction's memory of one stream: the last input of every MemBlock, in order, [B, C, h, w] each."""

    last: list[Tensor | None] = field(default_factory=list)
    started: bool = False

    def clone(self) -> VaeMemory:
        """A copy that no later call changes."""
        return VaeMemory([None if t is None else t.clone() for t in self.last], self.started)

    def values(self) -> list[Tensor | str | bool | int | None]:
        """All of it, for :meth:`restore`."""
        return [self.started, *self.last]

    def restore(self, values: Sequence[Tensor | str | bool | int | None]) -> None:
        """Become what gave these values. Raises ValueError for those of another kind of memory."""
        started, *last = values
        if not isinstance(started, bool) or not all(value is None or isinstance(value, Tensor) for value in last):
            raise ValueError("these are no values of a tiny autoencoder's memory")
        self.started, self.last = started, [value if isinstance(value, Tensor) else None for value in last]

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.last if t is not None)


class MemBlock(nn.Module):
    """ReLU(conv(cat[x_t, x_{t−1}]) + skip(x_t)): the only place where the network looks back in time."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * n_in, n_out, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(n_out, n_out, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(n_out, n_out, 3, padding=1),
        )
        self.skip = nn.Conv2d(n_in, n_out, 1, bias=False) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, batch: int, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B·T, C, h, w], last [B, C, h, w] or None (zeros) → (y [B·T, C', h, w], this call's last input)."""
        clip = x.unflatten(0, (batch, -1))
        before = torch.zeros_like(clip[:, 0]) if last is None else last
        past = torch.cat([before[:, None], clip[:, :-1]], 1).flatten(0, 1)
        return fn.relu(self.conv(torch.cat([x, past], 1)) + self.skip(x)), clip[:, -1]


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1×1 convolution as a matrix product: [N, C, h, w] → [N, C', h, w].

    oneDNN splits the sum of a small 1×1 convolution over its threads, so its last bit would depend on the thread count
    and a stream's pixels on how many workers share the machine.
    """
    weight = conv.weight.flatten(1)
    return torch.matmul(weight, x.flatten(2)).unflatten(2, x.shape[2:])


class TPool(nn.Module):
    """Folds ``stride`` frames into channels, earliest first, then a 1×1 conv."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels * stride, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B·T, C, h, w] with T a multiple of the stride → [B·T/stride, C, h, w]."""
        return _pointwise(self.conv, x.reshape(-1, self.stride * x.shape[1], *x.shape[2:]))


class TGrow(nn.Module):
    """A 1×1 conv to ``stride``·C channels, unfolded into ``stride`` frames."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B·T, C, h, w] → [B·T·stride, C, h, w]."""
        return _pointwise(self.conv, x).reshape(-1, self.channels, *x.shape[2:])


class SoftClamp(nn.Module):
    """3·tanh(x/3): keeps wild latents from burning the picture."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return torch.tanh(x / 3) * 3


def cells_to_frames(cells: Tensor) -> Tensor:
    """[N, 4·8·8·3, h, w], ordered (frame, row, column, colour) → [4N, 3, 8h, 8w]."""
    n, _, h, w = cells.shape
    parts = cells.permute(0, 2, 3, 1).reshape(n, h, w, FRAMES, CELL, CELL, 3)
    return parts.permute(0, 3, 6, 1, 4, 2, 5).reshape(n * FRAMES, 3, h * CELL, w * CELL)


def _conv(n_in: int, n_out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=bias)


class TinyVae(nn.Module):
    """Encoder and decoder. ``widths`` are the decoder's four widths, ``encoder_width`` the encoder's one.

    ``shortcut``: whether a linear map of 3×3 cells goes past the decoder.
    """

    def __init__(
        self,
        widths: Sequence[int] = (256, 128, 64, 64),
        encoder_width: int = 64,
        latent_channels: int = 16,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        w = encoder_width
        self.latent_channels = latent_channels
        encoder: list[nn.Module] = [_conv(3, w), nn.ReLU(inplace=True)]
        for time_stride in (2, 2, 1):
            encoder += [TPool(w, time_stride), _conv(w, w, stride=2, bias=False), *(MemBlock(w, w) for _ in range(3))]
        encoder.append(_conv(w, latent_channels))
        self.encoder = nn.Sequential(*encoder)

        decoder: list[nn.Module] = [SoftClamp(), _conv(latent_channels, widths[0]), nn.ReLU(inplace=True)]
        for wide, narrow, time_stride in zip(widths[:3], widths[1:4], (1, 2, 2), strict=True):
            decoder += [MemBlock(wide, wide) for _ in range(3)]
            decoder += [nn.Upsample(scale_factor=2), TGrow(wide, time_stride), _conv(wide, narrow, bias=False)]
        decoder += [nn.ReLU(inplace=True), _conv(widths[3], 3)]
        self.decoder = nn.Sequential(*decoder)
        self.shortcut = _conv(latent_channels, FRAMES * CELL * CELL * 3) if shortcut else None

    def new_memory(self) -> VaeMemory:
        """One direction's memory of one stream, empty."""
        return VaeMemory()

    def encode_clip(self, video: Tensor, memory: VaeMemory | None = None) -> Tensor:
        """Encode; differentiable.

        video [B, T, 3, H, W] float in [0, 1], H and W multiples of 8 → latents [B, n, C, H/8, W/8].
        T = 4n as it is, or T = 4n − 3 when the clip starts here (its first picture is seen four times).
        With a ``memory`` the clip goes on where the memory's last call ended.
        Raises ValueError for a T that fits neither.
        """
        memory = VaeMemory() if memory is None else memory
        frames = video.shape[1]
        if frames % FRAMES == 1 and not memory.started:
            video = torch.cat([video[:, :1].expand(-1, LEAD, -1, -1, -1), video], 1)
        elif frames % FRAMES:
            raise ValueError(f"{frames} frames: a clip has 4n frames, or 4n + 1 where it starts")
        memory.started = True
        return self._run(self.encoder, video, memory)

    def decode_clip(self, latents: Tensor, memory: VaeMemory | None = None) -> Tensor:
        """Decode; differentiable. latents [B, n, C, h, w] → [B, 4n, 3, 8h, 8w] in [0, 1]; 4n − 3 where it starts."""
        return self.decode_unclamped(latents, memory).clamp(0, 1)

    def decode_unclamped(self, latents: Tensor, memory: VaeMemory | None = None) -> Tensor:
        """:meth:`decode_clip` before the clamp, for losses that need a gradient outside [0, 1]."""
        memory = VaeMemory() if memory is None else memory
        video = self._run(self.decoder, latents, memory)
        if self.shortcut is not None:
            straight = cells_to_frames(self.shortcut(latents.flatten(0, 1)))
            video = video + straight.unflatten(0, (len(latents), -1))
        if memory.started:
            return video
        memory.started = True
        return video[:, LEAD:]

    def encode(self, memory: VaeMemory, frames: Tensor) -> Tensor:
        """One chunk of one stream: frames [n, 3, H, W] (uint8, or float in [0, 1]) → latents [m, C, H/8, W/8].

        n = 5 gives 2 latents on a stream's first chunk; n = 4 gives 1 later.
        """
        weight = cast("nn.Conv2d", self.encoder[0]).weight
        if frames.dtype == torch.uint8:
            frames = frames.to(weight.dtype) / 255
        return self.encode_clip(frames.to(weight.dtype)[None], memory)[0]

    def decode(self, memory: VaeMemory, latents: Tensor) -> Tensor:
        """One chunk of one stream: latents [m, C, h, w] → frames [n, 3, 8h, 8w] in [0, 1]: first 2 → 5, then 1 → 4."""
        weight = cast("nn.Conv2d", self.decoder[1]).weight
        return self.decode_clip(latents.to(weight.dtype)[None], memory)[0]

    def _run(self, layers: nn.Sequential, clip: Tensor, memory: VaeMemory) -> Tensor:
        """clip [B, T, C, H, W] through the layers; reads and renews the memory."""
        batch = clip.shape[0]
        x = clip.flatten(0, 1)
        index = 0
        if not memory.last:
            memory.last = [None] * sum(isinstance(layer, MemBlock) for layer in layers)
        for layer in layers:
            if isinstance(layer, MemBlock):
                x, memory.last[index] = layer(x, batch, memory.last[index])
                index += 1
            else:
                x = layer(x)
        return x.unflatten(0, (batch, -1))


def to_pixels(frames: Tensor) -> Tensor:
    """Float frames in [0, 1] → uint8, rounded."""
    return frames.float().mul(255).round_().clamp_(0, 255).to(torch.uint8)
