"""What a row of the engine's bench asks, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from shared.engine.plan.spec import ModelSpec, SpecError, spec_of

VAES = ("own", "wan", "taehv", "tiny")


@dataclass(frozen=True, slots=True)
class Setting:
    """One row's question."""

    model: str
    width: int
    height: int
    steps: int
    streams: int
    stages: int
    vae: str
    dtype: str
    threads: int
    device: str
    compiled: bool = False

    @property
    def items(self) -> int:
        """Latent frame-steps in one forward."""
        return self.steps * self.streams


@dataclass(frozen=True, slots=True)
class Figures:
    """One row's answer, in milliseconds per latent frame unless said otherwise.

    ``forward`` is one lock-step batch of streams × K items through all stages, ``step`` that per item, ``stage_ms`` each
    stage's share of the forward. ``fps`` counts the frames of all streams when encode, forward and decode run one after
    the other; ``pipelined_fps`` when each has a device of its own. ``share``, ``encode_share`` and ``decode_share`` are floors
    over medians. Memory in MiB: ``kv_mib`` and ``vae_mib`` (both directions) of one stream, ``peak_mib`` of
    the device (CUDA: allocated at most; CPU: resident now).
    """

    encode: float
    forward: float
    step: float
    decode: float
    stage_ms: tuple[float, ...]
    fps: float
    pipelined_fps: float
    least_encode: float
    least_forward: float
    least_decode: float
    floor_step: float
    share: float
    encode_share: float
    decode_share: float
    weights_mib: float
    kv_mib: float
    vae_mib: float
    peak_mib: float


def spec_for(setting: Setting) -> ModelSpec:
    """The model's spec with the autoencoder asked for. Raises SpecError."""
    spec = spec_of(setting.model)
    if setting.vae not in VAES:
        raise SpecError(f"no autoencoder {setting.vae!r}; known: {', '.join(VAES)}")
    if setting.steps > spec.max_steps:
        raise SpecError(f"{setting.model} has at most {spec.max_steps} steps, not {setting.steps}")
    if setting.vae == "own":
        return spec
    if setting.vae == "wan":
        return replace(spec, vae="wan")
    like = spec_of("rheo-tiny" if setting.vae == "tiny" else "wan2.1-1.3b-fast")
    return replace(
        spec,
        vae="taehv",
        vae_widths=like.vae_widths,
        vae_encoder_width=like.vae_encoder_width,
        vae_shortcut=like.vae_shortcut,
    )
