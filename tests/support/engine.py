"""Small engine pieces for tests: random stages of the nano model and items by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shared.engine.model.autoencoder import Autoencoder
from shared.engine.model.loading import load_vae, random_vae_weights
from shared.engine.plan.items import Item, SlotOp, SlotOpKind
from shared.engine.plan.spec import ModelSpec, spec_of
from shared.engine.plan.split import split_blocks
from shared.engine.stage import Stage
from shared.engine.stepper import Stepper

HEIGHT, WIDTH = 8, 12
"""Latent size of the nano model's pictures."""
NANO = spec_of("nano")


def stages_of(spec: ModelSpec = NANO, count: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Stage]:
    """The model's blocks over ``count`` stages."""
    torch.set_num_threads(1)
    return [Stage.random(spec, blocks, seed, dtype=dtype) for blocks in split_blocks(spec.layers, count)]


def stepper_of(spec: ModelSpec = NANO, stages: int = 1, seed: int = 0) -> Stepper:
    """A whole engine with random weights."""
    vae = load_vae(spec, random_vae_weights(spec, seed))
    return Stepper(spec, stages_of(spec, stages, seed), Autoencoder(vae, spec, torch.device("cpu"), torch.float32))


def prompt(seed: int, spec: ModelSpec = NANO) -> Tensor:
    """A made-up embedding."""
    return torch.randn(spec.text_len, spec.text_dim, generator=torch.Generator().manual_seed(seed))


def latents(seed: int, frames: int = 1, spec: ModelSpec = NANO) -> Tensor:
    """Made-up latents [frames, C, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, spec.latent_channels, HEIGHT, WIDTH, generator=generator)


def clip(seed: int, frames: int, width: int = 96, height: int = 64) -> Tensor:
    """Made-up pictures, uint8 [frames, H, W, 3]."""
    return torch.randint(
        0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def item(stream: str, block: int, step: int = 0, *, steps: Sequence[int] = (700, 500), slot: int | None = None) -> Item:
    """Block 0 has 2 latent frames and resets its slot, later ones have 1."""
    first = block == 0
    return Item(
        stream=stream,
        epoch=0,
        block=block,
        step=step,
        slot=(0 if first else step) if slot is None else slot,
        frames=2 if first else 1,
        first_latent=0 if first else block + 1,
        start_frame=0 if first else block + 1,
        noise_scale=0.8,
        timesteps=tuple(steps),
        seed=11,
        prompt_version=1,
        ops=(SlotOp(SlotOpKind.RESET, 0),) if first else (),
    )


def with_ops(what: Item, *ops: SlotOp) -> Item:
    """The item with these operations."""
    return replace(what, ops=ops)


def run(stages: Sequence[Stage], items: Sequence[Item], x: Tensor) -> Tensor:
    """One batch through all stages."""
    for stage in stages:
        x = stage.run(items, x)
    return x


def open_on(stages: Sequence[Stage], *streams: str) -> None:
    """Open the streams, each with a prompt of its own as version 1."""
    for stage in stages:
        for stream in streams:
            stage.open(stream, HEIGHT, WIDTH)
            stage.set_prompt(stream, 1, prompt(sum(map(ord, stream)), stage.spec))
