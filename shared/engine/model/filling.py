"""Tensors from files into modules that were built without data, one tensor at a time and each checked first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shared.engine.model.checkpoints import Weights, WeightsError, some


def complaints(model: nn.Module, weights: Weights, elsewhere: tuple[str, ...] = ()) -> list[str]:
    """What is wrong with these weights for this module, by name and shape only: empty when all is well. Reads no data.

    ``elsewhere`` are prefixes of tensors that may be present without being wanted.
    """
    expected: Mapping[str, Tensor] = model.state_dict()
    present = weights.entries
    missing = sorted(name for name in expected if name not in present)
    extra = sorted(n for n in present if n not in expected and not n.startswith(elsewhere))
    found: list[str] = []
    if missing:
        found.append(f"{some(missing)} missing in {weights.source}")
    if extra:
        found.append(f"{some(extra)} not part of this model, in {weights.source}")
    for name, target in expected.items():
        if name in present and weights.shape(name) != tuple(target.shape):
            shapes = f"{list(weights.shape(name))}, the model needs {list(target.shape)}"
            found.append(f"{name} is {shapes} ({weights.source})")
    return found


def fill(
    model: nn.Module,
    weights: Weights,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    elsewhere: tuple[str, ...] = (),
) -> None:
    """Give a meta-device module its tensors: only those it has are read, each goes to the device before the next is read.

    So the host never holds more than one tensor beyond what stays there. Raises WeightsError with the first complaint.
    """
    if wrong := complaints(model, weights, elsewhere):
        raise WeightsError(wrong[0])
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        state[name] = weights.read(name).to(device, dtype, copy=True).contiguous()
    model.load_state_dict(state, assign=True)
