"""The tiny autoencoder rearranged for serving: the same function as :class:`TinyVae`, about twice as fast on a CPU.

What changes is the order of sums, nothing else (outputs agree to about 1e-6 in float32):

* a time pool or grow (1×1) and the 3×3 convolution next to it are one linear map: one kernel;
* enlarging by two and convolving is a convolution at the small size that makes the four pixels of each cell;
* a MemBlock's first convolution of [x, previous frame] is a sum of two. The stream keeps the second one's result instead of
  the frame, so nothing is concatenated;
* a MemBlock whose last kernel is zero adds a constant, and a channel that is always zero is left out: a linear encoder
  (rheo-tiny's) then costs three convolutions;
* everything is channels-last, and large pictures go one frame at a time, to stay in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from shared.engine.model.tiny_vae import FRAMES, LEAD, MemBlock, TGrow, TinyVae, TPool, VaeMemory, cells_to_frames


@dataclass(frozen=True, slots=True)
class _Conv:
    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor, stride: int = 1) -> Tensor:
        return fn.conv2d(x, self.weight, self.bias, stride=stride, padding=1)


@dataclass(frozen=True, slots=True)
class _Memory:
    """A MemBlock: ``now`` and ``before`` convolve the frame for itself and for the frame that follows it."""

    now: _Conv
    before: _Conv
    middle: _Conv
    last: _Conv

    def __call__(self, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [T, C, h, w], kept [1, C, h, w] or None → (y, what the next call needs)."""
        y, passed = self.now(x), self.before(x)
        if kept is not None:
            y[:1] += kept
        if len(x) > 1:
            y[1:] += passed[:-1]
        y = self.last(self.middle(y.relu_()).relu_())
        return y.add_(x).relu_(), passed[-1:]


@dataclass(frozen=True, slots=True)
class _Shift:
    """A MemBlock whose last kernel is zero: ReLU(x + bias), whatever came before. ``bias`` None: x is above zero already."""

    bias: Tensor | None

    def __call__(self, x: Tensor, kept: Tensor | None) -> tuple[Tensor, None]:
        """x [T, C, h, w] → (y, nothing to keep)."""
        return (x if self.bias is None else x.add_(self.bias).relu_()), None


