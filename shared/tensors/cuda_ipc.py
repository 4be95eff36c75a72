"""Tensors that go from GPU to GPU of one host: the owner exports a handle, the reader opens it and copies.

The handle (plain numbers and bytes, MessagePack) travels in ``TensorRef.data``. The owner keeps the tensor until its lease
ends: a reader ends it through the slot's header in shared memory, as it does with any tensor of the host. A reader
that cannot open the handle (no CUDA, another GPU, another container) fetches a copy over the bus.

torch counts who has an exported storage open, and keeps its memory until the count is zero. It starts at one, for the
reader, who takes that one off by closing the storage. Where no reader opened it (it never came, died, or
fetched) the owner takes it off when the lease ends. Never both: the count has no sign, and below zero is for ever.

torch is imported inside the functions: most services that import the tensor store have none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import cache
from typing import TYPE_CHECKING

import msgpack

from shared.contracts.refs import TensorRef
from shared.tensors.port import StaleTensorError, size_of

if TYPE_CHECKING:
    import torch

COUNTERS = 10_000
"""Counters in one of torch's counter files; an offset beyond them would write into strange memory."""
_COUNTER_FILE = re.compile(rb"/torch_\d+_\d+_\d+")
_TYPES = (str, bytes, int, int, bytes, int, bytes, bool, int)
_MOST = 1 << 48


class NoIpcError(RuntimeError):
    """This process cannot open the handle; the tensor must be fetched. One line."""


@dataclass(frozen=True, slots=True)
class IpcHandle:
    """What opens an exported storage.

    ``gpu`` is the device's UUID, since processes may number the GPUs differently; ``memory`` the driver's handle of the
    allocation that the storage's ``size`` bytes lie in at ``offset``; ``counter`` and ``counter_offset`` where torch counts
    readers; ``event`` what the reader's stream must wait for if ``wait``; ``first`` the tensor's first element in the storage.
    """

    gpu: str
    memory: bytes
    size: int
    offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    wait: bool
    first: int

    def pack(self) -> bytes:
        """As bytes."""
        return bytes(msgpack.packb(astuple(self)) or b"")

    @classmethod
    def unpack(cls, data: bytes) -> IpcHandle:
        """The inverse of :meth:`pack`. Raises StaleTensorError for bytes that are no handle."""
        try:
            fields = msgpack.unpackb(data)
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise StaleTensorError(f"a device tensor's handle cannot be read: {error}") from None
        if not isinstance(fields, list) or [type(f) for f in fields] != list(_TYPES):
            raise StaleTensorError("a device tensor's handle has other fields than it must have")
        handle = cls(*fields)
        numbers = (handle.size, handle.offset, handle.first)
        if any(not 0 <= n <= _MOST for n in numbers) or not 0 <= handle.counter_offset < COUNTERS:
            raise StaleTensorError("a device tensor's handle points outside of what can be opened")
        if not _COUNTER_FILE.fullmatch(handle.counter):
            raise StaleTensorError(f"a device tensor's handle counts its readers in {handle.counter[:64]!r}")
        return handle

    def check(self, ref: TensorRef, itemsize: int) -> None:
        """Raises StaleTensorError when the tensor that ``ref`` describes does not lie in the storage."""
        if self.first * itemsize + size_of(ref) > self.size:
            raise StaleTensorError(f"a tensor of {size_of(ref)} bytes does not lie in an exported {self.size} bytes")


def export(tensor: torch.Tensor) -> tuple[torch.Tensor, bytes, Callable[[bool], None]]:
    """(what must be kept until the lease ends, the handle, what must be called then) of a CUDA tensor.

    The reader waits for what the current stream has been given so far. Raises RuntimeError where the driver
    exports nothing.
    """
    import torch

    kept = tensor.detach().contiguous()
    storage = kept.untyped_storage()
    _, memory, size, offset, counter, counter_offset, event, wait = storage._share_cuda_()
    gpu = str(torch.cuda.get_device_properties(kept.device).uuid)
    handle = IpcHandle(
        gpu, memory, size, offset, counter, counter_offset, event, bool(wait), int(kept.storage_offset())
    )
    device = kept.device.index

    def end(opened: bool) -> None:
        if not opened:
            torch.UntypedStorage._release_ipc_counter(counter, counter_offset, device=device)

    return kept, handle.pack(), end


@cache
def visible_gpus() -> dict[str, int]:
    """UUID → index of the GPUs that this process sees; empty without torch or CUDA."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    return {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}


def read(ref: TensorRef, device: torch.device, gpus: dict[str, int]) -> torch.Tensor:
    """A copy of the tensor in this process's memory on ``device``, complete when this returns. Call it off the event loop.

    It is copied on a stream of its own: waiting for it does not wait for forwards under way. The caller checks the
    lease afterwards and ends it as opened. Raises NoIpcError where nothing was opened and the tensor must be fetched,
    StaleTensorError for a bad handle, RuntimeError when the opened tensor cannot be copied.
    """
    handle = IpcHandle.unpack(ref.data or b"")
    index = gpus.get(handle.gpu)
    if device.type != "cuda" or index is None:
        raise NoIpcError(f"{handle.gpu} of {ref.owner} is not among this process's {len(gpus)} GPUs")
    import torch

    dtype = getattr(torch, ref.dtype)
    handle.check(ref, dtype.itemsize)
    with torch.cuda.device(index), torch.cuda.stream(torch.cuda.Stream(index)):
        opened = _open(handle, index, ref.owner)
        flat = torch.empty(0, dtype=dtype, device=f"cuda:{index}").set_(opened)
        source = flat[handle.first : handle.first + math.prod(ref.shape)].view(ref.shape)
        try:
            copied = source.clone().to(device)
            torch.cuda.current_stream().synchronize()
            if device.index not in (None, index):
                torch.cuda.synchronize(device)
        finally:
            # Closed while this stream is the current one, which closing waits for.
            del source, flat, opened
    # The forwards run on the default stream: its memory may not be reused while they read it.
    copied.record_stream(torch.cuda.default_stream(device))
    return copied


def _open(handle: IpcHandle, index: int, owner: str) -> torch.UntypedStorage:
    import torch

    try:
        return torch.UntypedStorage._new_shared_cuda(
            index,
            handle.memory,
            handle.size,
            handle.offset,
            handle.counter,
            handle.counter_offset,
            handle.event,
            handle.wait,
        )
    except RuntimeError as error:
        raise NoIpcError(f"the device tensor of {owner} cannot be opened: {str(error).splitlines()[0]}") from None
