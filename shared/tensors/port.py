"""What every way of reaching a tensor shares: errors, dtypes, and the place a tensor is valid at."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.contracts.refs import TensorRef


class TensorError(RuntimeError):
    """Base of what the tensor store may raise. Every message is one line."""


class TensorStoreFullError(TensorError):
    """The store's memory is all leased. The reader is too slow, or does not release."""


class StaleTensorError(TensorError, LookupError):
    """The lease is over: the slot is free, reused, or its owner is gone. The bytes must not be used."""


@dataclass(slots=True)
class TensorCounters:
    """``expired`` leases ended by their time limit, not by a release: a reader died or forgot."""

    puts: int = 0
    gets: int = 0
    fetches: int = 0
    released: int = 0
    expired: int = 0
    stale: int = 0
    full: int = 0


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
