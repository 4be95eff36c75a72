"""Weights from files into modules, each stage reading only its own blocks. A wrong tensor is named, not guessed at."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from shared.engine.model.checkpoints import Source, Weights, WeightsError, open_weights
from shared.engine.model.dit import Dit
from shared.engine.model.dit_files import elsewhere_of, open_dit
from shared.engine.model.filling import complaints, fill
from shared.engine.model.mixed_vae import MixedVae
from shared.engine.model.tiny_vae import TinyVae
from shared.engine.model.tiny_vae_serving import ServingTinyVae
from shared.engine.plan.model_parts import Part
from shared.engine.plan.spec import UMT5, ModelSpec, VaeKind

if TYPE_CHECKING:
    from shared.engine.model.wan_vae import WanVae

__all__ = [
    "WeightsError",
    "check_vae",
    "load_dit",
    "load_text_encoder",
    "load_tiny_vae",
    "load_vae",
    "random_dit_weights",
    "random_vae_weights",
]


class TextEncoder(Protocol):
    """A prompt to its embedding [text_len, text_dim], padding zeroed."""

    def encode(self, prompt: str) -> Tensor:
        """Any text is a legal prompt."""
        ...


def load_dit(spec: ModelSpec, source: Source, blocks: range, device: torch.device | str, dtype: torch.dtype) -> Dit:
    """A Dit of these blocks. ``source`` is a model folder (ours, original Wan or diffusers), a file or a state dict.

    Reads only the tensors of these blocks. Raises WeightsError, or FileNotFoundError where there is no such file.
    """
    with torch.device("meta"):
        model = Dit(spec, blocks)
    fill(model, open_dit(spec, source), elsewhere=elsewhere_of(model), device=device, dtype=dtype)
    return model.eval().requires_grad_(False)


def load_vae(
    spec: ModelSpec,
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    decoder_dtype: torch.dtype | None = None,
) -> ServingTinyVae | WanVae | MixedVae:
    """The model's autoencoder for serving, the one that ``spec.vae`` names. Raises WeightsError, FileNotFoundError.

    ``decoder_dtype`` is the tiny decoder's, if not ``dtype`` (see :func:`tiny_decoder_dtype`).
    """
    if spec.vae == VaeKind.TAEHV:
        return ServingTinyVae(load_tiny_vae(spec, source, device, dtype), decoder_dtype)
    from shared.engine.model.wan_vae import load_wan_vae

    full = load_wan_vae(spec, open_weights(source, Part.VAE), device=device, dtype=dtype)
    if spec.vae == VaeKind.WAN:
        return full
    return MixedVae(full, ServingTinyVae(load_tiny_vae(spec, source, device, dtype), decoder_dtype))


def tiny_decoder_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """bfloat16 on a CPU that computes in it: half the time, and 46 dB from float32's picture. Elsewhere ``dtype``.

    A stream is always decoded alone, so that its pixels do not depend on company even so.
    """
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():  # pyright: ignore[reportPrivateUsage]
        return torch.bfloat16
    return dtype


def load_tiny_vae(
    spec: ModelSpec,
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TinyVae:
    """The tiny autoencoder as a module, its widths read from the weights. Raises WeightsError, FileNotFoundError."""
    weights = open_weights(source, Part.TAEHV)
    model = tiny_vae_on_meta(spec, weights)
    fill(model, weights, device=device, dtype=dtype)
    return model.eval().requires_grad_(False)


def tiny_vae_on_meta(spec: ModelSpec, weights: Weights) -> TinyVae:
    """The tiny autoencoder these tensors are of, without data; the spec's widths where they do not tell."""
    first = [weights.entries.get(f"decoder.{index}.weight") for index in (1, 8, 14, 20)]
    widths = [entry.shape[0] if entry else width for entry, width in zip(first, spec.vae_widths, strict=True)]
    entry = weights.entries.get("encoder.0.weight")
    with torch.device("meta"):
        width = entry.shape[0] if entry else spec.vae_encoder_width
        return TinyVae(widths, width, spec.latent_channels, spec.vae_shortcut)


def check_vae(spec: ModelSpec, source: Source) -> list[str]:
    """What is wrong with the autoencoder's files, one line each; names and shapes only, no data is read."""
    found: list[str] = []
    if spec.vae != VaeKind.TAEHV:
        from shared.engine.model.wan_vae import wan_vae_on_meta

        try:
            found += complaints(*wan_vae_on_meta(spec, open_weights(source, Part.VAE)))
        except (WeightsError, FileNotFoundError) as error:
            found.append(str(error))
    if spec.vae != VaeKind.WAN:
        try:
            weights = open_weights(source, Part.TAEHV)
            found += complaints(tiny_vae_on_meta(spec, weights), weights)
        except (WeightsError, FileNotFoundError) as error:
            found.append(str(error))
    return found


def load_text_encoder(
    spec: ModelSpec, source: Source, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The model's text encoder: ``encode(prompt)`` gives [text_len, text_dim]. Raises WeightsError, FileNotFoundError.

    The embedded model's stays on the CPU in float32; UMT5-XXL goes to ``device`` as ``dtype``.
    """
    if spec.text == UMT5:
        from shared.engine.model.umt5 import load_umt5

        return load_umt5(spec, source, device, dtype)
    from shared.engine.model.text import TinyTextEncoder

    weights = open_weights(source, Part.TEXT)
    try:
        encoder = TinyTextEncoder.from_state({name: weights.read(name) for name in weights.entries})
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"{weights.source} holds no such text encoder: {error}") from None
    if (encoder.text_len, encoder.text_dim) != (spec.text_len, spec.text_dim):
        raise WeightsError(
            f"the text encoder in {weights.source} gives [{encoder.text_len}, {encoder.text_dim}], "
            f"the model needs [{spec.text_len}, {spec.text_dim}]"
        )
    return encoder


def text_encoder_bytes(source: Source, dtype: torch.dtype) -> int:
    """What the text encoder's weights take as ``dtype``, by their shapes. Raises WeightsError, FileNotFoundError."""
    weights = open_weights(source, Part.TEXT)
    return sum(math.prod(entry.shape) for entry in weights.entries.values()) * dtype.itemsize


def random_dit_weights(spec: ModelSpec, blocks: range, seed: int = 0) -> dict[str, Tensor]:
    """Weights for tests and benchmarks: each tensor depends on (seed, its name), not on how the blocks are split."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Dit(spec, blocks).state_dict().items()}
    return {name: _random_tensor(name, shape, seed) for name, shape in shapes.items()}


def random_vae_weights(spec: ModelSpec, seed: int = 0) -> dict[str, Tensor]:
    """Weights of the tiny autoencoder for tests and benchmarks."""
    with torch.device("meta"):
        vae = TinyVae(spec.vae_widths, spec.vae_encoder_width, spec.latent_channels, spec.vae_shortcut)
        shapes = {name: tuple(t.shape) for name, t in vae.state_dict().items()}
    return {name: _random_tensor(name, shape, seed) for name, shape in shapes.items()}


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    if len(shape) == 1:
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return centre + 0.02 * torch.randn(shape, generator=generator)
    fan_in = shape[-1] if name.endswith("modulation") else math.prod(shape[1:])
    return torch.randn(shape, generator=generator) / math.sqrt(fan_in)
