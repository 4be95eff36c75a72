"""References: how events speak of pixels, latents and activations without carrying them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "bool": 1,
        "uint8": 1,
        "int8": 1,
        "uint16": 2,
        "int16": 2,
        "float16": 2,
        "bfloat16": 2,
        "uint32": 4,
        "int32": 4,
        "float32": 4,
        "uint64": 8,
        "int64": 8,
        "float64": 8,
    }
)
"""The dtypes that a tensor may have, with the bytes of one element."""
MAX_DIMS = 8
MAX_TENSOR_BYTES = 1 << 30


def check_tensor(shape: Sequence[int], dtype: str) -> None:
    """Raises ValueError for a tensor that no reference may speak of: odd dtype or shape, or more than 1 GiB.

    A reader allocates what a reference says before it has seen a byte, so a reference must not say just anything.
    """
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype[:32]!r} is none of {', '.join(DTYPE_BYTES)}")
    if len(shape) > MAX_DIMS or any(side < 0 for side in shape):
        raise ValueError(f"a shape has at most {MAX_DIMS} sides, none below 0")
    # Empty sides count as 1: the rest must still be a shape that can be made.
    if math.prod(max(1, side) for side in shape) * DTYPE_BYTES[dtype] > MAX_TENSOR_BYTES:
        raise ValueError(f"a tensor has at most {MAX_TENSOR_BYTES} bytes")


class Wire(BaseModel):
    """Base of everything on the wire: frozen; unknown fields are ignored, so contracts can grow."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class TensorPlace(StrEnum):
    """Where the bytes of a tensor are."""

    LOCAL = (
        "local"  # in the owner's process, maybe on its device: only the owner's own roles can read it without a copy
    )
    SHM = "shm"  # in a shared-memory slot of the owner's host
    CUDA_IPC = "cuda_ipc"  # on the owner's GPU, exported to other processes of the host
    INLINE = "inline"  # in the message itself: small tensors only


class TensorRef(Wire):
    """A leased tensor.

    ``owner`` is the instance id of the process that holds it (it answers ``rheo.tensor.<owner>.get``), ``host`` the
    host identity that shared memory is valid on, ``segment`` the shared-memory file name, ``slot`` the slot number,
    ``offset`` the byte offset of the slot's data in the segment, ``generation`` the lease's generation: a slot that was
    reused has another, and reading with an old one is an error, not a wrong picture. ``dtype`` is a numpy name
    ("uint8", "float32", "bfloat16" as raw 16-bit words; see ``DTYPE_BYTES``). ``expires_ns`` is the backstop, on the
    owner's monotonic clock. What ``check_tensor`` refuses is no reference.
    """

    owner: str
    host: str
    place: TensorPlace
    shape: tuple[int, ...]
    dtype: str
    slot: int = -1
    generation: int = 0
    segment: str = ""
    offset: int = 0
    expires_ns: int = 0
    data: bytes | None = None

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        check_tensor(self.shape, self.dtype)
        return self
