"""However a worker is started, MKL's mode stands in its environment when torch is loaded: later is too late."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from shared.reproducible import reproducible_mkl

ROOT = Path(__file__).resolve().parents[2]

# The first import of torch tells the mode, and ends the process.
START = """
import os, runpy, sys

class AtTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("MKL_CBWR", "none"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, AtTorch())
runpy.run_module("services.worker", run_name="__main__")
"""


def mode_when_torch_comes(**variables: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    done = subprocess.run(
        [sys.executable, "-c", START], cwd=ROOT, env={**env, **variables}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_worker_started_by_hand_is_reproducible() -> None:
    assert mode_when_torch_comes() == reproducible_mkl()


def test_a_mode_that_the_operator_chose_stands() -> None:
    assert mode_when_torch_comes(MKL_CBWR="COMPATIBLE") == "COMPATIBLE"


def test_importing_the_entry_point_changes_nothing() -> None:
    code = "import os, sys, services.worker.__main__; print('MKL_CBWR' in os.environ, 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
