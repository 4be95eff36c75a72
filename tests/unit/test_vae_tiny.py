"""The tiny autoencoder: a clip in parts gives what the whole clip gives, and streams do not see each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.engine.model.loading import load_tiny_vae, load_vae, random_vae_weights
from shared.engine.model.tiny_vae import TinyVae, VaeMemory, to_pixels
from shared.engine.model.tiny_vae_serving import ServingTinyVae
from tests.support.engine import NANO, clip
from training.linear_encoder import fit

CLOSE = 1e-5
AnyVae = TinyVae | ServingTinyVae


@pytest.fixture(scope="module", params=[load_tiny_vae, load_vae], ids=["module", "serving"])
def vae(request: pytest.FixtureRequest) -> AnyVae:
    torch.set_num_threads(1)
    return request.param(NANO, random_vae_weights(NANO))


@pytest.mark.parametrize("load", [load_tiny_vae, load_vae])
@torch.inference_mode()
@given(chunks=st.lists(st.integers(1, 3), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_streamed_equals_whole(load: Callable[..., AnyVae], chunks: list[int], seed: int) -> None:
    torch.set_num_threads(1)
    model = load(NANO, random_vae_weights(NANO, 1))
    frames = 1 + 4 * sum(chunks)
    video = torch.rand(frames, 3, 32, 48, generator=torch.Generator().manual_seed(seed))
    whole = model.encode_clip(video[None])[0]
    assert whole.shape == (1 + sum(chunks), 16, 4, 6)
    sizes = [4 * n + (1 if i == 0 else 0) for i, n in enumerate(chunks)]
    memory = VaeMemory()
    parts = torch.cat([model.encode(memory, part) for part in video.split(sizes)])
    assert torch.allclose(parts, whole, atol=CLOSE)

    shown = model.decode_clip(whole[None])[0]
    assert shown.shape == video.shape
    memory = VaeMemory()
    sizes = [n + (1 if i == 0 else 0) for i, n in enumerate(chunks)]
    parts = torch.cat([model.decode(memory, part) for part in whole.split(sizes)])
    assert torch.allclose(parts, shown, atol=CLOSE)
    assert 0 <= float(shown.min()) <= float(shown.max()) <= 1


@torch.inference_mode()
def test_two_streams_share_the_weights_and_nothing_else(vae: AnyVae) -> None:
    a, b = (clip(seed, 9, 48, 32).permute(0, 3, 1, 2) for seed in (1, 2))
    alone = VaeMemory()
    expected = [vae.encode(alone, a[:5]), vae.encode(alone, a[5:])]
    memory_a, memory_b = vae.new_memory(), vae.new_memory()
    first = vae.encode(memory_a, a[:5])
    vae.encode(memory_b, b[:5])
    second = vae.encode(memory_a, a[5:])
    assert torch.equal(first, expected[0])
    assert torch.equal(second, expected[1])
    assert memory_a.nbytes() > 0


@torch.inference_mode()
def test_a_copied_memory_goes_on_by_itself(vae: AnyVae) -> None:
    video = torch.rand(13, 3, 32, 48)
    memory = VaeMemory()
    vae.encode(memory, video[:5])
    copy = memory.clone()
    here = vae.encode(memory, video[5:9])
    vae.encode(memory, video[9:])
    assert torch.equal(here, vae.encode(copy, video[5:9]))


@torch.inference_mode()
def test_pictures_in_bytes_and_in_floats_are_the_same(vae: AnyVae) -> None:
    frames = clip(3, 5, 48, 32).permute(0, 3, 1, 2)
    assert torch.allclose(vae.encode(VaeMemory(), frames), vae.encode(VaeMemory(), frames.float() / 255), atol=CLOSE)
    assert torch.equal(to_pixels(frames.float() / 255), frames)


def test_a_clip_of_a_wrong_length_is_refused(vae: AnyVae) -> None:
    with pytest.raises(ValueError, match="4n frames"):
        vae.encode_clip(torch.rand(1, 6, 3, 32, 48))
    assert vae.encode_clip(torch.rand(1, 5, 3, 32, 48)).shape == (1, 2, 16, 4, 6)
    memory = VaeMemory()
    vae.encode(memory, torch.rand(5, 3, 32, 48))
    with pytest.raises(ValueError, match="4n frames"):
        vae.encode(memory, torch.rand(5, 3, 32, 48))


def test_it_can_be_trained_on_whole_clips() -> None:
    model = TinyVae((16, 8, 8, 8), 8)
    video = torch.rand(2, 5, 3, 32, 32)
    made = model.decode_unclamped(model.encode_clip(video))
    assert made.shape == video.shape
    (made - video).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("shortcut", [False, True])
@torch.inference_mode()
def test_serving_computes_what_the_module_does(shortcut: bool) -> None:
    torch.set_num_threads(1)
    spec = replace(NANO, vae_widths=(24, 12, 8, 4), vae_encoder_width=6, vae_shortcut=shortcut)
    weights = random_vae_weights(spec, 3)
    module, serving = load_tiny_vae(spec, weights), load_vae(spec, weights)
    assert isinstance(serving, ServingTinyVae)
    video, z = torch.rand(13, 3, 32, 48), 2 * torch.randn(4, 16, 4, 6)
    memories = [module.new_memory() for _ in range(4)]
    for part in video.split([5, 4, 4]):
        assert torch.allclose(module.encode(memories[0], part), serving.encode(memories[1], part), atol=CLOSE)
    for part in z.split([2, 1, 1]):
        assert torch.allclose(module.decode(memories[2], part), serving.decode(memories[3], part), atol=CLOSE)


@torch.inference_mode()
def test_serving_leaves_out_what_a_linear_encoder_does_not_use() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = TinyVae((16, 8, 8, 8), 48, 48)
    video = torch.rand(4, 13, 3, 32, 48)
    fit(module, video[:, 1:])
    serving = ServingTinyVae(module)
    memories = module.new_memory(), serving.new_memory()
    for part in video[0].split([5, 4, 4]):
        whole, lean = module.encode(memories[0], part), serving.encode(memories[1], part)
        assert torch.allclose(whole, lean, atol=1e-3 * float(whole.abs().max()))
    assert memories[1].nbytes() == 0
    assert memories[0].nbytes() > 0
