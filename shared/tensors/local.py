"""Tensors that stay in their process: any object, e.g. one on the device, leased like the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Export = Callable[[Any], np.ndarray[Any, Any]]


class LocalFullError(RuntimeError):
    """Too many objects are leased."""


@dataclass(slots=True)
class _Held:
    value: Any
    generation: int
    expires_ns: int


class LocalShelf:
    """Objects under slot numbers of their own, counted down from −2 so that they never meet those of the arena."""

    def __init__(self, max_objects: int, first_generation: int) -> None:
        self._max = max_objects
        self._generation = first_generation
        self._held: dict[int, _Held] = {}
        self._next = -2

    def __len__(self) -> int:
        return len(self._held)

    def put(self, value: Any, expires_ns: int) -> tuple[int, int]:
        """(slot, generation). Raises LocalFullError."""
        if len(self._held) >= self._max:
            raise LocalFullError
        slot, generation = self._next, self._generation
        self._next -= 1
        self._generation += 1
        self._held[slot] = _Held(value, generation, expires_ns)
        return slot, generation

    def get(self, slot: int, generation: int) -> Any:
        """The object; None when its lease is over."""
        held = self._held.get(slot)
        return held.value if held is not None and held.generation == generation else None

    def release(self, slot: int, generation: int) -> bool:
        """Forget the object; False when its lease was over."""
        held = self._held.get(slot)
        if held is None or held.generation != generation:
            return False
        del self._held[slot]
        return True

    def sweep(self, now_ns: int) -> int:
        """Forget what has expired; how many."""
        over = [slot for slot, held in self._held.items() if held.expires_ns <= now_ns]
        for slot in over:
            del self._held[slot]
        return len(over)

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()


def export(value: Any) -> np.ndarray[Any, Any]:
    """An object's bytes on the host as a numpy array: numpy arrays themselves, and torch tensors of any device.

    Works by duck typing, since most services have no torch. A bfloat16 tensor becomes its raw 16-bit words.
    """
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value)
    host = value.detach().cpu().contiguous()
    if str(host.dtype) == "torch.bfloat16":
        shape = tuple(host.shape)
        words = host.reshape(-1).untyped_storage()
        raw = bytes(words)[host.storage_offset() * 2 : (host.storage_offset() + host.numel()) * 2]
        return np.frombuffer(raw, np.uint16).reshape(shape)
    return host.numpy()
