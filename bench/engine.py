"""The engine alone: milliseconds per latent frame of encode, every step and decode, and frames a second.

``python -m bench.engine --model rheo-tiny --steps 1,2 --streams 1,2,4 --stages 1,2 --threads 1,2 --json``

Weights may be random: the time of a forward does not depend on them. Every figure is the median of the ticks after the
ring is full and the first ticks are gone; ``least`` is the fastest, which shows what a busy machine hides.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shared.engine.model.autoencoder import Autoencoder
from shared.engine.model.loading import load_vae, random_vae_weights
from shared.engine.plan.items import Item
from shared.engine.plan.noise_controller import step_timesteps
from shared.engine.plan.registry import model_folder
from shared.engine.plan.spec import ModelSpec, SpecError, spec_of
from shared.engine.plan.split import split_blocks
from shared.engine.plan.stream_plan import StreamPlan
from shared.engine.stage import Stage

FRAMES_PER_CHUNK = 4


@dataclass(frozen=True, slots=True)
class Setting:
    """One row's question."""

    model: str
    width: int
    height: int
    steps: int
    streams: int
    stages: int
    dtype: str
    threads: int
    device: str


@dataclass(frozen=True, slots=True)
class Figures:
    """One row's answer, in milliseconds per latent frame unless said otherwise.

    ``forward`` is one lock-step batch of streams × K items through all stages, ``step`` that per item, ``stage_ms`` each
    stage's share of the forward. ``fps`` counts the frames of all streams when encode, forward and decode run one after
    the other; ``pipelined_fps`` when each has a device of its own.
    """

    encode: float
    forward: float
    step: float
    decode: float
    stage_ms: tuple[float, ...]
    fps: float
    pipelined_fps: float
    least_encode: float
    least_forward: float
    least_decode: float
    weights_mib: float
    kv_mib: float


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds and result; waits for the device."""
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) * 1000, result


class LockStep:
    """Streams in lock step through the stages, as :class:`shared.engine.stepper.Stepper` does it, but timed by part."""

    def __init__(self, spec: ModelSpec, stages: list[Stage], setting: Setting) -> None:
        rows, columns = spec.latent_size(setting.width, setting.height)
        self.spec, self.stages, self.device = spec, stages, stages[0].device
        self.shape = (spec.latent_channels, rows, columns)
        self.timesteps = step_timesteps(spec.steps[0], spec.steps[: setting.steps])
        self.plans = [StreamPlan.for_model(f"bench-{i}", 0, spec) for i in range(setting.streams)]
        self.waiting: list[tuple[StreamPlan, Item, Tensor]] = []
        embedding = torch.randn(spec.text_len, spec.text_dim)
        for plan, stage in itertools.product(self.plans, stages):
            stage.open(plan.stream, rows, columns)
            stage.set_prompt(plan.stream, 1, embedding)

    def tick(self) -> list[float]:
        """One new block per stream. Returns each stage's milliseconds, summed over the tick's forwards."""
        spent = [0.0] * len(self.stages)
        frames = 1 if self.plans[0].under_way or self.plans[0].next_start_frame else 2
        entries = [(plan, plan.next(item), x) for plan, item, x in self.waiting]
        for plan in self.plans:
            item = plan.enter(frames, self.spec.noise.s0, self.timesteps, 0, 1)
            entries.append((plan, item, torch.randn(frames, *self.shape, device=self.device)))
        self.waiting = []
        while entries:
            items, x = [item for _, item, _ in entries], torch.stack([x for _, _, x in entries])
            for index, stage in enumerate(self.stages):
                took, x = timed(self.device, partial(stage.run, items, x))
                spent[index] += took
            again: list[tuple[StreamPlan, Item, Tensor]] = []
            for (plan, item, _), clean in zip(entries, x, strict=True):
                if not plan.done(item):
                    renoised = self.stages[-1].renoise([item], clean[None])[0]
                    if item.frames > 1:
                        again.append((plan, plan.next(item), renoised))
                    else:
                        self.waiting.append((plan, item, renoised))
            entries = again
        return spent


def measure(setting: Setting, ticks: int, random_weights: bool) -> Figures:
    """Run one setting."""
    torch.set_num_threads(setting.threads)
    spec, device, dtype = spec_of(setting.model), torch.device(setting.device), getattr(torch, setting.dtype)
    folder = model_folder(setting.model)
    random_weights = random_weights or not (folder / "dit.safetensors").exists()
    if not random_weights:
        spec = ModelSpec.from_json(folder / "spec.json")
    ranges = split_blocks(spec.layers, setting.stages)
    if random_weights:
        stages = [Stage.random(spec, blocks, 0, device, dtype) for blocks in ranges]
    else:
        stages = [Stage.load(spec, folder, blocks, device, dtype) for blocks in ranges]
    vae = load_vae(spec, random_vae_weights(spec) if random_weights else folder, device, dtype)
    autoencoder = Autoencoder(vae, spec, device, dtype)

    encoder, decoder = autoencoder.encoder_state(), autoencoder.decoder_state()
    encode: list[float] = []
    decode: list[float] = []
    for chunk in range(ticks + 2):
        pixels = torch.randint(0, 256, (5 if chunk == 0 else 4, setting.height, setting.width, 3), dtype=torch.uint8)
        took, latents = timed(device, partial(autoencoder.encode, encoder, pixels))
        encode.append(took)
        decode.append(timed(device, partial(autoencoder.decode, decoder, latents))[0])

    loop = LockStep(spec, stages, setting)
    warm = spec.ring + setting.steps + 2
    rows = [loop.tick() for _ in range(warm + ticks)][warm:]
    forwards = [sum(row) for row in rows]
    middle = (statistics.median(encode[2:]), statistics.median(forwards), statistics.median(decode[2:]))
    stage_ms = tuple(statistics.median(column) for column in zip(*rows, strict=True))
    shown = FRAMES_PER_CHUNK * setting.streams * 1000
    held = [stage.memory() for stage in stages]
    return Figures(
        encode=middle[0],
        forward=middle[1],
        step=middle[1] / (setting.streams * setting.steps),
        decode=middle[2],
        stage_ms=stage_ms,
        fps=shown / (middle[1] + setting.streams * (middle[0] + middle[2])),
        pipelined_fps=shown / max(setting.streams * middle[0], *stage_ms, setting.streams * middle[2]),
        least_encode=min(encode[2:]),
        least_forward=min(forwards),
        least_decode=min(decode[2:]),
        weights_mib=sum(m.weights for m in held) / 2**20,
        kv_mib=sum(m.kv for m in held) / 2**20,
    )


def settings_of(args: argparse.Namespace) -> Iterator[Setting]:
    """Every combination asked for."""
    spec = spec_of(args.model)
    sizes = args.size or [f"{spec.default_width}x{spec.default_height}"]
    for size, dtype, steps, streams, stages, threads in (
        (size, dtype, steps, streams, stages, threads)
        for size in sizes
        for dtype in args.dtype
        for steps in args.steps
        for streams in args.streams
        for stages in args.stages
        for threads in args.threads
    ):
        width, height = (int(side) for side in size.split("x"))
        yield Setting(args.model, width, height, steps, streams, stages, dtype, threads, args.device)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="rheo-tiny")
    parser.add_argument("--size", type=lambda text: text.split(","), help="320x192,… ; default: the model's own")
    parser.add_argument("--steps", type=_numbers, default=[1, 2])
    parser.add_argument("--streams", type=_numbers, default=[1])
    parser.add_argument("--stages", type=_numbers, default=[1])
    parser.add_argument("--dtype", type=lambda text: text.split(","), default=["float32"])
    parser.add_argument("--threads", type=_numbers, default=[os.cpu_count() or 1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ticks", type=int, default=20, help="timed ticks of every setting")
    parser.add_argument("--random", action="store_true", help="random weights even where trained ones are")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        settings = list(settings_of(args))
    except (SpecError, ValueError) as error:
        parser.error(str(error))
    results: list[dict[str, Any]] = []
    if not args.json:
        machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        print(f"{machine}; milliseconds, median (least)")
        print("| size | K | streams | stages | dtype | threads | encode | forward | per step | decode | fps |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
    for setting in settings:
        f = measure(setting, args.ticks, args.random)
        results.append({**asdict(setting), **asdict(f)})
        if not args.json:
            print(
                f"| {setting.width}×{setting.height} | {setting.steps} | {setting.streams} | {setting.stages} "
                f"| {setting.dtype} | {setting.threads} | {f.encode:.1f} ({f.least_encode:.1f}) "
                f"| {f.forward:.1f} ({f.least_forward:.1f}) | {f.step:.1f} "
                f"| {f.decode:.1f} ({f.least_decode:.1f}) | {f.fps:.1f} |",
                flush=True,
            )
    if args.json:
        print(json.dumps({"torch": torch.__version__, "cores": os.cpu_count(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
