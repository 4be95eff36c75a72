"""Memory over a long run: ``python -m bench.soak [--minutes 60] [--wall 12] [--size 320x192] [--json]``.

Draws a source of ``--minutes``, sends it through ``rheocast run`` (lossless) for at most ``--wall`` minutes, samples the
resident memory of every process and the run's shared memory every five seconds, and prints, per process, the memory
after the first quarter, at the end, and the slope between. What grows with the length of the run shows as a slope.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil

from services.cli import demo_clip

SAMPLE_S = 5.0
MIB = 1 << 20


def draw(path: Path, minutes: float) -> None:
    """A long clip: the demo's scene over and over, encoded once per loop and repeated as packets."""
    loop = [demo_clip.frame(i, 20.0) for i in range(20 * demo_clip.FPS)]
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(demo_clip.FPS), options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = demo_clip.WIDTH, demo_clip.HEIGHT, "yuv420p"
        for index in range(round(minutes * 60 * demo_clip.FPS)):
            picture = loop[index % len(loop)]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def sample(run_id: str) -> dict[str, float]:
    """MiB by process name, and of shared memory."""
    sizes: dict[str, float] = {}
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            if environ.get("RHEOCAST_RUN_ID") == run_id:
                name = environ.get("RHEOCAST_INSTANCE") or Path(process.cmdline()[0]).name
                memory = process.memory_info()
                sizes[name] = sizes.get(name, 0.0) + (memory.rss - memory.shared) / MIB
        except (psutil.Error, IndexError):
            continue
    shm = sum(path.stat().st_size for path in Path("/dev/shm").glob(f"rheocast-{run_id}-*"))
    return {**sizes, "shared memory": shm / MIB}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--wall", type=float, default=12.0)
    parser.add_argument("--size", default="320x192")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    run_id = f"soak{secrets.token_hex(3)}"
    samples: list[tuple[float, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "long.mp4", Path(folder) / "out.mp4"
        draw(source, arguments.minutes)
        command = [
            sys.executable,
            "-m",
            "services.cli",
            "run",
            str(source),
            str(output),
            "--prompt",
            "a pencil drawing",
        ]
        process = subprocess.Popen(
            [*command, "--size", arguments.size, "--json"],
            env={**os.environ, "RHEOCAST_RUN_ID": run_id},
            stdout=subprocess.PIPE,
            text=True,
        )
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < arguments.wall * 60:
            time.sleep(SAMPLE_S)
            samples.append((time.monotonic() - began, sample(run_id)))
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    summary = json.loads(out.strip().splitlines()[-1])
    report = table(samples)
    wall = samples[-1][0] / 60 if samples else 0.0
    if arguments.json:
        print(json.dumps({"wall_minutes": round(wall, 2), "frames": summary["frames_out"], "memory": report}))
        return
    print(
        f"{wall:.1f} minutes of wall time, {summary['frames_out']} frames ({summary['frames_out'] / 16 / 60:.1f} minutes)"
    )
    print(f"{'process':<16} {'after 1/4':>12} {'at the end':>12} {'slope':>16}")
    for name, row in report.items():
        print(f"{name:<16} {row['quarter']:>8.1f} MiB {row['end']:>8.1f} MiB {row['slope']:>8.3f} MiB/min")


def table(samples: list[tuple[float, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Per process: memory after a quarter and at the end (MiB), slope by least squares over the rest (MiB a minute)."""
    rest = samples[len(samples) // 4 : -1]
    found: dict[str, dict[str, float]] = {}
    for name in sorted({name for _, sizes in rest for name in sizes}):
        points = [(at / 60, sizes[name]) for at, sizes in rest if name in sizes]
        if len(points) < 3:
            continue
        slope = float(np.polyfit([x for x, _ in points], [y for _, y in points], 1)[0])
        found[name] = {"quarter": round(points[0][1], 2), "end": round(points[-1][1], 2), "slope": round(slope, 4)}
    return found


if __name__ == "__main__":
    main()
