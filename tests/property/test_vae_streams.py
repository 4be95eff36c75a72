"""Streamed = whole clip, for any chunking, with two streams taking turns: both autoencoders, both directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.engine.model.autoencoder import StreamingVae
from shared.engine.model.loading import load_vae, random_vae_weights
from shared.engine.model.wan_vae import WanVae
from tests.support.engine import NANO

CLOSE = 1e-5
HEIGHT, WIDTH = 16, 32


@cache
def vae_of(kind: str) -> StreamingVae:
    torch.set_num_threads(1)
    if kind == "taehv":
        return load_vae(NANO, random_vae_weights(NANO))
    torch.manual_seed(1)
    model: Any = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanVae(model)


@dataclass
class Stream:
    """A clip cut into chunks of 4·n frames (the first one has one more), and what came out of it so far."""

    video: Tensor
    sizes: list[int]
    encoder: Any
    decoder: Any
    latents: list[Tensor]
    frames: list[Tensor]

    @classmethod
    def cut(cls, vae: StreamingVae, chunks: Sequence[int], seed: int) -> Stream:
        generator = torch.Generator().manual_seed(seed)
        video = torch.rand(1 + 4 * sum(chunks), 3, HEIGHT, WIDTH, generator=generator)
        sizes = [4 * n + (index == 0) for index, n in enumerate(chunks)]
        return cls(video, sizes, vae.new_memory(), vae.new_memory(), [], [])

    def turn(self, vae: StreamingVae) -> bool:
        """One chunk there and back; False when there is none left."""
        done = sum(self.sizes[: len(self.latents)])
        if done == len(self.video):
            return False
        made = vae.encode(self.encoder, self.video[done : done + self.sizes[len(self.latents)]])
        self.latents.append(made)
        self.frames.append(vae.decode(self.decoder, made))
        return True


@pytest.mark.parametrize("kind", ["taehv", "wan"])
@torch.inference_mode()
@given(
    cuts=st.tuples(*[st.lists(st.integers(1, 3), min_size=1, max_size=3)] * 2),
    turns=st.lists(st.booleans(), max_size=6),
)
@settings(max_examples=10, deadline=None)
def test_chunks_of_two_streams_in_any_order_give_the_whole_clips(
    kind: str, cuts: tuple[list[int], list[int]], turns: list[bool]
) -> None:
    vae = vae_of(kind)
    streams = [Stream.cut(vae, chunks, seed) for seed, chunks in enumerate(cuts)]
    for turn in [*turns, *[False] * 3, *[True] * 3]:
        streams[turn].turn(vae)
    for stream in streams:
        whole = vae.encode(vae.new_memory(), stream.video)
        assert whole.shape == (1 + (len(stream.video) - 1) // 4, 16, HEIGHT // 8, WIDTH // 8)
        assert torch.allclose(torch.cat(stream.latents), whole, atol=CLOSE)
        shown = vae.decode(vae.new_memory(), whole)
        assert shown.shape == stream.video.shape
        assert torch.allclose(torch.cat(stream.frames), shown, atol=CLOSE)
