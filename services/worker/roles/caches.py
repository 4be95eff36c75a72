"""The autoencoder's caches of one direction, by stream: made, moved to the host and back, handed to another worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shared.engine.moving import Carried, carried_memory, carry_memory


class Caches:
    """``name`` is the direction, ``make`` gives an empty memory of the autoencoder in use."""

    def __init__(self, name: str, make: Callable[[], Any], device: torch.device) -> None:
        self._name, self._make, self._device = name, make, device
        self._states: dict[str, Any] = {}
        self._aside: dict[str, Carried] = {}

    def open(self, stream: str) -> None:
        """A new stream, or the same one anew: its cache starts empty."""
        self._aside.pop(stream, None)
        self._states[stream] = self._make()

    def close(self, stream: str) -> None:
        """Forget a stream."""
        self._aside.pop(stream, None)
        self._states.pop(stream, None)

    def of(self, stream: str) -> Any:
        """The stream's cache on the device, brought back if need be. Raises KeyError for an unknown stream."""
        self.resume(stream)
        return self._states[stream]

    def nbytes(self) -> dict[str, int]:
        """Bytes of each stream's cache on the device."""
        return {stream: state.nbytes() for stream, state in self._states.items()}

    @property
    def suspended(self) -> dict[str, int]:
        """The streams whose caches are on the host, with their bytes there."""
        return {stream: carried.nbytes() for stream, carried in self._aside.items()}

    def carry(self, stream: str) -> Carried:
        """A copy on the host. Raises KeyError for an unknown stream."""
        aside = self._aside.get(stream)
        return aside if aside is not None else carry_memory(self._name, self._states[stream].values())

    def restore(self, stream: str, carried: Carried) -> None:
        """The stream goes on from a copy, if there is one of this direction. Raises ValueError for another kind of memory."""
        if self._name not in carried.meta:
            return
        state = self._make()
        state.restore(carried_memory(self._name, carried, self._device))
        self._aside.pop(stream, None)
        self._states[stream] = state

    def suspend(self, stream: str) -> int:
        """Move the cache to the host; the bytes there."""
        if stream not in self._aside:
            self._aside[stream] = self.carry(stream)
            self._states[stream] = self._make()
        return self._aside[stream].nbytes()

    def resume(self, stream: str) -> None:
        """Move it back. Not suspended: nothing happens."""
        aside = self._aside.pop(stream, None)
        if aside is not None:
            self.restore(stream, aside)
