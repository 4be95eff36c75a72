"""A published model's files at a tiny size: the names and layouts of Wan 2.1, StreamDiffusionV2 and TAEHV, random weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from shared.engine.model.loading import random_dit_weights, random_vae_weights
from shared.engine.plan.spec import ModelSpec, VaeKind, spec_of

WORDS = ("a", "cat", "dog", "neon", "lights", "pencil", "drawing", "of", "in", "the", "rain", "é", "&", "warm", "up")
TEXT_DIM = 32


def tiny_wan(vae: str = VaeKind.WAN, **changes: Any) -> ModelSpec:
    """The preset's spec with small sizes: everything that is a property of the published weights stays."""
    small = replace(
        spec_of("wan2.1-1.3b"),
        name="tiny-wan",
        dim=64,
        ffn_dim=128,
        layers=3,
        heads=4,
        freq_dim=32,
        text_dim=TEXT_DIM,
        text_len=24,
        default_width=64,
        default_height=48,
        **changes,
    )
    return small.with_vae(vae)


def wan_vae(seed: int = 0) -> AutoencoderKLWan:
    """diffusers' own network with two residual blocks per level and the published strides, narrow."""
    torch.manual_seed(seed)
    model = AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
    )
    return model.eval().requires_grad_(False)


def original_vae_name(name: str) -> str:
    """A tensor of the Wan autoencoder with two residual blocks, from diffusers' name to the original's."""
    if match := re.match(r"decoder\.up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)\.", name):
        index = 4 * int(match[1]) + (int(match[3]) if match[3] else 3)
        name = f"decoder.upsamples.{index}.{name[match.end() :]}"
    for theirs, original in (
        ("encoder.conv_in.", "encoder.conv1."),
        ("decoder.conv_in.", "decoder.conv1."),
        ("post_quant_conv.", "conv2."),
        ("quant_conv.", "conv1."),
        (".down_blocks.", ".downsamples."),
        (".mid_block.resnets.0.", ".middle.0."),
        (".mid_block.attentions.0.", ".middle.1."),
        (".mid_block.resnets.1.", ".middle.2."),
        (".norm_out.", ".head.0."),
        (".conv_out.", ".head.2."),
    ):
        name = name.replace(theirs, original)
    if ".downsamples." in name or ".upsamples." in name or ".middle." in name:
        for theirs, original in (
            (".norm1.", ".residual.0."),
            (".conv1.", ".residual.2."),
            (".norm2.", ".residual.3."),
            (".conv2.", ".residual.6."),
            (".conv_shortcut.", ".shortcut."),
        ):
            name = name.replace(theirs, original)
    return name


def original_t5(
    seed: int = 0, layers: int = 2, dim: int = TEXT_DIM, heads: int = 4, ffn: int = 48
) -> dict[str, Tensor]:
    """A UMT5 encoder in original Wan names: relative positions in every layer, a gated MLP, head size dim / heads."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    state = {"token_embedding.weight": random(len(WORDS) + 3, dim) * 3, "norm.weight": 1 + 0.1 * random(dim)}
    for i in range(layers):
        block = f"blocks.{i}"
        state |= {f"{block}.{norm}.weight": 1 + random(dim) for norm in ("norm1", "norm2")}
        state |= {f"{block}.attn.{name}.weight": random(dim, dim) for name in "qkvo"}
        state |= {
            f"{block}.ffn.gate.0.weight": random(ffn, dim),
            f"{block}.ffn.fc1.weight": random(ffn, dim),
            f"{block}.ffn.fc2.weight": random(dim, ffn),
            f"{block}.pos_embedding.embedding.weight": random(32, heads) * 2,
        }
    return state


def write_tokenizer(folder: Path) -> None:
    """A word tokenizer that ends every prompt with </s>, as files that AutoTokenizer reads."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(str(folder))


def write_wan_base(folder: Path, seed: int = 0) -> None:
    """The parts of a base model's folder that serving needs: the autoencoder, the text encoder, its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vae = {original_vae_name(name): t for name, t in wan_vae(seed).state_dict().items()}
    torch.save(vae, folder / "Wan2.1_VAE.pth")
    torch.save(
        {n: t.to(torch.bfloat16) for n, t in original_t5(seed).items()}, folder / "models_t5_umt5-xxl-enc-bf16.pth"
    )
    write_tokenizer(folder / "google" / "umt5-xxl")


def write_generator(spec: ModelSpec, folder: Path, seed: int = 0) -> None:
    """``model.pt`` as StreamDiffusionV2 publishes it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_dit_weights(spec, range(spec.layers), seed)
    torch.save({"generator": {f"model.{name}": t for name, t in weights.items()}}, folder / "model.pt")


def write_taehv(spec: ModelSpec, file: Path, seed: int = 0) -> None:
    """``taew2_1.pth``, narrow."""
    torch.save(random_vae_weights(replace(spec, vae_widths=(16, 8, 8, 8), vae_encoder_width=8), seed), file)


def write_model(spec: ModelSpec, folder: Path, seed: int = 0) -> None:
    """Everything in one folder, with a spec."""
    write_wan_base(folder, seed)
    write_generator(spec, folder, seed)
    write_taehv(spec, folder / "taew2_1.pth", seed)
    spec.to_json(folder / "spec.json")
