"""System fps beside engine fps, and a live run's deadlines: ``python -m bench.system ratio [--seconds 60] [--json]``.

Three runs of one drawn clip: the engine alone (encode, K steps, decode, in one process, no broker), ``rheocast run`` as
fast as the machine goes, and ``rheocast run --realtime``. The first two give the ratio of system to engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from services.cli import demo_clip
from services.cli.topology import usable_cores, worker_threads
from shared.engine.plan.registry import model_folder, model_spec

ENGINE_CHUNKS = 40


def run(*args: str) -> dict[str, Any]:
    """``rheocast run … --json``: its summary."""
    command = [sys.executable, "-m", "services.cli", "run", *args, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def engine_fps(steps: int, width: int, height: int) -> float:
    """Frames a second of the engine alone, lock step, with the threads the system gives its worker."""
    import torch

    from shared.engine.model.autoencoder import Autoencoder
    from shared.engine.model.loading import load_text_encoder, load_vae
    from shared.engine.plan.noise_controller import step_timesteps
    from shared.engine.plan.stream_plan import StreamPlan
    from shared.engine.stage import Stage

    torch.set_num_threads(worker_threads(1, usable_cores()))
    spec = model_spec("rheo-tiny")
    folder = model_folder(spec.name)
    device = torch.device("cpu")
    autoencoder = Autoencoder(load_vae(spec, folder), spec, device, torch.float32)
    stage = Stage.load(spec, folder)
    stage.open("bench", height // 8, width // 8)
    stage.set_prompt("bench", 1, load_text_encoder(spec, folder).encode("a pencil drawing"))
    plan = StreamPlan.for_model("bench", 1, spec)
    encoder, decoder = autoencoder.encoder_state(), autoencoder.decoder_state()
    timesteps = step_timesteps(int(1000 * spec.noise.s0) - spec.noise.first_step_margin, spec.steps[:steps])
    pictures = [demo_clip.frame(i, 8.0) for i in range(4 * ENGINE_CHUNKS + 1)]
    waiting: list[Any] = []  # (item, its input) that have steps left, oldest first
    began, shown, index = 0.0, 0, 0
    for chunk in range(ENGINE_CHUNKS):
        if chunk == 8:
            began, shown = time.perf_counter(), 0
        count = 5 if chunk == 0 else 4
        latents = autoencoder.encode(encoder, torch.from_numpy(np.stack(pictures[index : index + count])))
        index += count
        entries = [(plan.next(item), x) for item, x in waiting]
        entries.append((plan.enter(len(latents), spec.noise.s0, timesteps, 0, 1), latents))
        waiting = []
        while entries:
            items = [item for item, _ in entries]
            x0 = stage.run(items, torch.stack([x for _, x in entries]))
            entries = []
            for place, item in enumerate(items):
                plan.done(item)
                if item.is_last_step:
                    shown += len(autoencoder.decode(decoder, x0[place]))
                    continue
                again = stage.renoise([item], x0[place : place + 1])[0]
                if item.block == 0:
                    entries.append((plan.next(item), again))  # the first block runs its steps one after the other
                else:
                    waiting.append((item, again))
    return shown / (time.perf_counter() - began)


def ratio(seconds: float, steps: int) -> dict[str, Any]:
    """All three runs."""
    os.environ.setdefault("OMP_NUM_THREADS", str(worker_threads(1, usable_cores())))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "clip.mp4"
        demo_clip.write(source, seconds)
        common = ("--prompt", "a pencil drawing", "--size", "320x192", "--steps", str(steps))
        engine = engine_fps(steps, demo_clip.WIDTH, demo_clip.HEIGHT)
        lossless = run(str(source), str(Path(folder) / "lossless.mp4"), *common)
        live = run(str(source), str(Path(folder) / "live.mp4"), *common, "--realtime")
    share = live["on_time"] / live["frames_in"]
    live.pop("output")
    return {
        "engine_fps": round(engine, 2),
        "system_fps": lossless["fps"],
        "ratio": round(lossless["fps"] / engine, 3),
        "live": {**live, "on_time_share": round(share, 4)},
    }
