"""Device profiles: what a device does a second, with the source of every figure. Plans and simulations start from them.

A profile has either efficiencies (the share of ``peak_tflops`` that the DiT and the autoencoder reach, fitted to published
totals) or ``measured`` times of one model, scaled by the picture's area. It says which figures it was fitted to and what
it then predicts of others, so that a reader can judge it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, cast

from shared.engine.plan.flops import step_flops, vae_flops
from shared.engine.plan.spec import ModelSpec

PROFILES = Path(__file__).with_name("devices.json")
TERA = 1e12


class DeviceError(ValueError):
    """A device that is not known, or not known for this model; one line that lists what is."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Milliseconds per latent frame of one model at one size; a forward costs ``forward_fixed_ms`` besides."""

    model: str
    width: int
    height: int
    encode_ms: float
    forward_fixed_ms: float
    step_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Milliseconds of one latent frame on one device: the layers that are placed, in their order.

    A forward over the blocks costs ``block_fixed_ms`` per block whatever its size, and ``block_ms`` per block and latent
    frame in it.
    """

    encode_ms: float
    block_ms: float
    block_fixed_ms: float
    blocks: int
    decode_ms: float

    def forward_ms(self, frames: float) -> float:
        """One forward of all blocks over ``frames`` latent frames."""
        return self.blocks * (self.block_fixed_ms + self.block_ms * frames)


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """One kind of device. ``group`` is how many of them make a pipeline when nobody says otherwise.

    ``single_stream`` is the share of a group's total that one stream alone reached (pipelines have bubbles then);
    ``system_share`` what the services leave of the engine's speed; ``hop_ms`` the way from one worker to the next.
    """

    name: str
    title: str
    kind: str
    memory_gib: float
    group: int
    fitted_to: tuple[str, ...]
    predicts: tuple[str, ...]
    sources: tuple[str, ...]
    peak_tflops: float = 0.0
    dit_efficiency: float = 0.0
    vae_efficiency: float = 0.0
    block_fixed_ms: float = 0.0
    single_stream: float = 1.0
    system_share: float = 1.0
    hop_ms: float = 1.0
    value_bytes: int = 2  # of a weight and of a cached value: 2 in bfloat16, 4 in float32
    measured: tuple[Measured, ...] = ()

    def times(self, spec: ModelSpec, width: int, height: int) -> LayerTimes:
        """What each layer of the model takes here. Raises DeviceError when this profile knows nothing of the model."""
        if self.measured:
            for known in self.measured:
                if known.model == spec.name:
                    area = spec.tokens(width, height) / spec.tokens(known.width, known.height)
                    return LayerTimes(
                        encode_ms=known.encode_ms * area,
                        block_ms=known.step_ms * area / spec.layers,
                        block_fixed_ms=known.forward_fixed_ms / spec.layers,
                        blocks=spec.layers,
                        decode_ms=known.decode_ms * area,
                    )
            names = ", ".join(sorted({known.model for known in self.measured}))
            raise DeviceError(f"device {self.name} was measured with {names} only, not with {spec.name}")
        vae = vae_flops(spec, width, height)
        dit = self.peak_tflops * TERA * self.dit_efficiency / 1000.0
        coder = self.peak_tflops * TERA * self.vae_efficiency / 1000.0
        return LayerTimes(
            encode_ms=vae.encode / coder,
            block_ms=step_flops(spec, width, height) / spec.layers / dit,
            block_fixed_ms=self.block_fixed_ms,
            blocks=spec.layers,
            decode_ms=vae.decode / coder,
        )


@cache
def device_profiles() -> Mapping[str, DeviceProfile]:
    """Every profile that ships, by name."""
    with PROFILES.open(encoding="utf-8") as file:
        plain = cast("dict[str, dict[str, Any]]", json.load(file))
    return {name: _profile(name, values) for name, values in plain.items()}


def device_profile(name: str) -> DeviceProfile:
    """The profile of this name. Raises DeviceError that lists the known ones."""
    profiles = device_profiles()
    if name not in profiles:
        raise DeviceError(f"no device {name!r}; known: {', '.join(sorted(profiles))}")
    return profiles[name]


def _profile(name: str, values: Mapping[str, Any]) -> DeviceProfile:
    known = {field.name for field in fields(DeviceProfile)}
    if unknown := sorted(set(values) - known):
        raise DeviceError(f"{PROFILES.name}, device {name}: unknown fields {', '.join(unknown)}")
    plain: dict[str, Any] = {}
    for key, value in values.items():
        plain[key] = tuple(cast("list[Any]", value)) if isinstance(value, list) else value
    plain["measured"] = tuple(Measured(**cast("dict[str, Any]", entry)) for entry in plain.get("measured", ()))
    return DeviceProfile(name=name, **plain)
