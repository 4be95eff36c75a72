"""Where a model's tensors are: our own folders, original Wan folders, diffusers folders, and published ``.pt`` files.

Everything is opened lazily and answered in original Wan names, so that a stage reads only its own blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Reader = tuple[list[str], Callable[[str], Tensor]]
"""(tensor names, read one by name)."""

DIT_FILES = ("dit.safetensors", "model.pt", "diffusion_pytorch_model", "transformer/diffusion_pytorch_model")
VAE_FILES = ("vae.safetensors", "Wan2.1_VAE.pth", "taew2_1.safetensors", "taew2_1.pth", "vae/diffusion_pytorch_model")
TEXT_FILES = ("text.safetensors",)
_INSIDE = ("generator", "generator_ema", "state_dict", "model")

_DIFFUSERS = (
    (re.compile(r"^condition_embedder\.text_embedder\.linear_1\."), "text_embedding.0."),
    (re.compile(r"^condition_embedder\.text_embedder\.linear_2\."), "text_embedding.2."),
    (re.compile(r"^condition_embedder\.time_embedder\.linear_1\."), "time_embedding.0."),
    (re.compile(r"^condition_embedder\.time_embedder\.linear_2\."), "time_embedding.2."),
    (re.compile(r"^condition_embedder\.time_proj\."), "time_projection.1."),
    (re.compile(r"^scale_shift_table$"), "head.modulation"),
    (re.compile(r"^proj_out\."), "head.head."),
    (re.compile(r"^(blocks\.\d+\.)scale_shift_table$"), r"\1modulation"),
    (re.compile(r"^(blocks\.\d+\.)norm2\."), r"\1norm3."),
    (re.compile(r"^(blocks\.\d+\.)ffn\.net\.0\.proj\."), r"\1ffn.0."),
    (re.compile(r"^(blocks\.\d+\.)ffn\.net\.2\."), r"\1ffn.2."),
    (re.compile(r"^(blocks\.\d+\.)attn1\."), r"\1self_attn."),
    (re.compile(r"^(blocks\.\d+\.)attn2\."), r"\1cross_attn."),
    (re.compile(r"_attn\.to_out\.0\."), "_attn.o."),
    (re.compile(r"_attn\.to_([qkv])\."), r"_attn.\1."),
)


class WeightsError(ValueError):
    """A model's files lack a tensor, hold one too many, or one of a wrong shape; the message names it and the file."""


def open_weights(source: Path | str | Mapping[str, Tensor], files: Sequence[str]) -> Reader:
    """Tensors of a state dict, of one file, or of the first of ``files`` that a folder holds.

    A name without a suffix stands for ``.safetensors`` or its ``.safetensors.index.json``. Raises FileNotFoundError with
    what was looked for, WeightsError for a file that holds no tensors.
    """
    if isinstance(source, Mapping):
        return _plain(source)
    path = Path(source)
    if not path.is_dir():
        return _open_file(path)
    for name in files:
        for suffix in ("",) if Path(name).suffix else (".safetensors", ".safetensors.index.json"):
            if (path / f"{name}{suffix}").exists():
                return _open_file(path / f"{name}{suffix}")
    raise FileNotFoundError(f"no weights in {path}: looked for {', '.join(files)}")


def wan_name(name: str) -> str:
    """A DiT tensor's original Wan name, from any of the names it is published under."""
    name = name.removeprefix("model.").removeprefix("_fsdp_wrapped_module.")
    for pattern, new in _DIFFUSERS:
        name = pattern.sub(new, name)
    return name


def renamed(reader: Reader, rename: Callable[[str], str]) -> Reader:
    """The same tensors under other names."""
    names, read = reader
    originals = {rename(name): name for name in names}
    return list(originals), lambda name: read(originals[name])


def _open_file(path: Path) -> Reader:
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise WeightsError(f"{path} is no file of weights: {error}") from None
    for key in _INSIDE:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds no tensors by name")
    return _plain({name: t for name, t in cast("Mapping[str, Any]", loaded).items() if isinstance(t, Tensor)})


def _open_safetensors(path: Path) -> Reader:
    try:
        handle: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise WeightsError(f"{path} is no safetensors file: {error}") from None
    return list(handle.keys()), handle.get_tensor


def _open_shards(index: Path) -> Reader:
    places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    opened: dict[str, Callable[[str], Tensor]] = {}

    def read(name: str) -> Tensor:
        shard = places[name]
        if shard not in opened:
            opened[shard] = _open_safetensors(index.parent / shard)[1]
        return opened[shard](name)

    return list(places), read


def _plain(tensors: Mapping[str, Tensor]) -> Reader:
    return list(tensors), tensors.__getitem__
