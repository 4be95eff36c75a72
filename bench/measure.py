"""One setting of the engine measured: model × size × steps × streams × VAE × stages, dtype, threads, compiled or not."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import psutil
import torch

from bench.ceilings import Ceilings
from bench.lockstep import LockStep, timed
from bench.setting import Figures, Setting, spec_for
from bench.weights import Models
from shared.engine.model.autoencoder import Autoencoder
from shared.engine.plan.flops import step_flops, vae_flops
from shared.engine.plan.spec import FRAMES_PER_LATENT


def measure(setting: Setting, ticks: int, models: Models, ceilings: Ceilings) -> Figures:
    """Run one setting."""
    torch.set_num_threads(setting.threads)
    device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
    spec, folder = models.spec_and_source(setting, spec_for(setting))
    stages = models.stages(setting, spec, folder)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    vae_made: Any = models.autoencoder(setting, spec, folder)
    encode, decode, vae_bytes = _autoencoder_ms(Autoencoder(vae_made, spec, device, dtype), setting, ticks)
    del vae_made
    loop = LockStep(spec, stages, (setting.width, setting.height), setting.steps, setting.streams)
    warm = spec.ring + setting.steps + 2
    rows = [loop.tick() for _ in range(warm + ticks)][warm:]

    forwards = [sum(row) for row in rows]
    middle = (statistics.median(encode), statistics.median(forwards), statistics.median(decode))
    stage_ms = tuple(statistics.median(column) for column in zip(*rows, strict=True))
    shown = FRAMES_PER_LATENT * setting.streams * 1000
    held = [stage.memory() for stage in stages]
    loop.close()
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


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
