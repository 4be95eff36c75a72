"""Published layouts of the weights, and the networks against diffusers' own, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from shared.engine.model.loading import WeightsError, load_dit, load_vae, random_dit_weights
from shared.engine.model.wan_vae import WanVae
from shared.engine.plan.spec import spec_of
from tests.support.engine import HEIGHT, NANO, WIDTH, latents, prompt

CLOSE = 2e-5


@pytest.fixture(scope="module")
def transformer() -> WanTransformer3DModel:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=NANO.heads,
        attention_head_dim=NANO.head_dim,
        in_channels=16,
        out_channels=16,
        text_dim=NANO.text_dim,
        freq_dim=NANO.freq_dim,
        ffn_dim=NANO.ffn_dim,
        num_layers=NANO.layers,
        rope_max_seq_len=64,
    )
    return model.eval().requires_grad_(False)


def test_the_whole_clip_model_computes_what_diffusers_does(transformer: WanTransformer3DModel) -> None:
    model = load_dit(NANO, transformer.state_dict(), range(NANO.layers), "cpu", torch.float32)
    x, text = latents(1, 3)[None], prompt(2)[None]
    with torch.no_grad():
        flow = model(x, torch.tensor([[700.0]]), text)
        theirs = transformer(x.transpose(1, 2), torch.tensor([700]), text, return_dict=False)[0]
    assert flow.shape == (1, 3, 16, HEIGHT, WIDTH)
    assert torch.allclose(flow, theirs.transpose(1, 2), atol=CLOSE)


def test_a_frame_by_frame_model_can_be_trained_with_a_mask() -> None:
    model = load_dit(NANO, random_dit_weights(NANO, range(NANO.layers)), range(NANO.layers), "cpu", torch.float32)
    model.requires_grad_(True)
    tokens = HEIGHT * WIDTH // 4
    frame = torch.arange(3).repeat_interleave(tokens)
    causal = frame[:, None] >= frame[None]
    x, times = latents(1, 3)[None], torch.tensor([[700.0, 500.0, 200.0]])
    flow = model(x, times, prompt(2)[None], mask=causal)
    changed = x.clone()
    changed[:, 2] += 1
    assert torch.allclose(flow[:, :2], model(changed, times, prompt(2)[None], mask=causal)[:, :2], atol=CLOSE)
    flow.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("layout", ["transformer", "shards", "model.pt", "generator", "original"])
def test_published_layouts_load(transformer: WanTransformer3DModel, layout: str, tmp_path: Path) -> None:
    original = random_dit_weights(NANO, range(NANO.layers), 3)
    source: Path = tmp_path
    expected = original
    if layout == "transformer":
        (tmp_path / "transformer").mkdir()
        theirs = {n: t.contiguous() for n, t in transformer.state_dict().items()}
        save_file(theirs, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
        expected = load_dit(NANO, theirs, range(3), "cpu", torch.float32).state_dict()
    elif layout == "shards":
        names = list(original)
        for shard, part in enumerate((names[::2], names[1::2])):
            save_file({n: original[n] for n in part}, tmp_path / f"part-{shard}.safetensors")
        places = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    elif layout == "model.pt":
        torch.save({"generator_ema": {f"model.{n}": t for n, t in original.items()}}, tmp_path / "model.pt")
    elif layout == "generator":
        source = tmp_path / "checkpoint.pt"
        torch.save({"generator": {f"model.{n}": t for n, t in original.items()}, "step": 3}, source)
    else:
        save_file(original, tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = load_dit(NANO, source, range(1, 3), "cpu", torch.float32).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in loaded.items())
    assert not any(name.startswith("blocks.0.") for name in loaded)


def test_a_file_without_tensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="no file of weights"):
        load_dit(NANO, tmp_path, range(3), "cpu", torch.float32)
    torch.save([1, 2], tmp_path / "model.pt")
    with pytest.raises(WeightsError, match="no tensors by name"):
        load_dit(NANO, tmp_path, range(3), "cpu", torch.float32)


def test_the_streaming_wan_autoencoder_computes_what_diffusers_does_on_the_whole_clip() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    theirs: Any = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4], num_res_blocks=2, temperal_downsample=[True, True]
    )
    theirs.eval().requires_grad_(False)
    weights: dict[str, Tensor] = theirs.state_dict()
    ours = load_vae(spec_of("wan-1.3b"), weights)
    assert isinstance(ours, WanVae)
    video = torch.rand(9, 3, 32, 48)
    memory = ours.new_memory()
    streamed = torch.cat([ours.encode(memory, part) for part in video.split([5, 4])])
    whole = theirs.encode((video * 2 - 1).transpose(0, 1)[None]).latent_dist.mode()[0].transpose(0, 1)
    assert torch.allclose(streamed, whole, atol=CLOSE)

    held = ours.new_memory()
    first = ours.decode(held, streamed[:2])
    assert len(first) == 5
    copy = held.clone()
    assert held.nbytes() > 0
    rest = ours.decode(held, streamed[2:])
    shown = theirs.decode(streamed.transpose(0, 1)[None]).sample[0].transpose(0, 1)
    assert torch.allclose(torch.cat([first, rest]), (shown + 1) / 2, atol=CLOSE)
    assert torch.equal(ours.decode(copy, streamed[2:]), rest), "the copy was not changed by the original"
    with pytest.raises(ValueError, match="4n frames"):
        ours.encode(memory, video[:3])


def test_other_weights_are_no_wan_autoencoder() -> None:
    with pytest.raises(WeightsError, match=r"encoder\.conv_in\.weight"):
        load_vae(spec_of("wan-1.3b"), {"a": torch.zeros(1)})