class ServingTinyVae:
    """Encodes and decodes streams with the weights of a :class:`TinyVae`. Holds no state; for inference only."""

    def __init__(self, vae: TinyVae, decoder_dtype: torch.dtype | None = None) -> None:
        """``decoder_dtype``: the decoder's, if not that of ``vae``."""
        with torch.no_grad():
            encoder, decoder = list(vae.encoder), list(vae.decoder)
            self._enter = _conv(encoder[0])
            self._pools = [_pooling(encoder[i], encoder[i + 1]) for i in (2, 7, 12)]
            self._encoder = [[_block(encoder[i + k], k > 0) for k in range(3)] for i in (4, 9, 14)]
            self._leave = _conv(encoder[17])
            self._leave_out_dead_channels()
            self.dtype = self._enter.weight.dtype
            self.decoder_dtype = decoder_dtype or self.dtype
            vae.decoder.to(self.decoder_dtype)
            self._begin = _conv(decoder[1])
            self._decoder = [[_block(decoder[i + k], k > 0) for k in range(3)] for i in (3, 9, 15)]
            self._grows = [_growing(decoder[i], decoder[i + 1]) for i in (7, 13, 19)]
            self._end = _cellwise(decoder[22])
            self._shortcut = None if vae.shortcut is None else _conv(vae.shortcut.to(self.decoder_dtype))
        self.latent_channels = vae.latent_channels

    def _leave_out_dead_channels(self) -> None:
        """Of the encoder: what no kernel and no bias ever raises above zero is neither computed nor read."""
        alive = _alive([self._enter], self._enter.bias)
        self._enter = _outputs(self._enter, alive)
        for level, blocks in enumerate(self._encoder):
            pool = [_inputs(conv, alive) for conv in self._pools[level]]
            if all(isinstance(block, _Shift) for block in blocks):
                shifts = [block.bias for block in blocks if isinstance(block, _Shift) and block.bias is not None]
                alive = _alive(pool, torch.stack(shifts).amax(0).flatten())
                pool = [_outputs(conv, alive) for conv in pool]
                self._encoder[level] = [
                    _Shift(None if block.bias is None else block.bias[alive])
                    for block in blocks
                    if isinstance(block, _Shift)
                ]
            else:
                alive = torch.ones(len(pool[0].weight), dtype=torch.bool)
            self._pools[level] = pool
        self._leave = _inputs(self._leave, alive)

    def new_memory(self) -> VaeMemory:
        """One direction's memory of one stream, empty."""
        return VaeMemory()

    @torch.inference_mode()
    def encode(self, memory: VaeMemory, frames: Tensor) -> Tensor:
        """frames [n, 3, H, W] (uint8, or float in [0, 1]) → latents [m, C, H/8, W/8]: first 5 → 2, then 4 → 1.

        Raises ValueError for a number of frames that fits neither.
        """
        count = len(frames)
        if frames.dtype == torch.uint8:
            frames = frames.to(self.dtype).div_(255)
        if count % FRAMES == 1 and not memory.started:
            frames = torch.cat([frames[:1].expand(LEAD, -1, -1, -1), frames])
        elif count % FRAMES:
            raise ValueError(f"{count} frames: a clip has 4n frames, or 4n + 1 where it starts")
        memory.started = True
        kept = _recall(memory, 9)
        x = frames.to(self.dtype)
        for level, (pool, blocks) in enumerate(zip(self._pools, self._encoder, strict=True)):
            parts: list[Tensor] = []
            for first in range(0, len(x), len(pool)):
                pooled: Tensor | None = None
                for offset, conv in enumerate(pool):
                    frame = x[first + offset : first + offset + 1].contiguous(memory_format=torch.channels_last)
                    frame = self._enter(frame).relu_() if level == 0 else frame
                    part = conv(frame, 2)
                    pooled = part if pooled is None else pooled.add_(part)
                parts.append(cast("Tensor", pooled))
            x = torch.cat(parts)
            for k, block in enumerate(blocks):
                x, kept[3 * level + k] = block(x, kept[3 * level + k])
        return self._leave(x).contiguous()

    @torch.inference_mode()
    def decode(self, memory: VaeMemory, latents: Tensor) -> Tensor:
        """latents [m, C, h, w] → frames [n, 3, 8h, 8w] in [0, 1]: first 2 → 5, then 1 → 4."""
        kept = _recall(memory, 9)
        straight: Tensor | None = None
        if self._shortcut is not None:
            cells = latents.to(self.decoder_dtype).contiguous(memory_format=torch.channels_last)
            straight = cells_to_frames(self._shortcut(cells))
        x = (torch.tanh(latents / 3) * 3).to(self.decoder_dtype).contiguous(memory_format=torch.channels_last)
        x = self._begin(x).relu_()
        for level, blocks in enumerate(self._decoder):
            for k, block in enumerate(blocks):
                x, kept[3 * level + k] = block(x, kept[3 * level + k])
            if level < 2:
                grown = [_enlarge(conv(x)) for conv in self._grows[level]]
                x = torch.stack(grown, 1).flatten(0, 1) if len(grown) > 1 else grown[0]
                x = x.contiguous(memory_format=torch.channels_last)
        skipped = 0 if memory.started else LEAD
        memory.started = True
        frames: list[Tensor] = []
        for index in range(skipped, len(x) * len(self._grows[2])):
            frame, grow = divmod(index, len(self._grows[2]))
            cells = self._grows[2][grow](x[frame : frame + 1]).relu_()
            frames.append(_enlarge(self._end(cells)))
        made = torch.cat(frames)
        if straight is not None:
            made += straight[skipped:]
        return made.clamp_(0, 1)

    def encode_clip(self, video: Tensor) -> Tensor:
        """Whole clips from their start: [B, T, 3, H, W] → [B, n, C, H/8, W/8]."""
        return torch.stack([self.encode(self.new_memory(), clip) for clip in video])

    def decode_clip(self, latents: Tensor) -> Tensor:
        """Whole clips from their start: [B, n, C, h, w] → [B, 4n − 3, 3, 8h, 8w]."""
        return torch.stack([self.decode(self.new_memory(), clip) for clip in latents])


def _recall(memory: VaeMemory, blocks: int) -> list[Tensor | None]:
    if not memory.last:
        memory.last = [None] * blocks
    return memory.last


def _packed(weight: Tensor) -> Tensor:
    return weight.detach().clone(memory_format=torch.channels_last)


def _conv(layer: nn.Module) -> _Conv:
    conv = cast("nn.Conv2d", layer)
    return _Conv(_packed(conv.weight), None if conv.bias is None else conv.bias.detach().clone())


