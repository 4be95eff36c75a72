"""Weights from files into modules, each stage reading only its own blocks. A wrong tensor is named, not guessed at."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shared.engine.model.checkpoints import (
    DIT_FILES,
    TEXT_FILES,
    VAE_FILES,
    WeightsError,
    open_weights,
    renamed,
    wan_name,
)
from shared.engine.model.dit import Dit
from shared.engine.model.tiny_vae import TinyVae
from shared.engine.model.tiny_vae_serving import ServingTinyVae
from shared.engine.plan.spec import ModelSpec

if TYPE_CHECKING:
    from shared.engine.model.text import TinyTextEncoder
    from shared.engine.model.wan_vae import WanVae


def load_dit(
    spec: ModelSpec,
    source: Path | str | Mapping[str, Tensor],
    blocks: range,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Dit:
    """A Dit of these blocks. ``source`` is a model folder (ours, original Wan or diffusers), a file or a state dict.

    Reads only the tensors of these blocks. Raises WeightsError, or FileNotFoundError where there is no such file.
    """
    with torch.device("meta"):
        model = Dit(spec, blocks)

    # What other stages own is no error here; what no stage of this spec owns is.
    elsewhere = [f"blocks.{i}." for i in range(spec.layers) if i not in blocks]
    elsewhere += [] if model.is_first else ["patch_embedding."]
    elsewhere += [] if model.is_last else ["head."]
    fill(
        model,
        *renamed(open_weights(source, DIT_FILES), wan_name),
        elsewhere=tuple(elsewhere),
        device=device,
        dtype=dtype,
    )
    return model.eval().requires_grad_(False)


def load_vae(
    spec: ModelSpec,
    folder: Path | str | Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ServingTinyVae | WanVae:
    """The model's autoencoder for serving, from ``vae.safetensors`` or a state dict. WeightsError, FileNotFoundError."""
    if spec.vae == "wan":
        from shared.engine.model.wan_vae import load_wan_vae

        return load_wan_vae(spec, *open_weights(folder, VAE_FILES), device=device, dtype=dtype)
    return ServingTinyVae(load_tiny_vae(spec, folder, device, dtype))


def load_tiny_vae(
    spec: ModelSpec,
    folder: Path | str | Mapping[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TinyVae:
    """The tiny autoencoder as a module, for training. Raises WeightsError, FileNotFoundError."""
    with torch.device("meta"):
        model = TinyVae(spec.vae_widths, spec.vae_encoder_width, spec.latent_channels)
    fill(model, *open_weights(folder, VAE_FILES), device=device, dtype=dtype)
    return model.eval().requires_grad_(False)


def load_text_encoder(spec: ModelSpec, folder: Path | str) -> TinyTextEncoder:
    """The embedded model's text encoder: ``encode(prompt)`` gives [text_len, text_dim]. WeightsError, FileNotFoundError."""
    from shared.engine.model.text import TinyTextEncoder

    names, read = open_weights(folder, TEXT_FILES)
    try:
        encoder = TinyTextEncoder.from_state({name: read(name) for name in names})
    except (KeyError, RuntimeError) as error:
        raise WeightsError(f"{folder} holds no such text encoder: {error}") from None
    if (encoder.text_len, encoder.text_dim) != (spec.text_len, spec.text_dim):
        raise WeightsError(
            f"the text encoder in {folder} gives [{encoder.text_len}, {encoder.text_dim}], "
            f"the model needs [{spec.text_len}, {spec.text_dim}]"
        )
    return encoder


def random_dit_weights(spec: ModelSpec, blocks: range, seed: int = 0) -> dict[str, Tensor]:
    """Weights for tests and benchmarks: each tensor depends on (seed, its name), not on how the blocks are split."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in Dit(spec, blocks).state_dict().items()}
    return {name: _random_tensor(name, shape, seed) for name, shape in shapes.items()}


def random_vae_weights(spec: ModelSpec, seed: int = 0) -> dict[str, Tensor]:
    """Weights of the tiny autoencoder for tests and benchmarks."""
    with torch.device("meta"):
        shapes = {
            name: tuple(t.shape)
            for name, t in TinyVae(spec.vae_widths, spec.vae_encoder_width, spec.latent_channels).state_dict().items()
        }
    return {name: _random_tensor(name, shape, seed) for name, shape in shapes.items()}


def fill(
    model: nn.Module,
    names: Iterable[str],
    read: Callable[[str], Tensor],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    elsewhere: tuple[str, ...] = (),
) -> None:
    """Give a meta-device module its tensors. ``elsewhere`` are prefixes that may be present without being wanted."""
    expected = model.state_dict()
    present = {name.removeprefix("model."): name for name in names}
    missing = sorted(name for name in expected if name not in present)
    extra = sorted(n for n in present if n not in expected and not n.startswith(elsewhere))
    if missing:
        raise WeightsError(f"{_some(missing)} missing")
    if extra:
        raise WeightsError(f"{_some(extra)} not part of this model")
    state: dict[str, Tensor] = {}
    for name, target in expected.items():
        tensor = read(present[name])
        if tensor.shape != target.shape:
            raise WeightsError(f"{name} is {list(tensor.shape)}, the model needs {list(target.shape)}")
        state[name] = tensor.to(device, dtype, copy=True).contiguous()
    model.load_state_dict(state, assign=True)


def _some(names: list[str]) -> str:
    listed = ", ".join(names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{listed}{more}: tensor{'s' if len(names) > 1 else ''}"


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    if len(shape) == 1:
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return centre + 0.02 * torch.randn(shape, generator=generator)
    fan_in = shape[-1] if name.endswith("modulation") else math.prod(shape[1:])
    return torch.randn(shape, generator=generator) / math.sqrt(fan_in)
