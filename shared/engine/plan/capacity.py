"""How many streams a group of devices serves: the arithmetic of ``rheocast plan``, and of a simulated worker. Pure.

A group is one pipeline: encode, the DiT blocks and decode in their order, cut into as many contiguous parts as it has
devices so that the slowest part is as fast as it can be. That part alone sets the rate. In the steady state the steps of a
latent frame share forwards, so a block's fixed cost is paid once per latent frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shared.engine.plan.devices import DeviceProfile, LayerTimes
from shared.engine.plan.spec import FRAMES_PER_LATENT, PATCH, VAE_STRIDE, ModelSpec, VaeKind

MEMORY_SHARE = 0.9  # of a device's memory: the rest is activations and fragments
GIB = 1 << 30
# Values that the Wan autoencoder keeps per pixel of the picture, both ways: two frames before each causal convolution.
WAN_CACHE_PER_PIXEL = 2 * (96 * 12 + 192 * 10 / 4 + 384 * 10 / 16 + 384 * 12 / 64)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one group does. ``part_ms`` is each device's time per latent frame; ``slowest`` names its heaviest layers."""

    part_ms: tuple[float, ...]
    slowest: str
    total_fps: float
    single_stream_fps: float
    streams_by_speed: int
    streams_by_memory: int
    weights_gib: float
    stream_gib: float

    @property
    def streams(self) -> int:
        """Streams that fit: by speed and by memory."""
        return min(self.streams_by_speed, self.streams_by_memory)


def group_capacity(
    spec: ModelSpec, width: int, height: int, fps: float, steps: int, device: DeviceProfile, devices: int
) -> Capacity:
    """Of a group of ``devices`` that serves streams of this kind. Raises DeviceError for a model that it does not know.

    Raises ValueError for sizes, rates and counts that are not positive.
    """
    if fps <= 0 or steps < 1 or devices < 1:
        raise ValueError(f"{fps} fps, {steps} steps, {devices} devices: all must be above zero")
    times = device.times(spec, width, height)
    layers = layer_list(times, steps)
    bounds = cut(layers, devices)
    parts = tuple(sum(layers[start:end]) for start, end in zip([0, *bounds], [*bounds, len(layers)], strict=True))
    worst = max(range(devices), key=lambda part: parts[part])
    per_second = 1000.0 / parts[worst] * device.system_share
    total = per_second * FRAMES_PER_LATENT
    weights = weight_bytes(spec, device.value_bytes)
    stream = stream_bytes(spec, width, height, steps, device.value_bytes)
    room = devices * device.memory_gib * GIB * MEMORY_SHARE - weights
    return Capacity(
        part_ms=parts,
        slowest=_holds(worst, [0, *bounds, len(layers)], len(layers)),
        total_fps=total,
        single_stream_fps=total * device.single_stream,
        streams_by_speed=math.floor(total / fps + 1e-9),
        streams_by_memory=max(0, math.floor(room / stream)),
        weights_gib=weights / GIB,
        stream_gib=stream / GIB,
    )


def layer_list(times: LayerTimes, steps: int) -> list[float]:
    """Encode, every block, decode: milliseconds per latent frame of a stream of K steps, in the order of the way."""
    block = times.block_fixed_ms + times.block_ms * steps
    return [times.encode_ms, *([block] * times.blocks), times.decode_ms]


def cut(layers: Sequence[float], parts: int) -> list[int]:
    """Where to cut so that the slowest of ``parts`` contiguous parts is as fast as possible: parts−1 indices, ascending.

    A part may stay empty when there are more parts than layers.
    """
    low, high = max(layers), sum(layers)
    for _ in range(60):
        middle = (low + high) / 2
        if len(_fill(layers, middle)) <= parts - 1:
            high = middle
        else:
            low = middle
    bounds = _fill(layers, high)
    return bounds + [len(layers)] * (parts - 1 - len(bounds))


def weight_bytes(spec: ModelSpec, value_bytes: int) -> int:
    """The DiT's weights; the text encoder and the autoencoder are elsewhere, or small beside them."""
    per_layer = 8 * spec.dim * spec.dim + 2 * spec.dim * spec.ffn_dim
    return value_bytes * (spec.layers * per_layer + 7 * spec.dim * spec.dim + _past_the_blocks(spec))


def _past_the_blocks(spec: ModelSpec) -> int:
    """Weights of the gated paths and of the MLP over cells (docs/adr/0028, 0029)."""
    near = 9 * spec.latent_channels
    cells = 2 * spec.cell_dim * (near + 6 * spec.dim + spec.cell_dim + spec.latent_channels)
    if not spec.gated_paths:
        return cells
    gates = 2 * (1 + spec.gated_paths) * PATCH * PATCH * spec.latent_channels * spec.dim
    return cells + gates + spec.gated_paths * near * spec.latent_channels


def stream_bytes(spec: ModelSpec, width: int, height: int, steps: int, value_bytes: int) -> float:
    """What a stream keeps on the group: a slot of KV per step and block, and the autoencoder's caches."""
    slots = spec.kv_bytes(width, height, bytes_per_value=value_bytes) * spec.layers * steps
    if spec.vae == VaeKind.TAEHV:
        # One frame before each of a level's three memory blocks.
        cells = width * height / VAE_STRIDE**2
        per_cell = 3 * sum(wide * 4**level for level, wide in enumerate(spec.vae_widths[:3]))
        return slots + value_bytes * cells * per_cell
    return slots + WAN_CACHE_PER_PIXEL * width * height * value_bytes


def _fill(layers: Sequence[float], limit: float) -> list[int]:
    """Cuts when each part takes layers until the next would pass the limit."""
    bounds: list[int] = []
    held = 0.0
    for index, layer in enumerate(layers):
        if held and held + layer > limit * (1 + 1e-12):
            bounds.append(index)
            held = 0.0
        held += layer
    return bounds


def _holds(part: int, edges: Sequence[int], layers: int) -> str:
    start, end = edges[part], edges[part + 1]
    named = ["encode"] if start == 0 and end > 0 else []
    blocks = min(end, layers - 1) - max(start, 1)
    named += [f"{blocks} DiT blocks"] if blocks > 0 else []
    named += ["decode"] if end == layers and start < end else []
    return " + ".join(named)
