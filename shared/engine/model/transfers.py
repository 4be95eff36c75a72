"""Copies between host and device that do not make the host wait, and tensors that change their CUDA stream."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From the host to a GPU it goes through pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_host(tensor: Tensor, *, wait: bool) -> Tensor:
    """The tensor on the host. Without ``wait`` a copy from a GPU is done when the current CUDA stream gets there."""
    if tensor.device.type != "cuda" or wait:
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def used_here(tensor: Tensor) -> Tensor:
    """Tell the allocator that the current CUDA stream reads this tensor, which another stream may have made.

    Otherwise its memory could be given away while it is still being read.
    """
    if tensor.device.type == "cuda":
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor
