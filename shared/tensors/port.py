"""What every way of reaching a tensor shares: errors, dtypes, and the place a tensor is valid at."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shared.contracts.refs import TensorPlace, TensorRef

TTL_S = 30.0


class TensorError(RuntimeError):
    """Base of what the tensor store may raise. Every message is one line."""


class TensorStoreFullError(TensorError):
    """The store's memory is all leased. The reader is too slow, or does not release."""


class StaleTensorError(TensorError, LookupError):
    """The lease is over: the slot is free, reused, or its owner is gone. The bytes must not be used."""


@dataclass(slots=True)
class TensorCounters:
    """``expired`` leases ended by their time limit, not by a release: a reader died or forgot.

    ``device_fetched``: tensors on the device that a reader could not open there and fetched over the bus.
    """

    puts: int = 0
    gets: int = 0
    fetches: int = 0
    released: int = 0
    expired: int = 0
    stale: int = 0
    full: int = 0
    device_fetched: int = 0


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype that the bytes of a ``TensorRef`` are read with: numpy has no bfloat16, so it comes as uint16."""
    return np.dtype("uint16" if name == "bfloat16" else name)


def byte_size(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor of this shape and dtype name."""
    return math.prod(shape) * numpy_dtype(dtype).itemsize


def size_of(ref: TensorRef) -> int:
    """Bytes that ``ref`` speaks of."""
    return byte_size(ref.shape, ref.dtype)


def as_array(data: bytes | bytearray | memoryview, ref: TensorRef) -> np.ndarray[Any, Any]:
    """Whole bytes as the array that ``ref`` describes. Raises StaleTensorError when their number is wrong."""
    if len(data) != size_of(ref):
        raise StaleTensorError(f"{len(data)} bytes came for a tensor of {size_of(ref)}")
    return np.frombuffer(data, numpy_dtype(ref.dtype)).reshape(ref.shape)


def host_identity(shm_dir: Path) -> str:
    """Equal for two processes exactly when they see the same ``shm_dir`` of the same boot: containers may not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = os.uname().nodename
    info = os.stat(shm_dir)
    return hashlib.blake2s(f"{boot}:{info.st_dev}:{info.st_ino}".encode(), digest_size=8).hexdigest()


class TensorReader(Protocol):
    """What a service that only reads needs."""

    async def fetch(self, ref: TensorRef) -> np.ndarray[Any, Any]:
        """The tensor by the cheapest way: this process, shared memory, or over the bus. Raises StaleTensorError."""
        ...

    def release(self, ref: TensorRef) -> bool:
        """End the lease: one's own, or one of this host through the slot's header. False when that is impossible."""
        ...

    async def release_anywhere(self, ref: TensorRef) -> bool:
        """``release``, by asking the owner where that is needed. False when the lease is left to expire."""
        ...


class TensorStore(TensorReader, Protocol):
    """The tensors of one process. ``HostTensorStore`` is the one there is."""

    counters: TensorCounters

    def put(
        self,
        array: np.ndarray[Any, Any],
        *,
        place: TensorPlace = TensorPlace.SHM,
        ttl_s: float = TTL_S,
        dtype: str | None = None,
    ) -> TensorRef:
        """Copy ``array`` to a place that readers reach, and lease it. ``dtype="bfloat16"`` names raw uint16 words.

        SHM and INLINE copy; LOCAL keeps the array itself. Raises TensorStoreFullError, and ValueError for a dtype or a
        size that no reference may have.
        """
        ...

    def put_local(self, obj: Any, shape: tuple[int, ...], dtype: str, *, ttl_s: float = TTL_S) -> TensorRef:
        """Lease an object of this process, e.g. a torch tensor on the device. Others fetch a copy over the bus."""
        ...

    def put_device(
        self,
        obj: Any,
        shape: tuple[int, ...],
        dtype: str,
        handle: bytes,
        on_end: Callable[[bool], None] | None,
        *,
        ttl_s: float = TTL_S,
    ) -> TensorRef:
        """Lease a device tensor that other processes of this host open by ``handle``. Others fetch a copy over the bus.

        ``on_end`` is called once when the lease ends: True when by ``release_opened``. Raises TensorStoreFullError, and
        ValueError as ``put`` does.
        """
        ...

    def release_opened(self, ref: TensorRef) -> bool:
        """End the lease of a device tensor that was opened by its handle and closed again. False as ``release``."""
        ...

    def is_leased(self, ref: TensorRef) -> bool:
        """Whether the lease of a slot of this host still holds: asked before and after its device memory is read."""
        ...

    def is_local(self, ref: TensorRef) -> bool:
        """Whether ``get_local`` can give the object itself."""
        ...

    def get_local(self, ref: TensorRef) -> Any:
        """The object that was put, not a copy. Raises StaleTensorError."""
        ...

    def get(self, ref: TensorRef, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """A copy of the tensor, into ``out`` when given. Raises StaleTensorError, also when it is out of reach."""
        ...

    def sweep(self) -> int:
        """End the leases that have expired; how many there were."""
        ...
