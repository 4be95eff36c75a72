"""Carried state as one run of bytes in parts of bounded size, and back: what travels between workers.

The layout, as JSON, names each tensor's dtype, its sides, their order in memory (kernels depend on it) and its first byte.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from shared.engine.moving import Carried

PART_BYTES = 64 << 20
"""Small enough for a segment of shared memory, large enough that a stream of a 14B model is a few dozen."""
MAX_BYTES = 1 << 38
ALIGN = 16
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64)
}


class StatePartsError(ValueError):
    """Bytes that are no carried state; the message says why."""


def to_parts(carried: Carried, part_bytes: int = PART_BYTES) -> tuple[bytes, list[Tensor]]:
    """The layout and the bytes, cut: uint8 tensors of ``part_bytes``, the last one shorter."""
    entries: list[dict[str, Any]] = []
    pieces: list[Tensor] = []
    at = 0
    for name, tensor in carried.tensors.items():
        order = sorted(range(tensor.dim()), key=lambda side: (-tensor.stride(side), side))
        raw = tensor.permute(order).contiguous().reshape(-1).view(torch.uint8)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise StatePartsError(f"{name}: {dtype} does not travel")
        entries.append({"name": name, "dtype": dtype, "shape": list(tensor.shape), "order": order, "at": at})
        pieces.append(raw)
        if gap := -len(raw) % ALIGN:
            pieces.append(torch.zeros(gap, dtype=torch.uint8))
        at += len(raw) + gap
    whole = torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.uint8)
    layout = json.dumps({"meta": carried.meta, "entries": entries, "bytes": at}, separators=(",", ":")).encode()
    return layout, list(whole.split(part_bytes)) if at else []


def from_parts(layout: bytes, parts: list[Tensor]) -> Carried:
    """What was put in. Raises StatePartsError for a layout that is damaged or of other bytes."""
    try:
        described: dict[str, Any] = json.loads(layout)
        size = sum(part.numel() for part in parts)
        if described["bytes"] != size or not 0 <= size < MAX_BYTES:
            raise StatePartsError(f"{size} bytes came, the layout is of {described['bytes']}")
        whole = torch.cat([part.reshape(-1) for part in parts]) if parts else torch.zeros(0, dtype=torch.uint8)
        tensors: dict[str, Tensor] = {}
        for entry in described["entries"]:
            dtype, shape, order, at = _DTYPES[entry["dtype"]], entry["shape"], entry["order"], entry["at"]
            end = at + math.prod(shape) * dtype.itemsize
            if at < 0 or at % ALIGN or end > size or sorted(order) != list(range(len(shape))):
                raise StatePartsError(f"{entry['name']} does not lie within the bytes")
            dense = whole[at:end].view(dtype).reshape([shape[side] for side in order])
            tensors[entry["name"]] = dense.permute([order.index(side) for side in range(len(order))])
        return Carried(dict(described["meta"]), tensors)
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, json.JSONDecodeError) as error:
        raise StatePartsError(f"the layout of a carried state is damaged: {error}") from None
