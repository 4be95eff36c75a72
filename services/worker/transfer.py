"""Tensors between the device and references: the cheapest way that the reader's place allows."""

from __future__ import annotations

import numpy as np
import torch

from shared.contracts.refs import TensorRef
from shared.tensors.port import TensorStore

_NUMPY_OF = {torch.float32: np.float32, torch.float16: np.float16, torch.uint8: np.uint8}


def publish_local(tensors: TensorStore, tensor: torch.Tensor, ttl_s: float) -> TensorRef:
    """A reference that only this process's roles can read: no copy."""
    return tensors.put_local(tensor, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), ttl_s=ttl_s)


def publish_shared(tensors: TensorStore, tensor: torch.Tensor, ttl_s: float) -> TensorRef:
    """A reference for other processes. bfloat16 travels as raw 16-bit words."""
    host = tensor.detach().to("cpu").contiguous()
    if host.dtype is torch.bfloat16:
        words = host.view(torch.int16).numpy().view(np.uint16)
        return tensors.put(words, ttl_s=ttl_s, dtype="bfloat16")
    return tensors.put(host.numpy(), ttl_s=ttl_s)


async def receive(tensors: TensorStore, ref: TensorRef, device: torch.device) -> torch.Tensor:
    """The tensor behind a reference, on ``device``; the lease is given back. Raises StaleTensorError when it is over."""
    if tensors.is_local(ref):
        tensor: torch.Tensor = tensors.get_local(ref)
        tensors.release(ref)
        return tensor.to(device)
    array = await tensors.fetch(ref)
    await tensors.release_anywhere(ref)
    if ref.dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)