def _alive(kernels: list[_Conv], bias: Tensor | None) -> Tensor:
    """Which outputs [n] may ever be above zero, when a ReLU follows."""
    alive = torch.stack([conv.weight.flatten(1).any(1) for conv in kernels]).any(0)
    return alive if bias is None else alive | (bias > 0)


def _outputs(conv: _Conv, which: Tensor) -> _Conv:
    return _Conv(_packed(conv.weight[which]), None if conv.bias is None else conv.bias[which])


def _inputs(conv: _Conv, which: Tensor) -> _Conv:
    return _Conv(_packed(conv.weight[:, which]), conv.bias)


def _block(layer: nn.Module, follows_relu: bool) -> _Memory | _Shift:
    last = cast("nn.Conv2d", cast("MemBlock", layer).conv[4])
    if last.weight.any() or last.bias is None:
        return _memory(layer)
    if follows_relu and not last.bias.any():
        return _Shift(None)
    return _Shift(last.bias.detach().clone().reshape(-1, 1, 1))


def _memory(layer: nn.Module) -> _Memory:
    block = cast("MemBlock", layer)
    first, middle, last = (cast("nn.Conv2d", block.conv[i]) for i in (0, 2, 4))
    now, before = first.weight.chunk(2, 1)
    bias = cast("Tensor", first.bias).detach().clone()
    return _Memory(_Conv(_packed(now), bias), _Conv(_packed(before)), _conv(middle), _conv(last))


def _pooling(pool: nn.Module, conv: nn.Module) -> list[_Conv]:
    """Per frame that the pool folds: the kernel of stride 2 that takes it to the pooled picture."""
    mix = cast("TPool", pool).conv.weight[..., 0, 0]
    weight = cast("nn.Conv2d", conv).weight
    parts = mix.chunk(cast("TPool", pool).stride, 1)
    return [
        _Conv(_packed(torch.einsum("ncij,cd->ndij", weight.float(), part.float()).to(weight.dtype))) for part in parts
    ]


def _growing(grow: nn.Module, conv: nn.Module) -> list[_Conv]:
    """Per frame that the grow makes: a kernel at the small size whose channels are (2, 2, n), the pixels of a cell."""
    mix = cast("TGrow", grow).conv.weight[..., 0, 0]
    weight = cast("nn.Conv2d", conv).weight
    kernels: list[_Conv] = []
    for part in mix.split(cast("TGrow", grow).channels, 0):
        whole = torch.einsum("ncij,cd->ndij", weight.float(), part.float())
        cells = whole.new_zeros(2, 2, *whole.shape)
        for a, b, i, j in _taps():
            # Pixel 2y + a + i − 1 of the enlarged picture is cell y + ⌊(a + i − 1)/2⌋ of the small one.
            cells[a, b, :, :, (a + i - 1) // 2 + 1, (b + j - 1) // 2 + 1] += whole[:, :, i, j]
        kernels.append(_Conv(_packed(cells.flatten(0, 2).to(weight.dtype))))
    return kernels


def _cellwise(layer: nn.Module) -> _Conv:
    """The kernel that works on cells: channels (2, 2, n) in, (2, 2, m) out."""
    conv = cast("nn.Conv2d", layer)
    m, n = conv.weight.shape[:2]
    cells = conv.weight.new_zeros(2, 2, m, 2, 2, n, 3, 3)
    for a, b, i, j in _taps():
        row, column = a + i - 1, b + j - 1
        cells[a, b, :, row % 2, column % 2, :, row // 2 + 1, column // 2 + 1] = conv.weight[:, :, i, j]
    bias = cast("Tensor", conv.bias).detach().repeat(4)
    return _Conv(_packed(cells.flatten(0, 2).flatten(1, 3)), bias)


def _taps() -> list[tuple[int, int, int, int]]:
    return [(a, b, i, j) for a in range(2) for b in range(2) for i in range(3) for j in range(3)]


def _enlarge(cells: Tensor) -> Tensor:
    """[T, 4·n, h, w] with channels (2, 2, n) → [T, n, 2h, 2w]."""
    t, c, h, w = cells.shape
    pixels = cells.permute(0, 2, 3, 1).reshape(t, h, w, 2, 2, c // 4).permute(0, 1, 3, 2, 4, 5)
    return pixels.reshape(t, 2 * h, 2 * w, c // 4).permute(0, 3, 1, 2)
