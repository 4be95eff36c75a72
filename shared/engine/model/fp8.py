"""The DiT blocks' matrix products in 8-bit floating point, by torchao: half the weights, twice the products per second.

Each row of a weight and each token of an activation has a scale of its own. Needs a GPU of compute capability 8.9 (Ada, Hopper)
or newer. The embeddings and the head stay as they are: they are small and the picture is sensitive to them.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from shared.engine.model.dit import Dit

LEAST_CAPABILITY = (8, 9)


class Fp8Error(ValueError):
    """8-bit products are not possible here; the message says what is missing."""


def to_fp8(model: Dit) -> None:
    """Replace the weights of the blocks' linear layers, in place. LoRAs must have been merged before. Raises Fp8Error."""
    device = model.time_weight.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        raise Fp8Error(f"fp8 needs a GPU of compute capability 8.9 or newer, the device is {device}: leave fp8 off")
    try:
        quantisation: Any = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise Fp8Error(
            f"fp8 needs torchao ({error}): in the checkout pip install -e '.[fp8]', or leave fp8 off"
        ) from None
    config = quantisation.Float8DynamicActivationFloat8WeightConfig(granularity=quantisation.PerRow())
    for block in model.layers():
        quantisation.quantize_(block, config, filter_fn=_is_served)
        # The parts of the joined projection would keep its wide weights alive; no forward reads them.
        for part in (block.self_attn.q, block.self_attn.k, block.self_attn.v):
            part.to("meta")


def parameter_bytes(parameter: Tensor) -> tuple[int, int]:
    """(an address that views share, bytes) of a parameter, quantised or not."""
    flatten = getattr(parameter, "__tensor_flatten__", None)
    if flatten is None:
        storage = parameter.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    inner = [getattr(parameter, name) for name in flatten()[0]]
    return inner[0].data_ptr(), sum(t.numel() * t.element_size() for t in inner)


def _is_served(module: nn.Module, name: str) -> bool:
    """The linear layers that a forward runs: of self-attention the fused projection, not its three parts."""
    return isinstance(module, nn.Linear) and not name.endswith(("self_attn.q", "self_attn.k", "self_attn.v"))
