"""Tensors between the device and references: the cheapest way that the reader's place allows.

Roles of one process hand the tensor itself over. Between processes a tensor on a GPU goes by CUDA IPC where it can, else
through shared memory; on another host, over the bus. The writer does not know its reader: it exports from the GPU
until a reader had to fetch what it could not open, and takes shared memory from then on.
"""

from __future__ import annotations

import asyncio
import logging

import numpy as np
import torch

from shared.contracts.refs import TensorPlace, TensorRef
from shared.tensors import cuda_ipc
from shared.tensors.port import StaleTensorError, TensorError, TensorStore

log = logging.getLogger(__name__)


def publish_local(tensors: TensorStore, tensor: torch.Tensor, ttl_s: float) -> TensorRef:
    """A reference that only this process's roles can read without a copy."""
    return tensors.put_local(tensor, tuple(tensor.shape), _name(tensor), ttl_s=ttl_s)


def publish_shared(tensors: TensorStore, tensor: torch.Tensor, ttl_s: float) -> TensorRef:
    """A reference for other processes. bfloat16 travels as raw 16-bit words."""
    if tensor.numel() and way_out(tensor.device, tensors.counters.device_fetched) is TensorPlace.CUDA_IPC:
        try:
            kept, handle, end = cuda_ipc.export(tensor)
        except RuntimeError as error:
            # As if a reader had failed: containers without IPC say so at the first tensor.
            tensors.counters.device_fetched += 1
            log.warning("the GPU exports no tensors, shared memory is taken: %s", str(error).splitlines()[0])
        else:
            try:
                return tensors.put_device(kept, tuple(kept.shape), _name(kept), handle, end, ttl_s=ttl_s)
            except BaseException:
                end(False)
                raise
    host = tensor.detach().to("cpu").contiguous()
    if host.dtype is torch.bfloat16:
        words = host.view(torch.int16).numpy().view(np.uint16)
        return tensors.put(words, ttl_s=ttl_s, dtype="bfloat16")
    return tensors.put(host.numpy(), ttl_s=ttl_s)


def way_out(device: torch.device, fetched: int) -> TensorPlace:
    """Where a tensor for other processes is put, given how many exported ones had to be fetched."""
    return TensorPlace.CUDA_IPC if device.type == "cuda" and not fetched else TensorPlace.SHM


async def receive(tensors: TensorStore, ref: TensorRef, device: torch.device) -> torch.Tensor:
    """The tensor behind a reference, on ``device``; the lease is given back. Raises StaleTensorError when it is over."""
    if tensors.is_local(ref):
        tensor: torch.Tensor = tensors.get_local(ref)
        tensors.release(ref)
        return tensor.to(device)
    if ref.place is TensorPlace.CUDA_IPC and device.type == "cuda" and tensors.is_leased(ref):
        try:
            return await _receive_ipc(tensors, ref, device)
        except cuda_ipc.NoIpcError as error:
            log.warning("%s: it is fetched", error)
    array = await tensors.fetch(ref)
    await tensors.release_anywhere(ref)
    if ref.dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


async def _receive_ipc(tensors: TensorStore, ref: TensorRef, device: torch.device) -> torch.Tensor:
    try:
        # In a thread: it waits for the owner's forward, and for the copy.
        copied = await asyncio.to_thread(cuda_ipc.read, ref, device, cuda_ipc.visible_gpus())
    except (cuda_ipc.NoIpcError, TensorError):
        raise
    except RuntimeError as error:
        tensors.release_opened(ref)
        raise TensorError(f"device tensor of {ref.owner}: {str(error).splitlines()[0]}") from error
    if not tensors.release_opened(ref):
        tensors.counters.stale += 1
        raise StaleTensorError(f"the lease of device tensor {ref.slot} of {ref.owner} ended while it was read")
    tensors.counters.gets += 1
    return copied


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
