"""One setting of the engine measured: model × size × steps × streams × VAE × stages, dtype, threads, compiled or not."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch
from torch import Tensor

from bench.ceilings import Ceilings
from bench.lockstep import LockStep, timed
from shared.engine.model.autoencoder import Autoencoder
from shared.engine.model.loading import load_vae, random_vae_weights
from shared.engine.plan.flops import step_flops, vae_flops
from shared.engine.plan.registry import model_folder
from shared.engine.plan.spec import FRAMES_PER_LATENT, ModelSpec, SpecError, spec_of
from shared.engine.plan.split import split_blocks
from shared.engine.stage import Stage

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
    return replace(spec, vae="taehv", vae_widths=like.vae_widths, vae_encoder_width=like.vae_encoder_width)


def measure(setting: Setting, ticks: int, random_weights: bool, ceilings: Ceilings) -> Figures:
    """Run one setting."""
    torch.set_num_threads(setting.threads)
    spec, device, dtype = spec_for(setting), torch.device(setting.device), getattr(torch, setting.dtype)
    folder = model_folder(setting.model)
    random_weights = random_weights or setting.vae != "own" or not (folder / "dit.safetensors").exists()
    if not random_weights:
        spec = ModelSpec.from_json(folder / "spec.json")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    autoencoder = Autoencoder(
        load_vae(spec, _vae_weights(spec) if random_weights else folder, device, dtype), spec, device, dtype
    )
    encode, decode, vae_bytes = _autoencoder_ms(autoencoder, setting, ticks)

    ranges = split_blocks(spec.layers, setting.stages)
    if random_weights:
        stages = [Stage.random(spec, blocks, 0, device, dtype) for blocks in ranges]
    else:
        stages = [Stage.load(spec, folder, blocks, device, dtype) for blocks in ranges]
    if setting.compiled:
        for stage in stages:
            compile_blocks(stage)
    loop = LockStep(spec, stages, (setting.width, setting.height), setting.steps, setting.streams)
    warm = spec.ring + setting.steps + 2
    rows = [loop.tick() for _ in range(warm + ticks)][warm:]

    forwards = [sum(row) for row in rows]
    middle = (statistics.median(encode), statistics.median(forwards), statistics.median(decode))
    stage_ms = tuple(statistics.median(column) for column in zip(*rows, strict=True))
    shown = FRAMES_PER_LATENT * setting.streams * 1000
    held = [stage.memory() for stage in stages]
    floor = ceilings.floor_ms(step_flops(spec, setting.width, setting.height))
    vae = vae_flops(spec, setting.width, setting.height)
    slot = spec.layers * spec.kv_bytes(setting.width, setting.height, bytes_per_value=dtype.itemsize)
    return Figures(
        encode=middle[0],
        forward=middle[1],
        step=middle[1] / setting.items,
        decode=middle[2],
        stage_ms=stage_ms,
        fps=shown / (middle[1] + setting.streams * (middle[0] + middle[2])),
        pipelined_fps=shown / max(setting.streams * middle[0], *stage_ms, setting.streams * middle[2]),
        least_encode=min(encode),
        least_forward=min(forwards),
        least_decode=min(decode),
        floor_step=floor,
        share=floor * setting.items / middle[1],
        encode_share=ceilings.floor_ms(vae.encode) / middle[0],
        decode_share=ceilings.floor_ms(vae.decode) / middle[2],
        weights_mib=sum(m.weights for m in held) / 2**20,
        kv_mib=slot * setting.steps / 2**20,
        vae_mib=vae_bytes / 2**20,
        peak_mib=_peak_bytes(device) / 2**20,
    )


def compile_blocks(stage: Stage) -> None:
    """torch.compile, with fixed shapes, what a block computes around its cache: norms, cross-attention and MLP.

    The cache itself stays as it is: its places change with every forward.
    """
    for block in stage.layers:
        for part in (block.self_attn.norm_q, block.self_attn.norm_k, block.cross_attn, block.ffn):
            part.compile(dynamic=False)


def _autoencoder_ms(autoencoder: Autoencoder, setting: Setting, ticks: int) -> tuple[list[float], list[float], int]:
    """Milliseconds of encode and decode per chunk, and the bytes of one stream's two memories."""
    device = torch.device(setting.device)
    encoder, decoder = autoencoder.encoder_state(), autoencoder.decoder_state()
    encode: list[float] = []
    decode: list[float] = []
    for chunk in range(ticks + 2):
        frames = 5 if chunk == 0 else FRAMES_PER_LATENT
        pixels = torch.randint(0, 256, (frames, setting.height, setting.width, 3), dtype=torch.uint8)
        took, latents = timed(device, partial(autoencoder.encode, encoder, pixels))
        encode.append(took)
        decode.append(timed(device, partial(autoencoder.decode, decoder, latents))[0])
    return encode[2:], decode[2:], encoder.nbytes() + decoder.nbytes()


def _vae_weights(spec: ModelSpec) -> Mapping[str, Tensor]:
    if spec.vae != "wan":
        return random_vae_weights(spec)
    # The published size: only weights know it, no spec does.
    from shared.engine.model.wan_vae import AutoencoderKLWan

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoencoderKLWan().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) / max(shape.numel() // shape[0], 1) ** 0.5
        for name, shape in shapes.items()
    }


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
