"""A prompt's embedding as the session store keeps it: exact, and in half the room where its encoder computes in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def to_store(embedding: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """(dtype, shape, bytes) of a float32 embedding on the CPU: bfloat16 if every value is one, bit for bit."""
    half = embedding.bfloat16()
    same = torch.equal(half.float().view(torch.int32), embedding.view(torch.int32))
    dtype, kept = ("bfloat16", half.view(torch.int16)) if same else ("float32", embedding)
    return dtype, tuple(embedding.shape), kept.numpy().tobytes()


def from_store(dtype: str, shape: Sequence[int], data: bytes) -> Tensor:
    """The float32 embedding that was stored. Raises KeyError, RuntimeError, ValueError for what is none."""
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).reshape(tuple(shape)).float()
