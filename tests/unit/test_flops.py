"""The arithmetic of a latent frame: by formula, against torch's own counter, and against the published models' figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shared.engine.model.dit import Dit
from shared.engine.model.head import CELLS, PATHS
from shared.engine.model.tiny_vae import TinyVae
from shared.engine.model.wan_vae import AutoencoderKLWan, WanVae
from shared.engine.plan.capacity import weight_bytes
from shared.engine.plan.flops import prompt_flops, step_flops, vae_flops
from shared.engine.plan.spec import spec_of

TERA = 1e12
FULL = (832, 480)


@pytest.mark.parametrize(("model", "tera"), [("wan2.1-1.3b", 6.74), ("wan2.1-14b", 49.9)])
def test_a_step_of_the_published_models(model: str, tera: float) -> None:
    assert step_flops(spec_of(model), *FULL) / TERA == pytest.approx(tera, rel=2e-3)


def test_the_published_autoencoders() -> None:
    wan = vae_flops(spec_of("wan2.1-1.3b"), *FULL)
    assert wan.encode / TERA == pytest.approx(8.05, rel=2e-3)
    assert wan.decode / TERA == pytest.approx(13.55, rel=2e-3)
    tiny = vae_flops(spec_of("wan2.1-1.3b").with_vae("taehv"), *FULL)
    assert tiny.encode / TERA == pytest.approx(0.24, abs=0.005)
    assert tiny.decode / TERA == pytest.approx(0.54, abs=0.005)
    mixed = vae_flops(spec_of("wan2.1-1.3b-fast"), *FULL)
    assert (mixed.encode, mixed.decode) == (wan.encode, tiny.decode), "the public code's fast profile encodes in full"


def counted(work: object) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()  # type: ignore[operator]
    return counter.get_total_flops()


@pytest.mark.parametrize(("paths", "cells"), [(0, 0), (2, 0), (2, 48)])
def test_the_dit_by_torchs_counter(paths: int, cells: int) -> None:
    # Without a cache a frame attends to itself only: a ring of one frame.
    spec = replace(spec_of("wan2.1-1.3b"), layers=2, ring=1, sinks=0, gated_paths=paths, cell_dim=cells)
    with torch.device("meta"):
        model = Dit(spec)
        rows, columns = spec.latent_size(256, 128)
        # Eight items: fewer would pad the time embedding's rows.
        x, text = torch.empty(8, 1, 16, rows, columns), torch.empty(1, spec.text_len, spec.text_dim)
    times = [[300.0]] * 8
    whole = counted(lambda: model(x, times, text))
    # The prompt's part of gates and cells is made in every forward, for eight rows: far below what is counted.
    whole -= 8 * 2 * spec.dim * (bool(paths) * (1 + paths) * 4 * spec.latent_channels + 4 * cells)
    assert whole == pytest.approx(8 * step_flops(spec, 256, 128) + prompt_flops(spec), rel=1e-6)
    assert step_flops(spec, 256, 128, blocks=2) < step_flops(spec, 256, 128)


@pytest.mark.parametrize("name", ["rheo-tiny", "wan2.1-1.3b-fast"])
def test_the_tiny_autoencoder_by_torchs_counter(name: str) -> None:
    spec = spec_of(name).with_vae("taehv")
    with torch.device("meta"):
        vae = TinyVae(spec.vae_widths, spec.vae_encoder_width, spec.latent_channels, spec.vae_shortcut)
        video, latents = torch.empty(1, 4, 3, 64, 96), torch.empty(1, 1, spec.latent_channels, 8, 12)
    memories = vae.new_memory(), vae.new_memory()
    for memory in memories:
        memory.started = True
    flops = vae_flops(spec, 96, 64)
    # A pointwise convolution as a batched product is counted all the same.
    assert counted(lambda: vae.encode_clip(video, memories[0])) == pytest.approx(flops.encode, rel=1e-6)
    assert counted(lambda: vae.decode_clip(latents, memories[1])) == pytest.approx(flops.decode, rel=1e-6)


def test_the_wan_autoencoder_by_torchs_counter() -> None:
    spec = spec_of("wan2.1-1.3b")
    with torch.device("meta"):
        vae = WanVae(AutoencoderKLWan())
        video, latents = torch.empty(5, 3, 32, 48), torch.empty(1, 16, 4, 6)
    encoder, decoder = vae.new_memory(), vae.new_memory()
    # The first chunk and the one after it are no steady state: time is not halved yet.
    vae.encode(encoder, video)
    vae.encode(encoder, video[:4])
    vae.decode(decoder, latents)
    vae.decode(decoder, latents)
    flops = vae_flops(spec, 48, 32)
    assert counted(lambda: vae.encode(encoder, video[:4])) == pytest.approx(flops.encode, rel=1e-6)
    assert counted(lambda: vae.decode(decoder, latents)) == pytest.approx(flops.decode, rel=1e-6)


def test_weights_past_the_blocks_count_too() -> None:
    spec = spec_of("rheo-tiny")
    with torch.device("meta"):
        parameters = dict(Dit(spec).named_parameters())
    past = sum(p.numel() for name, p in parameters.items() if name.startswith((*PATHS, *CELLS)) and p.ndim == 2)
    plain = replace(spec, gated_paths=0, cell_dim=0)
    assert weight_bytes(spec, 2) - weight_bytes(plain, 2) == 2 * past > 0
