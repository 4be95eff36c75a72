"""How fast this machine is: what keeps one stage busy on one would drown another."""

from __future__ import annotations

import time

import numpy as np

SIDE, TRIES = 1024, 8
SLOW_GFLOPS = 100.0
"""Of all cores together, float32. Two cores of an EPYC with AVX2 only give 65, with AVX-512 more than twice that."""


def is_slow() -> bool:
    """Whether this machine plays no 16 fps of 320×192 in several steps. Takes a third of a second at most."""
    a = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
    least = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        a @ a
        least = min(least, time.perf_counter() - began)
    return 2 * SIDE**3 / least / 1e9 < SLOW_GFLOPS
