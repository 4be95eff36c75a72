"""What the rest of the system must know about a model: sizes, steps, cache and noise constants. Imports no torch.

A model of our own lives in a folder ``<name>/`` with ``spec.json`` (this dataclass), ``dit.safetensors``,
``vae.safetensors`` and ``text.safetensors``. The presets below describe the published models, whose files keep their own
names (:mod:`shared.engine.plan.model_parts`), and the embedded one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

VAE_STRIDE = 8
"""Pixels per latent cell, along both sides, of every supported autoencoder."""
PATCH = 2
"""Latent cells per token, along both sides (the DiT's patch is 1×2×2)."""
FRAMES_PER_LATENT = 4
"""Pixel frames per latent frame; a stream's first latent frame holds one pixel frame instead."""


UMT5 = "umt5"
"""``text`` of models that read prompts with the UMT5-XXL encoder."""


class VaeKind(StrEnum):
    """Which autoencoder a model is served with."""

    WAN = "wan"  # the full causal 3D network, both ways
    TAEHV = "taehv"  # the tiny one, both ways
    MIXED = "wan+taehv"  # the full encoder, the tiny decoder: what the public code does with TAEHV


class Prediction(StrEnum):
    """What the DiT's last layer gives for x_t."""

    FLOW = "flow"  # v, with x0 = x_t − σ·v: the published models
    X0 = "x0"  # the clean latents themselves: for a DiT too narrow to carry the noise through (docs/adr/0013)


class SpecError(ValueError):
    """A model's spec does not hold together; the message names the field."""


class UnknownModelError(SpecError):
    """There is no preset of this name; the message lists the known ones."""


@dataclass(frozen=True, slots=True)
class NoiseSpec:
    """Constants of the noise controller.

    Both forms smooth: s = ``smoothing``·target + (1 − ``smoothing``)·s_prev. Pixel form: target = ``s0`` − ``gain``·d̂,
    d̂ = clamp(d / ``pixel_full``, 0, 1). Latent form: target = ``s_max`` − (``s_max`` − ``s_min``)·d̂, where d̂ comes from
    the last ``latent_window`` latent differences over ``latent_full``.
    The first timestep is int(1000·s) − ``first_step_margin``. Below ``still_below`` of d̂ the noise stands still as well:
    every frame has that of latent frame 0 (0: never).
    """

    s0: float = 0.8
    gain: float = 0.1
    pixel_full: float = 0.2
    smoothing: float = 0.9
    s_max: float = 0.8
    s_min: float = 0.7
    latent_window: int = 4
    latent_full: float = 0.2
    first_step_margin: int = 100
    still_below: float = 0.0

    def still(self, motion: float) -> bool:
        """Whether a chunk of this d̂ keeps the noise of the chunks before it."""
        return motion < self.still_below


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One causal video model: the DiT, its cache, its steps and its autoencoder.

    Sizes are in tokens and channels; ``ring``, ``sinks`` and ``rope_refresh_at`` (0: never) in latent frames; ``steps``
    are nominal timesteps (0…1000) of which a stream of K steps takes the first K; ``text_steps`` replaces them for a stream
    without a source, which starts from pure noise (empty: ``steps``; read them as :attr:`steps_from_text`).
    ``sink_threshold`` None switches adaptive sinks off. ``rerotate`` moves the rotation of cached keys at a RoPE refresh.
    ``prediction`` (a :class:`Prediction`) is what the last layer gives; ``gated_paths`` is how many linear ways there are
    past the blocks (docs/adr/0028), ``cell_dim`` the hidden channels of the MLP over cells behind them (docs/adr/0029).
    ``steadying`` is how much of each frame shown comes from the one before, where the source only moved (docs/adr/0031).

    The autoencoder (``vae``, a :class:`VaeKind`; change it by :meth:`with_vae`): the decoder's input is z·``latent_scale`` +
    ``latent_shift``; the encoder's latents are normalised by the same two if ``encoder_normalised``, and become
    z·``encoder_scale`` + ``encoder_shift`` if those are given. Empty tuples: no change. ``vae_shortcut``: the tiny decoder has
    a linear part beside it.
    """

    name: str
    dim: int
    ffn_dim: int
    layers: int
    heads: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    latent_channels: int = 16
    ring: int = 6
    sinks: int = 3
    sink_threshold: float | None = 0.2
    rope_refresh_at: int = 50
    rerotate: bool = True
    sigma_shift: float = 8.0
    prediction: str = Prediction.FLOW
    gated_paths: int = 0
    cell_dim: int = 0
    steadying: float = 0.0
    steps: tuple[int, ...] = (700, 500, 400, 200)
    text_steps: tuple[int, ...] = ()
    noise: NoiseSpec = field(default_factory=NoiseSpec)
    vae: str = "taehv"
    vae_widths: tuple[int, ...] = (256, 128, 64, 64)
    vae_encoder_width: int = 64
    vae_shortcut: bool = False
    encoder_normalised: bool = False
    latent_scale: tuple[float, ...] = ()
    latent_shift: tuple[float, ...] = ()
    encoder_scale: tuple[float, ...] = ()
    encoder_shift: tuple[float, ...] = ()
    text: str = UMT5
    default_width: int = 832
    default_height: int = 480
    default_fps: int = 16

    def __post_init__(self) -> None:
        """Refuse what no forward could run; the error names the field."""
        if self.heads <= 0 or self.dim % self.heads:
            raise SpecError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.head_dim % 2:
            raise SpecError(f"head_dim {self.head_dim} must be even: RoPE turns pairs")
        if not 0 <= self.sinks < self.ring:
            raise SpecError(f"sinks {self.sinks} must be in 0…ring−1 = {self.ring - 1}")
        if self.rope_refresh_at and self.rope_refresh_at < self.ring:
            raise SpecError(f"rope_refresh_at {self.rope_refresh_at} is less than ring {self.ring}")
        if not self.steps or any(not 0 < t <= 1000 for t in self.steps):
            raise SpecError(f"steps {self.steps} must be timesteps in 1…1000")
        if any(not 0 < t <= 1000 for t in self.text_steps):
            raise SpecError(f"text_steps {self.text_steps} must be timesteps in 1…1000")
        if self.prediction not in list(Prediction):
            raise SpecError(f"prediction {self.prediction!r} is none of {', '.join(Prediction)}")
        for name in ("gated_paths", "cell_dim"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name} {getattr(self, name)} must be 0 or more")
        if not 0 <= self.steadying < 1:
            raise SpecError(f"steadying {self.steadying} must be in 0…1, below 1")
        if self.vae not in list(VaeKind):
            raise SpecError(f"vae {self.vae!r} is none of {', '.join(VaeKind)}")
        for name in ("latent_scale", "latent_shift", "encoder_scale", "encoder_shift"):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise SpecError(f"{name} must be empty or hold one value per latent channel ({self.latent_channels})")

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.dim // self.heads

    @property
    def max_steps(self) -> int:
        """The largest K a stream may have."""
        return len(self.steps)

    @property
    def steps_from_text(self) -> tuple[int, ...]:
        """The steps of a stream that has no source: ``text_steps``, or ``steps`` for a model that has none."""
        return self.text_steps or self.steps

    def with_vae(self, kind: str) -> ModelSpec:
        """The same model with another autoencoder; ``auto`` keeps the spec's own. Raises SpecError for an unknown kind.

        The DiT keeps what it was trained on. The published Wan models take latents as the full encoder makes them and
        give normalised ones. TAEHV speaks normalised latents both ways: decoding needs no change then, and what its
        encoder makes is brought to the full encoder's scale.
        """
        if kind in ("auto", self.vae):
            return self
        if kind not in list(VaeKind):
            raise SpecError(f"autoencoder {kind!r} is none of auto, {', '.join(VaeKind)}")
        if self.text != UMT5:
            raise SpecError(
                f"{self.name} has an autoencoder of its own ({self.vae}); only Wan 2.1 models have a choice"
            )
        full, tiny = VaeKind.WAN, VaeKind.TAEHV
        return replace(
            self,
            vae=kind,
            latent_scale=_WAN_SCALE if kind == full else (),
            latent_shift=_WAN_SHIFT if kind == full else (),
            encoder_scale=_WAN_SCALE if kind == tiny and not self.encoder_normalised else (),
            encoder_shift=_WAN_SHIFT if kind == tiny and not self.encoder_normalised else (),
        )

    def latent_size(self, width: int, height: int) -> tuple[int, int]:
        """(latent height, latent width) of a picture in pixels; both sides must be multiples of 16."""
        cell = VAE_STRIDE * PATCH
        if width <= 0 or height <= 0 or width % cell or height % cell:
            raise SpecError(f"{width}×{height} pixels: both sides must be positive multiples of {cell}")
        return height // VAE_STRIDE, width // VAE_STRIDE

    def tokens(self, width: int, height: int) -> int:
        """DiT tokens of one latent frame of a picture of this size in pixels."""
        rows, columns = self.latent_size(width, height)
        return (rows // PATCH) * (columns // PATCH)

    def kv_bytes(self, width: int, height: int, *, bytes_per_value: int = 2) -> int:
        """Bytes of one slot's KV cache in one DiT block."""
        return 2 * self.ring * self.tokens(width, height) * self.dim * bytes_per_value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def to_json(self, path: Path | str) -> None:
        """Write ``spec.json``."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """The inverse of :meth:`to_dict`. Raises SpecError naming an unknown or missing field."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise SpecError(f"unknown fields in the model's spec: {', '.join(unknown)}")
        if missing := [n for n in ("name", "dim", "ffn_dim", "layers", "heads") if n not in values]:
            raise SpecError(f"fields missing in the model's spec: {', '.join(missing)}")
        plain: dict[str, Any] = {}
        for key, value in values.items():
            plain[key] = tuple(cast("list[Any]", value)) if isinstance(value, list) else value
        noise = plain.get("noise")
        if isinstance(noise, Mapping):
            try:
                plain["noise"] = NoiseSpec(**cast("Mapping[str, Any]", noise))
            except TypeError as error:
                raise SpecError(f"noise in the model's spec: {error}") from None
        return cls(**plain)

    @classmethod
    def from_json(cls, path: Path | str) -> ModelSpec:
        """Read ``spec.json``. Raises SpecError for a file that is not a spec."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise SpecError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise SpecError(f"{path} holds no JSON object")
        return cls.from_dict(cast("dict[str, Any]", values))


# Mean and deviation of the Wan 2.1 autoencoder's latents, per channel.
_WAN_LATENTS = (
    *((-0.7571, 2.8184), (-0.7089, 1.4541), (-0.9113, 2.3275), (0.1075, 2.6558)),
    *((-0.1745, 1.2196), (0.9653, 1.7708), (-0.1517, 2.6052), (1.5508, 2.0743)),
    *((0.4134, 3.2687), (-0.0715, 2.1526), (0.5517, 2.8652), (-0.3632, 1.5579)),
    *((-0.1922, 1.6382), (-0.9497, 1.1253), (0.2503, 2.8251), (-0.2921, 1.9160)),
)
_WAN_SHIFT = tuple(mean for mean, _ in _WAN_LATENTS)
_WAN_SCALE = tuple(deviation for _, deviation in _WAN_LATENTS)
_WAN_SMALL = ModelSpec(
    name="wan2.1-1.3b",
    dim=1536,
    ffn_dim=8960,
    layers=30,
    heads=12,
    text_steps=(1000, 750, 500, 250),
    vae=VaeKind.WAN.value,
    latent_scale=_WAN_SCALE,
    latent_shift=_WAN_SHIFT,
)
_WAN_LARGE = replace(_WAN_SMALL, name="wan2.1-14b", dim=5120, ffn_dim=13824, layers=40, heads=40)


def _fast(spec: ModelSpec) -> ModelSpec:
    """The public fast profile: a short ring with fixed sinks, TAEHV behind the full encoder."""
    fast = replace(spec, name=f"{spec.name}-fast", ring=5, sinks=2, sink_threshold=None)
    return fast.with_vae(VaeKind.MIXED)


_TINY = ModelSpec(
    name="rheo-tiny",
    dim=256,
    ffn_dim=1024,
    layers=6,
    heads=4,
    freq_dim=64,
    text_dim=128,
    text_len=16,
    latent_channels=48,
    prediction=Prediction.X0,
    gated_paths=2,
    cell_dim=256,
    steadying=0.5,
    steps=(400, 150, 100, 50),
    noise=NoiseSpec(s0=0.5, gain=0.1, s_max=0.5, s_min=0.4, latent_full=1.6, still_below=0.5),
    vae="taehv",
    vae_widths=(96, 48, 16, 16),
    vae_encoder_width=48,
    vae_shortcut=True,
    text="rheo-tiny",
    default_width=320,
    default_height=192,
    default_fps=24,
)

PRESETS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _WAN_SMALL,
        _fast(_WAN_SMALL),
        _WAN_LARGE,
        _fast(_WAN_LARGE),
        _TINY,
        # Small enough for a unit test to run many forwards of it.
        replace(
            _TINY,
            name="nano",
            dim=64,
            ffn_dim=128,
            layers=3,
            freq_dim=32,
            text_dim=48,
            latent_channels=16,
            prediction=Prediction.FLOW,
            gated_paths=0,
            cell_dim=0,
            steadying=0.0,
            steps=(700, 500, 400, 200),
            noise=NoiseSpec(),
            vae_widths=(16, 8, 8, 8),
            vae_encoder_width=8,
            vae_shortcut=False,
            default_width=96,
            default_height=64,
        ),
    )
}


def spec_of(name: str) -> ModelSpec:
    """The preset of this name. Raises UnknownModelError that lists the known names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise UnknownModelError(f"no model {name!r}; known: {', '.join(sorted(PRESETS))}") from None
