"""What is known of a DiT's files before a tensor is read: is it this model, and is it a model we serve at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from shared.engine.model.checkpoints import Source, Weights, WeightsError, open_weights, wan_name
from shared.engine.model.dit import Dit
from shared.engine.model.filling import complaints
from shared.engine.plan.model_parts import Part
from shared.engine.plan.spec import ModelSpec

_HARMLESS = ("freqs", "rope.")
"""Buffers that some checkpoints carry; they are computed here."""
_IMAGE_INPUT = re.compile(r"^img_emb\.|_img\.|\.add_[kv]_proj\.|\.norm_added_[kv]\.")
_IMAGE_CHANNELS = 36
_CONFIG = {
    "dim": "dim",
    "ffn_dim": "ffn_dim",
    "num_layers": "layers",
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "attention_head_dim": "head_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "text_len": "text_len",
    "in_dim": "latent_channels",
    "in_channels": "latent_channels",
}
"""``config.json``'s names, original Wan's and diffusers', and ours."""


def open_dit(spec: ModelSpec, source: Source) -> Weights:
    """A DiT's tensors in original Wan names, checked to be of this model. Raises WeightsError, FileNotFoundError."""
    weights = open_weights(source, Part.DIT).renamed(wan_name).without(_HARMLESS)
    if weights.path is not None:
        _check_config(spec, weights.path.parent / "config.json")
    patch = weights.entries.get("patch_embedding.weight")
    if any(_IMAGE_INPUT.search(name) for name in weights.entries) or (patch and patch.shape[1:2] == (_IMAGE_CHANNELS,)):
        raise WeightsError(
            f"{weights.source} is an image-to-video model, which Rheocast does not serve: use a text-to-video one (T2V)"
        )
    found = _sizes(spec, weights)
    if wrong := {name: value for name, value in found.items() if value != getattr(spec, name)}:
        theirs = ", ".join(f"{name} {value}" for name, value in wrong.items())
        ours = ", ".join(f"{name} {getattr(spec, name)}" for name in wrong)
        raise WeightsError(f"{weights.source} has {theirs}, but {spec.name} has {ours}: another model's weights?")
    return weights


def elsewhere_of(model: Dit) -> tuple[str, ...]:
    """Prefixes of tensors that other stages own: no error here. What no stage of the model owns is one."""
    prefixes = [f"blocks.{i}." for i in range(model.spec.layers) if i not in model.range]
    prefixes += [] if model.is_first else ["patch_embedding."]
    prefixes += [] if model.is_last else ["head."]
    return tuple(prefixes)


def check_dit(spec: ModelSpec, source: Source) -> list[str]:
    """What is wrong with a whole model's DiT, one line each; names and shapes only, no data is read."""
    try:
        weights = open_dit(spec, source)
    except (WeightsError, FileNotFoundError) as error:
        return [str(error)]
    with torch.device("meta"):
        return complaints(Dit(spec), weights)


def _check_config(spec: ModelSpec, path: Path) -> None:
    """``config.json`` beside the weights agrees with the spec. Raises WeightsError with both values."""
    if not path.is_file():
        return
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, Mapping):
        raise WeightsError(f"{path} holds no JSON object")
    values = cast("Mapping[str, Any]", config)
    kind = values.get("model_type")
    if isinstance(kind, str) and kind in ("i2v", "flf2v", "vace", "ti2v"):
        raise WeightsError(f"{path}: model_type is {kind}, Rheocast serves text-to-video models (t2v)")
    for theirs, ours in _CONFIG.items():
        value = values.get(theirs)
        if value is not None and value != getattr(spec, ours):
            raise WeightsError(
                f"{path}: {theirs} is {value}, but {spec.name} has {getattr(spec, ours)}: another model's?"
            )


def _sizes(spec: ModelSpec, weights: Weights) -> dict[str, int]:
    """Sizes that the tensors tell, by the spec's names."""
    found: dict[str, int] = {}
    if (time := weights.entries.get("time_embedding.0.weight")) and len(time.shape) == 2:
        found["dim"] = time.shape[0]
    blocks = [int(m[1]) for name in weights.entries if (m := re.fullmatch(r"blocks\.(\d+)\.modulation", name))]
    if blocks:
        # A state dict may hold one stage's blocks only: fewer are no complaint here, those that are missed are named.
        found["layers"] = max(spec.layers, max(blocks) + 1)
        first = weights.entries.get(f"blocks.{min(blocks)}.ffn.0.bias")
        if first is not None:
            found["ffn_dim"] = first.shape[0]
    return found
