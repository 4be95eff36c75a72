"""Bitwise reproducible matrix products on the CPU. Knows no torch: MKL reads its mode once, when torch is loaded."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "MKL_CBWR"


def reproducible_mkl() -> str:
    """MKL's mode in which a product's bits depend neither on the thread count nor on how many rows share a call."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "COMPATIBLE"
    if "avx512f" in flags:
        return "AVX512,STRICT"
    return "AVX2,STRICT" if "avx2" in flags else "COMPATIBLE"


def make_products_reproducible() -> None:
    """Set the mode for this process, unless its environment names one. Call it before torch is imported."""
    os.environ.setdefault(VARIABLE, reproducible_mkl())
