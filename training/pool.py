"""A pool of procedural clips on disk, so that drawing them does not hold up training.

``python -m training.pool --out /tmp/rheo-pool --clips 480`` writes ``clips.npy`` uint8 [clips, frames, 3, height,
width]; clip i is ``make_clip(seed + i)``, so a pool is a pure function of its arguments. An interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from training.procedural import make_clip


def _fill(path: str, seed: int, indices: list[int]) -> int:
    torch.set_num_threads(1)
    clips = np.lib.format.open_memmap(path, mode="r+")
    _, frames, _, height, width = clips.shape
    for i in indices:
        clips[i] = make_clip(seed + i, frames, height, width)
    return len(indices)


def build_pool(out: Path, clips: int, frames: int, height: int, width: int, seed: int, workers: int) -> Path:
    """Draws what is missing and returns the path of the array. A pool made with other arguments is drawn again."""
    out.mkdir(parents=True, exist_ok=True)
    path, note = out / "clips.npy", out / "pool.json"
    wanted = {"clips": clips, "frames": frames, "height": height, "width": width, "seed": seed}
    state = json.loads(note.read_text()) if note.exists() else {}
    done = state.get("done", 0) if {k: state.get(k) for k in wanted} == wanted and path.exists() else 0
    if not done:
        note.write_text(json.dumps(wanted | {"done": 0}))  # first: what is there from now on is black
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(clips, frames, 3, height, width))
    batch = 20
    with ProcessPoolExecutor(workers) as pool:
        while done < clips:
            todo = list(range(done, min(clips, done + batch * workers)))
            list(pool.map(_fill, [str(path)] * workers, [seed] * workers, [todo[i::workers] for i in range(workers)]))
            done = todo[-1] + 1
            note.write_text(json.dumps(wanted | {"done": done}))
            print(f"{done}/{clips} clips", flush=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("/tmp/rheo-pool"))
    parser.add_argument("--clips", type=int, default=480)
    parser.add_argument("--frames", type=int, default=29)
    parser.add_argument("--height", type=int, default=192)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    build_pool(args.out, args.clips, args.frames, args.height, args.width, args.seed, args.workers)


if __name__ == "__main__":
    main()
