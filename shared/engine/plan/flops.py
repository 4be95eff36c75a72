"""How much arithmetic a latent frame costs, from the spec alone: what the hardware's floor and a capacity plan start from.

A multiply-add counts as two floating-point operations. Only matrix products, convolutions and attention are counted: the
rest is bound by memory, not arithmetic. The counts are those of the published networks in their steady state: a full
ring, four pixel frames per latent frame, the prompt's keys and values made once and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.engine.plan.spec import FRAMES_PER_LATENT, PATCH, VAE_STRIDE, ModelSpec, VaeKind

# The Wan autoencoder's sizes, which no spec varies.
WAN_WIDTHS = (96, 192, 384, 384)
WAN_TIMES = (False, True, True)
WAN_BLOCKS = 2


@dataclass(frozen=True, slots=True)
class VaeFlops:
    """Floating-point operations per latent frame."""

    encode: float
    decode: float


def step_flops(spec: ModelSpec, width: int, height: int, *, blocks: int | None = None) -> float:
    """Of one denoising step of one latent frame of width × height pixels, attending to a full ring.

    ``blocks`` of the model's layers count (default: all, with the patch embedding and the head).
    """
    tokens, dim = spec.tokens(width, height), spec.dim
    patch = PATCH * PATCH * spec.latent_channels
    linear = 2 * tokens * (6 * dim * dim + 2 * dim * spec.ffn_dim)
    attention = 4 * tokens * dim * (spec.ring * tokens + spec.text_len)
    layers = float(linear + attention)
    if blocks is not None:
        return blocks * layers
    times = 2 * (spec.freq_dim * dim + 7 * dim * dim)
    # A path past the blocks is a 3×3 convolution of the latents; there is a gate for each of its values, and the head's.
    paths = spec.gated_paths and 2 * tokens * patch * (spec.gated_paths * (9 * spec.latent_channels + dim) + dim)
    cell = spec.cell_dim * 2 * (9 * spec.latent_channels + dim + spec.cell_dim + spec.latent_channels)
    cells = 2 * tokens * PATCH * PATCH * cell
    return spec.layers * layers + 2 * 2 * tokens * patch * dim + times + paths + cells


def prompt_flops(spec: ModelSpec) -> float:
    """Of one prompt: the text projection and every layer's cross-attention keys and values."""
    dim = spec.dim
    return 2.0 * spec.text_len * (spec.text_dim * dim + dim * dim + spec.layers * 2 * dim * dim)


def vae_flops(spec: ModelSpec, width: int, height: int) -> VaeFlops:
    """Of encoding and decoding one latent frame with the spec's autoencoder."""
    rows, columns = spec.latent_size(width, height)
    full_encoder = spec.vae in (VaeKind.WAN, VaeKind.MIXED)
    encode = _wan_encode(rows, columns) if full_encoder else _tiny_encode(spec, rows * columns)
    decode = _wan_decode(rows, columns) if spec.vae == VaeKind.WAN else _tiny_decode(spec, rows * columns)
    return VaeFlops(encode, decode)


def _conv(cells: float, kernel: int, n_in: int, n_out: int) -> float:
    """A convolution of ``kernel`` taps that makes ``cells`` values in each of n_out channels."""
    return 2.0 * cells * kernel * n_in * n_out


def _tiny_encode(spec: ModelSpec, latent_cells: int) -> float:
    w, frames = spec.vae_encoder_width, FRAMES_PER_LATENT
    cells = latent_cells * VAE_STRIDE**2
    total = _conv(cells * frames, 9, 3, w)
    for stride in (2, 2, 1):
        frames //= stride
        total += _conv(cells * frames, 1, stride * w, w)
        cells //= 4
        total += _conv(cells * frames, 9, w, w) + 3 * _mem_block(cells * frames, w)
    return total + _conv(cells, 9, w, spec.latent_channels)


def _tiny_decode(spec: ModelSpec, latent_cells: int) -> float:
    widths, cells, frames = spec.vae_widths, latent_cells, 1
    total = _conv(cells, 9, spec.latent_channels, widths[0])
    if spec.vae_shortcut:
        total += _conv(cells, 9, spec.latent_channels, 3 * VAE_STRIDE**2 * FRAMES_PER_LATENT)
    for wide, narrow, stride in zip(widths[:3], widths[1:4], (1, 2, 2), strict=True):
        total += 3 * _mem_block(cells * frames, wide)
        cells *= 4
        total += _conv(cells * frames, 1, wide, wide * stride)
        frames *= stride
        total += _conv(cells * frames, 9, wide, narrow)
    return total + _conv(cells * frames, 9, widths[3], 3)


def _mem_block(cells: float, width: int) -> float:
    return _conv(cells, 9, 2 * width, width) + 2 * _conv(cells, 9, width, width)


def _wan_residual(cells: float, n_in: int, n_out: int) -> float:
    shortcut = _conv(cells, 1, n_in, n_out) if n_in != n_out else 0.0
    return _conv(cells, 27, n_in, n_out) + _conv(cells, 27, n_out, n_out) + shortcut


def _wan_middle(cells: int, width: int) -> float:
    attention = _conv(cells, 1, width, 3 * width) + _conv(cells, 1, width, width) + 4.0 * cells * cells * width
    return 2 * _wan_residual(cells, width, width) + attention


def _wan_encode(rows: int, columns: int) -> float:
    cells, frames, width = rows * columns * VAE_STRIDE**2, FRAMES_PER_LATENT, WAN_WIDTHS[0]
    total = _conv(cells * frames, 27, 3, width)
    for level, wide in enumerate(WAN_WIDTHS):
        for _ in range(WAN_BLOCKS):
            total += _wan_residual(cells * frames, width, wide)
            width = wide
        if level < len(WAN_TIMES):
            cells //= 4
            total += _conv(cells * frames, 9, width, width)
            if WAN_TIMES[level]:
                frames //= 2
                total += _conv(cells * frames, 3, width, width)
    channels = 32
    return total + _wan_middle(cells, width) + _conv(cells, 27, width, channels) + _conv(cells, 1, channels, channels)


def _wan_decode(rows: int, columns: int) -> float:
    cells, frames, channels, width = rows * columns, 1, 16, WAN_WIDTHS[-1]
    total = _conv(cells, 1, channels, channels) + _conv(cells, 27, channels, width) + _wan_middle(cells, width)
    for level, wide in enumerate(reversed(WAN_WIDTHS)):
        for _ in range(WAN_BLOCKS + 1):
            total += _wan_residual(cells * frames, width, wide)
            width = wide
        if level < len(WAN_TIMES):
            if WAN_TIMES[::-1][level]:
                total += _conv(cells * frames, 3, width, 2 * width)
                frames *= 2
            cells *= 4
            total += _conv(cells * frames, 9, width, width // 2)
            width //= 2
    return total + _conv(cells * frames, 27, width, 3)
