"""Trains rheo-tiny from nothing with one command, and goes on where it was stopped.

``python -m training --run RUN --publish FOLDER`` draws the clips, trains the text encoder, then the autoencoder and the DiT
side by side on a core each (the DiT needs the encoder only, which stands after a minute), and puts the model folder
together. Every part keeps its checkpoints and its curve in the run folder: the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from training.publish import publish

GRACE_S = 10.0


def command(part: str, *arguments: object) -> list[str]:
    """The command line of one part."""
    return [sys.executable, "-m", f"training.{part}", *(str(each) for each in arguments)]


def stages(args: argparse.Namespace) -> tuple[list[list[str]], list[str], list[str]]:
    """(what runs first, one after the other; the autoencoder's command; the DiT's)."""
    pool, run = args.run / "pool", args.run
    first = [command("pool", "--out", pool, "--clips", args.clips, "--workers", args.workers)]
    if not (run / "text.safetensors").exists() or args.anew_text:
        first.append(command("train_text", "--run", run))
    shared = ("--pool", pool, "--run", run, "--minutes", args.minutes, "--threads", max(1, args.workers // 2))
    dit = command("train_dit", *shared, *(("--begin-with", args.begin_with) if args.begin_with else ()))
    return first, command("train_autoencoder", *shared), dit


def run_alone(part: list[str]) -> int:
    """Runs one part to its end; it ends with us."""
    child = subprocess.Popen(part, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    try:
        return child.wait()
    finally:
        _end([child])


def run_beside(first: list[str], ready: Sequence[Path], second: list[str]) -> int:
    """Runs both; the second begins once the first has written ``ready``. The first failure ends both and is returned."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    running = [subprocess.Popen(first, env=environment)]
    begun = False
    try:
        while True:
            if not begun and (all(path.exists() for path in ready) or running[0].poll() == 0):
                running.append(subprocess.Popen(second, env=environment))
                begun = True
            codes = [child.poll() for child in running]
            if failed := next((code for code in codes if code), 0):
                return failed
            if begun and all(code == 0 for code in codes):
                return 0
            time.sleep(0.2)
    finally:
        _end(running)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
    for child in children:
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder for clips (2.6 GB), checkpoints and curves")
    parser.add_argument(
        "--publish", type=Path, default=None, help="model folder to write at the end; default: RUN/model"
    )
    parser.add_argument("--minutes", type=float, default=180, help="of the autoencoder's and the DiT's training")
    parser.add_argument("--begin-with", type=Path, default=None, help="a model folder whose DiT to go on from")
    parser.add_argument("--clips", type=int, default=480)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--anew-text", action="store_true", help="train the text encoder again: prompts have changed")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what it started ends with it
    first, autoencoder, dit = stages(args)
    for each in first:
        code = run_alone(each)
        if code:
            sys.exit(code)
    code = run_beside(autoencoder, [args.run / "vae.safetensors", args.run / "latents.json"], dit)
    if code:
        sys.exit(code)
    folder = args.publish or args.run / "model"
    publish(args.run, folder)
    print(
        f"done: {folder}; see it with: python -m bench.quality CLIP… --models-dir {folder.parent} --model {folder.name}"
    )


if __name__ == "__main__":
    main()
