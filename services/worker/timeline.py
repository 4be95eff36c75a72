"""When a job's device work is really done: at once on a CPU; on a GPU, when its CUDA stream gets there.

On a GPU the device thread only enqueues. The autoencoder and the copies have a stream of their own beside the DiT's, so a
decode does not hold up the next batch, and the host prepares a batch while the one before computes. A job's result is
handed on only after its stream has reached the job's end: whatever another job is given has been computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from services.worker.core import Rank

DIT, VAE = "dit", "vae"
_LANES = {Rank.ENCODE: VAE, Rank.DECODE: VAE}


def lane_of(rank: Rank) -> str:
    """Which of the device's streams a job of this rank runs on."""
    return _LANES.get(rank, DIT)


class Mark(Protocol):
    """The end of one job's device work."""

    def wait(self) -> float:
        """Block until the device is there; returns the milliseconds that the job took on the device."""
        ...


class Timeline(Protocol):
    """How the device thread runs jobs. ``lanes`` complete independently; an empty tuple: jobs are done when they return."""

    lanes: tuple[str, ...]

    def mark(self, lane: str, run: Callable[[], Any]) -> tuple[Any, Mark | None]:
        """Run a job on its lane; returns its value, and its end where that is still to come."""
        ...

    def is_lost(self, error: Exception) -> bool:
        """Whether what a job raised came from the device itself, which can do nothing more."""
        ...


class HostTimeline:
    """A CPU: a job is done when it returns."""

    lanes: tuple[str, ...] = ()

    def mark(self, lane: str, run: Callable[[], Any]) -> tuple[Any, Mark | None]:
        """See Timeline."""
        return run(), None

    def is_lost(self, error: Exception) -> bool:
        """See Timeline: a CPU goes on."""
        return False


@dataclass(frozen=True, slots=True)
class _CudaMark:
    begin: Any
    end: Any

    def wait(self) -> float:
        self.end.synchronize()
        return self.begin.elapsed_time(self.end)


class CudaTimeline:
    """One CUDA stream per lane. Made and used by the device thread; marks are waited for by others."""

    lanes: tuple[str, ...] = (DIT, VAE)

    def __init__(self, device: torch.device) -> None:
        self._streams = {lane: torch.cuda.Stream(device) for lane in self.lanes}

    def mark(self, lane: str, run: Callable[[], Any]) -> tuple[Any, Mark | None]:
        """See Timeline."""
        with torch.cuda.stream(self._streams[lane]):
            # Blocking events put a waiting thread to sleep instead of spinning on a core that others need.
            begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
            begin.record()
            value = run()
            end.record()
        return value, _CudaMark(begin, end)

    def is_lost(self, error: Exception) -> bool:
        """See Timeline: an illegal access or an uncorrectable memory error ends the context. Too little memory does not."""
        return isinstance(error, torch.AcceleratorError)


def timeline_for(device: torch.device) -> Timeline:
    """The device's timeline."""
    return CudaTimeline(device) if device.type == "cuda" else HostTimeline()
