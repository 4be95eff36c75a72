"""In the launcher's setting of MKL a stream's pixels are the same to the last bit, whoever shares its batches and machine."""

from __future__ import annotations

import os
import subprocess
import sys

from shared.reproducible import reproducible_mkl

SCRIPT = """
import hashlib, sys, torch
from tests.support import engine
from tests.unit.test_engine_stepper import feed

def pixels(stages, *others):
    stepper = engine.stepper_of(stages=stages)
    torch.set_num_threads(int(sys.argv[1]))
    for name in (*others, "a"):
        stepper.open(name, 96, 64, engine.prompt(1 if name == "a" else 2), steps=2, seed=len(name))
    clips = {name: seed for seed, name in enumerate((*others, "a")[::-1])}
    return feed(stepper, clips, 7)["a"]

for made in (pixels(1), pixels(3), pixels(1, "b"), pixels(2, "b", "c")):
    print(hashlib.sha256(made.numpy().tobytes()).hexdigest())
"""


def digests(threads: int) -> list[str]:
    """The stream's pixels in four arrangements of stages and company."""
    mode = {"MKL_CBWR": reproducible_mkl(), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, str(threads)]
    done = subprocess.run(command, env={**os.environ, **mode}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_pixels_are_equal_to_the_last_bit() -> None:
    one, two = digests(1), digests(2)
    assert len(one) == len(two) == 4
    assert len({*one, *two}) == 1
