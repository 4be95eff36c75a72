"""How many cores one forward takes, where the device is the host's cores. Bits do not depend on it (ADR 7).

More threads help a large forward and slow a small one down. So a forward is *wide*, has all threads and runs alone, or it
has one thread and another may run beside it. Which are worth it is measured at the start; none are while others keep
the cores busy: threads of one forward wait for each other, and each for its core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

GAIN = 0.85  # of one thread's time: several are worth it below
CROWDED = 0.5  # cores that others use: more, and one thread each is faster
T = TypeVar("T")


class Threads:
    """``most`` are what this worker may use; with 1 (and on a GPU) everything runs as it is given."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.crowded = False
        self._lock = threading.Lock()
        self._used_s = 0.0
        self._wide_from: dict[str, int] = {}

    @property
    def wide_from(self) -> dict[str, int]:
        """By role: forwards with items of at least so many latent tokens are wide. Empty: none ever is."""
        return dict(self._wide_from)

    @property
    def used_s(self) -> float:
        """Seconds that forwards had threads for themselves so far, added up over the threads."""
        with self._lock:
            return self._used_s

    def learn(self, role: str, units: int, one_s: float, most_s: float) -> None:
        """A forward with an item of ``units`` latent tokens took so long with one thread, and with all."""
        self._wide_from[role] = units if most_s < GAIN * one_s else 2 * units

    def assume(self, units: int) -> None:
        """Others used the cores meanwhile, so what was measured says nothing: take this size for the first that is wide."""
        self._wide_from = dict.fromkeys(self._wide_from, units)

    def is_crowded(self, others: float) -> None:
        """Others use so many cores."""
        self.crowded = others > CROWDED

    def count(self, role: str, units: int) -> int:
        """For a forward with items of ``units`` latent tokens."""
        wide = not self.crowded and units >= self._wide_from.get(role, 0)
        return self.most if wide else 1

    def within(self, role: str, units: int, run: Callable[[], T]) -> tuple[Callable[[], T], bool]:
        """``run`` with its threads, to be called in a thread of the device; and whether another may run beside it."""
        if self.most <= 1:
            return run, True
        count = self.count(role, units)

        def call() -> T:
            # Not set back afterwards: a part of it holds for the process, and another forward may be under way.
            torch.set_num_threads(count)
            begin = time.perf_counter()
            try:
                return run()
            finally:
                took = (time.perf_counter() - begin) * count
                with self._lock:
                    self._used_s += took

        return call, count == 1
