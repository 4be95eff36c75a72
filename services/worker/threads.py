"""How many cores one forward takes, where the device is the host's cores. Bits do not depend on it (ADR 6).

A second thread helps a large forward and slows a small one down, and while both hands of the device compute there is none
to spare. Which forwards are large is measured at the start.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

GAIN = 0.85  # of one thread's time: several are worth it below
T = TypeVar("T")


class Threads:
    """``most`` are what this worker may use."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._running = 0
        self._from: dict[str, int] = {}  # by role: the smallest items with which several threads gain

    def learn(self, role: str, units: int, one_s: float, most_s: float) -> None:
        """A forward with an item of ``units`` latent tokens took so long with one thread, and with all."""
        self._from[role] = units if most_s < GAIN * one_s else 2 * units

    def count(self, role: str, units: int, running: int) -> int:
        """For a forward with items of ``units`` latent tokens while ``running`` others run."""
        return self.most if running == 0 and units >= self._from.get(role, 0) else 1

    def within(self, role: str, units: int, run: Callable[[], T]) -> Callable[[], T]:
        """``run`` with its threads, to be called in the hand's own thread."""
        if self.most <= 1:
            return run

        def call() -> T:
            with self._lock:
                count = self.count(role, units, self._running)
                self._running += 1
            torch.set_num_threads(count)
            try:
                return run()
            finally:
                with self._lock:
                    self._running -= 1
                torch.set_num_threads(self.most)

        return call
