"""LoRAs: small changes of a DiT's weights, merged into them. W = W₀ + Σ scale·Δ, so serving costs nothing extra.

The layouts in which LoRAs for Wan 2.1 are published: kohya (``lora_unet_blocks_0_self_attn_q.lora_down.weight``), PEFT in
original names (``diffusion_model.blocks.0.self_attn.q.lora_A.weight``) or in diffusers' (``transformer.blocks.0.attn1.to_q…``),
with ``alpha`` and with whole differences (``.diff`` of a weight, ``.diff_b`` of a bias, ``.diff_m`` of a modulation).

Scales may change while the model serves. Each change starts from the untouched weights, so that nothing drifts: the same
scales give the same bits, 0 gives W₀. The price is a copy of every weight that a LoRA touches, in host memory; a set that is
merged once and never changed (``keep_base=False``) does not pay it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.engine.model.checkpoints import Weights, WeightsError, in_memory, open_file, some, wan_name
from shared.engine.model.dit import Dit
from shared.engine.plan.spec import ModelSpec

_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_down|lora_up|lora_A|lora_B|alpha|diff_b|diff_m|diff)(?:\.[A-Za-z0-9_]+?)??(?:\.weight)?$"
)
_KIND = {"alpha": "alpha", "lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
_TARGET = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.")
_KOHYA = ("lora_unet_", "lora_transformer_")
_KOHYA_DIFFUSERS = (
    ("attn1_to_out_0", "self_attn_o"),
    ("attn2_to_out_0", "cross_attn_o"),
    ("attn1_to_", "self_attn_"),
    ("attn2_to_", "cross_attn_"),
    ("ffn_net_0_proj", "ffn_0"),
    ("ffn_net_2", "ffn_2"),
)


class LoraError(WeightsError):
    """A LoRA does not fit the model; the message names the keys and the file."""


@dataclass(slots=True)
class _Change:
    """What one LoRA does to one parameter: up·down·(alpha / rank), or a whole difference. Names in the file."""

    up: str = ""
    down: str = ""
    alpha: str = ""
    difference: str = ""


@dataclass(frozen=True, slots=True)
class Lora:
    """One file: the parameters it changes, read when they are merged."""

    weights: Weights
    changes: dict[str, _Change] = field(default_factory=dict)

    @classmethod
    def open(cls, spec: ModelSpec, source: Path | str | dict[str, Tensor] | Weights) -> Lora:
        """Sort a file's keys. Raises LoraError for keys that are no part of this model, or that lack their other half."""
        if isinstance(source, Weights):
            weights = source
        else:
            weights = in_memory(source) if isinstance(source, dict) else open_file(Path(source))
        with torch.device("meta"):
            shapes = {name: tuple(t.shape) for name, t in Dit(spec).state_dict().items()}
        flat = {name.rpartition(".")[0].replace(".", "_"): name.rpartition(".")[0] for name in shapes}
        lora, unknown = cls(weights), list[str]()
        for key in weights.entries:
            match = _KEY.fullmatch(key)
            module = _module(match["module"], flat) if match else ""
            kind = match["kind"] if match else ""
            target = f"{module}.{_TARGET.get(kind, 'weight')}"
            if target not in shapes:
                unknown.append(key)
                continue
            setattr(lora.changes.setdefault(target, _Change()), _KIND.get(kind, "difference"), key)
        if unknown:
            raise LoraError(f"{some(sorted(unknown))} not part of {spec.name}, in {weights.source}")
        for target, change in lora.changes.items():
            lora._check(target, change, shapes[target])
        return lora

    def delta(self, target: str, like: Tensor) -> Tensor:
        """The change of one parameter at scale 1: float32, in the parameter's shape, on its device."""
        change = self.changes[target]
        total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        if change.up:
            up, down = (self.weights.read(key).to(like.device, torch.float32) for key in (change.up, change.down))
            alpha = float(self.weights.read(change.alpha)) if change.alpha else float(down.shape[0])
            total += (up.flatten(1) @ down.flatten(1)).reshape(like.shape) * (alpha / down.shape[0])
        if change.difference:
            total += self.weights.read(change.difference).to(like.device, torch.float32).reshape(like.shape)
        return total

    def _check(self, target: str, change: _Change, shape: tuple[int, ...]) -> None:
        if bool(change.up) != bool(change.down):
            raise LoraError(f"{change.up or change.down}: its other half is missing in {self.weights.source}")
        if change.alpha and not change.up:
            raise LoraError(f"{change.alpha}: there is nothing that it scales in {self.weights.source}")
        if change.up:
            up, down = self.weights.shape(change.up), self.weights.shape(change.down)
            made = (up[0], *shape[1:]) if len(up) >= 2 and up[1] == down[0] else ()
            if made != shape or _size(down[1:]) != _size(shape[1:]) or _size(up[2:]) != 1:
                raise LoraError(
                    f"{change.up} {list(up)} and {change.down} {list(down)} do not make the {list(shape)} of {target} "
                    f"({self.weights.source})"
                )
        if change.difference and _size(self.weights.shape(change.difference)) != _size(shape):
            found = list(self.weights.shape(change.difference))
            raise LoraError(f"{change.difference} is {found}, {target} is {list(shape)} ({self.weights.source})")


