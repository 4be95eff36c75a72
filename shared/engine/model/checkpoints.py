"""Files of tensors, opened lazily: names and shapes are known at once, a tensor is read when it is asked for.

safetensors (one file or shards) and ``.pt``/``.pth`` files, which are mapped and not read; a state dict in memory serves as
well. :func:`wan_name` gives every published name of a DiT tensor its original Wan name.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shared.engine.plan.model_parts import FILES, ModelParts, Part, find_file

_INSIDE = ("generator", "generator_ema", "state_dict", "model")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")

_DIFFUSERS = (
    (re.compile(r"^condition_embedder\.text_embedder\.linear_1\."), "text_embedding.0."),
    (re.compile(r"^condition_embedder\.text_embedder\.linear_2\."), "text_embedding.2."),
    (re.compile(r"^condition_embedder\.time_embedder\.linear_1\."), "time_embedding.0."),
    (re.compile(r"^condition_embedder\.time_embedder\.linear_2\."), "time_embedding.2."),
    (re.compile(r"^condition_embedder\.time_proj\."), "time_projection.1."),
    (re.compile(r"^condition_embedder\.image_embedder\."), "img_emb."),
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


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its shape is known, ``read`` fetches it (host memory, or a view of the mapped file)."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by name. ``source`` says where they are from, for messages; ``folder`` holds them, if a folder does.

    ``on_read`` is told the name and the bytes of every tensor that is read.
    """

    source: str
    entries: Mapping[str, Entry]
    path: Path | None = None
    on_read: Callable[[str, int], None] = field(default=lambda _name, _size: None)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; reads nothing."""
        return self.entries[name].shape

    def read(self, name: str) -> Tensor:
        """One tensor. Raises WeightsError for a file that is damaged here."""
        try:
            tensor = self.entries[name].read()
        except (SafetensorError, RuntimeError, OSError) as error:
            raise WeightsError(f"{name} cannot be read from {self.source}: {error}") from None
        self.on_read(name, tensor.numel() * tensor.element_size())
        return tensor

    def renamed(self, rename: Callable[[str], str]) -> Weights:
        """The same tensors under other names."""
        return replace(self, entries={rename(name): entry for name, entry in self.entries.items()})

    def without(self, prefixes: tuple[str, ...]) -> Weights:
        """These tensors but for those whose names begin so."""
        return replace(self, entries={n: e for n, e in self.entries.items() if not n.startswith(prefixes)})


Source = Path | str | ModelParts | Mapping[str, Tensor] | Weights
"""What weights may be given as: a folder, a file, the parts of a model, a state dict, or opened already."""


def open_weights(source: Source, part: Part) -> Weights:
    """Tensors of a state dict, of one file, or of the file of this part that a folder holds.

    Raises FileNotFoundError with what was looked for, WeightsError for a file that holds no tensors.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, Mapping):
        return in_memory(source)
    if isinstance(source, ModelParts):
        return open_file(source.need(part))
    path = Path(source)
    if not path.is_dir():
        return open_file(path)
    if (file := find_file(path, FILES[part])) is None:
        raise FileNotFoundError(f"no {part} weights in {path}: looked for {', '.join(FILES[part])}")
    return open_file(file)


def open_file(path: Path) -> Weights:
    """The tensors of one file, or of the shards that an ``.index.json`` lists."""
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    if path.name.endswith(".index.json"):
        return Weights(str(path), _shards(path), path)
    if path.suffix == ".safetensors":
        return Weights(str(path), _safetensors(path), path)
    return Weights(str(path), _entries(_pickled(path)), path)


def in_memory(tensors: Mapping[str, Tensor], source: str = "the given tensors") -> Weights:
    """A state dict."""
    return Weights(source, _entries(tensors))


def wan_name(name: str) -> str:
    """A DiT tensor's original Wan name, from any of the names it is published under."""
    name = _WRAPPERS.sub("", name)
    while name.startswith("model."):
        name = _WRAPPERS.sub("", name.removeprefix("model."))
    for pattern, new in _DIFFUSERS:
        name = pattern.sub(new, name)
    return name


def some(names: Sequence[str]) -> str:
    """A few of these tensor names, for a message."""
    listed = ", ".join(names[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{listed}{more}: tensor{'s' if len(names) > 1 else ''}"


def _entries(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    return {name: Entry(tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}


def _pickled(path: Path) -> Mapping[str, Tensor]:
    """A torch file's tensors, mapped: pages are read when a tensor is copied. Only the old format is read whole."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:
        raise WeightsError(f"{path} is no file of weights: it is damaged, or holds more than tensors") from None
    for key in _INSIDE:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds no tensors by name")
    return {name: t for name, t in cast("Mapping[str, Any]", loaded).items() if isinstance(t, Tensor)}


def _safetensors(path: Path) -> dict[str, Entry]:
    try:
        handle: Any = safe_open(path, framework="pt")
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in list(handle.keys())}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is no safetensors file: {error}") from None
    return {name: Entry(shape, lambda name=name: handle.get_tensor(name)) for name, shape in shapes.items()}


def _shards(index: Path) -> dict[str, Entry]:
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is no index of shards: {error}") from None
    entries: dict[str, Entry] = {}
    for name in files:
        if name != Path(name).name:
            raise WeightsError(f"{index} names {name!r}, which is not beside it")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is missing beside it: fetch it again")
        entries |= _safetensors(index.parent / name)
    if lost := sorted(set(places) - set(entries)):
        raise WeightsError(f"{some(lost)} listed in {index} but in none of its files")
    return entries