class LoraSet:
    """LoRAs in a fixed order, merged into one Dit: whole, or one stage's blocks, whose factors alone are read.

    After a change of scales prompts must be set anew where they are in use: their keys and values come from these weights.
    """

    def __init__(self, loras: Sequence[Lora], *, keep_base: bool = True) -> None:
        self.loras = tuple(loras)
        self._keep_base = keep_base
        self._base: dict[str, Tensor] = {}
        self._applied = False

    @classmethod
    def open(cls, spec: ModelSpec, paths: Sequence[Path | str], *, keep_base: bool = True) -> LoraSet:
        """From files. Raises LoraError, WeightsError, FileNotFoundError."""
        return cls([Lora.open(spec, path) for path in paths], keep_base=keep_base)

    @torch.no_grad()
    def apply(self, dit: Dit, scales: Sequence[float]) -> None:
        """W = W₀ + Σ scale·Δ for every parameter that a LoRA changes and this Dit has, in place, at once for all.

        One set serves one Dit. Raises LoraError for a wrong number of scales, and for a second call without a base.
        """
        if len(scales) != len(self.loras):
            raise LoraError(f"{len(scales)} scales for {len(self.loras)} LoRAs")
        if self._applied and not self._keep_base:
            raise LoraError("these LoRAs were merged for good: load them with keep_base=True to change their scales")
        parameters: dict[str, nn.Parameter] = dict(dit.named_parameters())
        for name in dict.fromkeys(name for lora in self.loras for name in lora.changes if name in parameters):
            parameter = parameters[name]
            base = self._base.get(name)
            if base is None:
                base = parameter.detach().to("cpu", copy=True) if self._keep_base else parameter.detach()
                if self._keep_base:
                    self._base[name] = base
            merged = base.to(parameter.device, torch.float32, copy=True)
            for lora, scale in zip(self.loras, scales, strict=True):
                if scale and name in lora.changes:
                    merged.add_(lora.delta(name, parameter), alpha=scale)
            parameter.copy_(merged)
        self._applied = True

    def nbytes(self) -> int:
        """Bytes of host memory that the untouched weights take."""
        return sum(t.numel() * t.element_size() for t in self._base.values())


def _module(name: str, flat: dict[str, str]) -> str:
    """A module's original Wan name, from any layout; of an unknown one what is left of it."""
    for prefix in _KOHYA:
        if name.startswith(prefix):
            plain = name.removeprefix(prefix)
            for theirs, ours in _KOHYA_DIFFUSERS:
                plain = plain.replace(theirs, ours)
            return flat.get(plain, plain)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return wan_name(f"{name}.").removesuffix(".")


def _size(shape: Sequence[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
