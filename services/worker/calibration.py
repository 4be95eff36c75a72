"""What a worker's roles cost: measured over a small grid when it starts, and counted while it works.

The scheduler's cost model begins with the grid, so that a system without a past plans its first stream by figures of this
very device. Runs in the device thread, after the warm-up; bounded by a time budget, the most telling shapes first.
"""

from __future__ import annotations

import logging
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from services.worker.roles.stage import StageRole
from services.worker.runtime import Runtime
from services.worker.threads import Threads
from shared.contracts.beats import MeasuredCost
from shared.cores import Cores
from shared.engine.compile import Speed
from shared.engine.plan.items import Item, SlotOp, SlotOpKind
from shared.engine.plan.noise_controller import step_timesteps
from shared.engine.plan.spec import PATCH

log = logging.getLogger(__name__)

GRID = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 3), (2, 2), (8, 1), (2, 3), (4, 2), (8, 2), (4, 3), (8, 3))
"""(items B, frame-block length T), the most telling first: what a second item costs, then a second frame."""
RUNS = 3  # of a shape, when there is time
MAX_SHAPES = 16
MAX_TIMES = 32
STREAM = "calibration-"
QUIET = (
    0.15  # cores that others may use while it is judged whether threads gain: the services beside start up meanwhile
)


def device_name(device: torch.device, dtype: torch.dtype, speed: Speed) -> str:
    """What computes, and the settings that change how fast it does."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{_cpu_name()} x{torch.get_num_threads()}"
    return f"{name}/{str(dtype).removeprefix('torch.')}/{speed.on(device).value}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def units_of(shape: Sequence[int]) -> int:
    """DiT tokens of latents [frames, C, h, w]."""
    frames, _, rows, columns = shape
    return frames * (rows // PATCH) * (columns // PATCH)


class Measured:
    """What jobs took since it was last asked, by role and shape. Bounded: more shapes than fit are left out."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, int, int], list[float]] = {}

    def add(self, role: str, items: int, units: int, ms: float) -> None:
        """One job took ``ms`` milliseconds of the device."""
        times = self._times.get((role, items, units))
        if times is None:
            if len(self._times) >= MAX_SHAPES:
                return
            times = self._times[role, items, units] = []
        if len(times) < MAX_TIMES:
            times.append(ms)

    def take(self) -> tuple[MeasuredCost, ...]:
        """Medians by shape; counting begins anew."""
        times, self._times = self._times, {}
        return tuple(
            MeasuredCost(role=role, items=items, units=units, ms=statistics.median(took), runs=len(took))
            for (role, items, units), took in times.items()
        )


class Calibration:
    """One run of the grid at the model's default size. ``budget_s`` is kept but for the shape that is being measured.

    ``threads`` learns what a forward with one item takes with one thread, and with all; then half the size is measured as
    well, since small forwards run in another way.
    """

    def __init__(self, runtime: Runtime, budget_s: float, threads: Threads | None = None) -> None:
        self._runtime = runtime
        self._threads = threads if threads is not None and threads.most > 1 else None
        self._spec = runtime.spec
        self._until = 0.0
        self._size = (self._spec.default_width, self._spec.default_height)
        half = tuple(max(16, side // 32 * 16) for side in self._size)
        self._sizes = (self._size, (half[0], half[1])) if self._threads is not None else (self._size,)
        self._budget_s = budget_s / len(self._sizes)
        self._at: dict[str, int] = {}  # latent frames that a stream's slots have seen
        self._blocks: dict[str, int] = {}
        self._found: list[MeasuredCost] = []

    def run(self) -> tuple[MeasuredCost, ...]:
        """Measure every role the worker has. What the device has no memory for is left out."""
        if self._budget_s <= 0:
            return ()
        begin, cores = time.perf_counter(), Cores()
        busy_s = cores.busy_s() - time.process_time()
        for size in self._sizes:
            self._until = time.perf_counter() + self._budget_s
            self._size, self._at, self._blocks = size, {}, {}
            self._run_size()
        others = (cores.busy_s() - time.process_time() - busy_s) / (time.perf_counter() - begin)
        if self._threads is not None and others > QUIET:
            self._threads.assume(self._spec.tokens(*self._sizes[0]))
        return tuple(self._found)

    def _run_size(self) -> None:
        runtime = self._runtime
        try:
            runtime.open(STREAM + "0", self._size[1], self._size[0])
            self._autoencoder()
            if runtime.stage is not None:
                self._stage(runtime.stage)
        except torch.cuda.OutOfMemoryError:
            log.warning("the calibration ends early: no memory for more streams at %d×%d", *self._size)
            torch.cuda.empty_cache()
        finally:
            for stream in (STREAM + "0", STREAM + "1"):
                runtime.close(stream)

    @property
    def _is_default(self) -> bool:
        """Whether it is the first size: smaller forwards are never wide, two of them at once carry more streams."""
        return self._size == self._sizes[0]

    def _left_s(self) -> float:
        return self._until - time.perf_counter()

    def _time(self, job: Callable[[], object]) -> float:
        """Seconds on the device."""
        cuda = self._runtime.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._runtime.device)
        begin = time.perf_counter()
        job()
        if cuda:
            torch.cuda.synchronize(self._runtime.device)
        return time.perf_counter() - begin

    def _measure(self, role: str, items: int, units: int, job: Callable[[], object]) -> float:
        """The median of up to RUNS runs, noted, with the threads it would have. One that takes long runs once."""
        threads = self._threads
        if threads is not None and items == 1 and self._is_default and units == self._spec.tokens(*self._size):
            one, most = (self._times(job, count) for count in (1, threads.most))
            threads.learn(role, units, statistics.median(one), statistics.median(most))
            times = most if threads.count(role, units) > 1 else one
        else:
            times = self._times(job, threads.count(role, units // items) if threads is not None else 0)
        median = statistics.median(times)
        self._found.append(MeasuredCost(role=role, items=items, units=units, ms=median * 1e3, runs=len(times)))
        return median

    def _times(self, job: Callable[[], object], threads: int) -> list[float]:
        if threads:
            torch.set_num_threads(threads)
        times = [self._time(job)]
        while len(times) < RUNS and self._left_s() > self._budget_s / 2 + times[0]:
            times.append(self._time(job))
        if threads and self._threads is not None:
            torch.set_num_threads(self._threads.most)
        return times

    def _autoencoder(self) -> None:
        """A stream's first chunk, which has a latent frame more, only warms its caches."""
        runtime, (width, height), stream = self._runtime, self._size, STREAM + "0"
        rows, columns = self._spec.latent_size(width, height)
        tokens = self._spec.tokens(width, height)
        if (encode := runtime.encode) is not None:
            first, later = (np.zeros((frames, height, width, 3), dtype=np.uint8) for frames in (5, 4))
            encode.run(stream, first)
            self._measure("encode", 1, tokens, lambda: encode.run(stream, later))
        if (decode := runtime.decode) is not None:
            like = {"device": runtime.device, "dtype": runtime.dtype}
            decode.run(stream, torch.zeros(2, self._spec.latent_channels, rows, columns, **like))
            latents = torch.zeros(1, self._spec.latent_channels, rows, columns, **like)
            self._measure("decode", 1, tokens, lambda: decode.run(stream, latents))

    def _stage(self, role: StageRole) -> None:
        """Shapes that would first have to be compiled are left out: they are learnt when they come."""
        tokens, steps = self._spec.tokens(*self._size), self._spec.max_steps
        eager = self._runtime.settings.speed.on(self._runtime.device) is Speed.EAGER
        most = self._spec.ring - self._spec.sinks
        slots = 0
        per_unit = 0.0
        for items, frames in GRID:
            fits = frames <= most and items <= 2 * steps and (eager or (frames == 1 and items <= steps))
            if not fits or per_unit * items * frames > self._left_s():
                continue
            while slots < items:
                slots += self._fill(role, STREAM + str(slots // steps), slots % steps)
            took = self._measure(
                "stage", items, items * frames * tokens, lambda n=items, t=frames: self._forward(role, n, t)
            )
            per_unit = max(per_unit, took / (items * frames))
            if self._left_s() <= 0:
                return

    def _fill(self, role: StageRole, stream: str, slot: int) -> int:
        """One more slot with a full ring: a stream's first by one long block, the others forked from it. Returns 1."""
        if slot == 0:
            if stream != STREAM + "0":
                self._runtime.open(stream, self._size[1], self._size[0])
            role.set_prompt(stream, 1, torch.zeros(self._spec.text_len, self._spec.text_dim))
            self._at[stream] = self._blocks[stream] = 0
            ring = self._spec.ring
            self._run(role, [self._item(stream, 0, ring, (SlotOp(SlotOpKind.RESET, 0),))], ring)
            self._passed(stream, ring)
        else:
            self._run(role, [self._item(stream, slot, 1, (SlotOp(SlotOpKind.FORK, slot, source=0),))], 1)
        return 1

    def _forward(self, role: StageRole, items: int, frames: int) -> None:
        steps = self._spec.max_steps
        used = [(STREAM + str(number // steps), number % steps) for number in range(items)]
        self._run(role, [self._item(stream, slot, frames) for stream, slot in used], frames)
        for stream in {stream for stream, _ in used}:
            self._passed(stream, frames)

    def _passed(self, stream: str, frames: int) -> None:
        self._at[stream] += frames
        self._blocks[stream] += 1

    def _item(self, stream: str, slot: int, frames: int, ops: tuple[SlotOp, ...] = ()) -> Item:
        return Item(
            stream=stream,
            epoch=1,
            block=self._blocks[stream],
            step=0,
            slot=slot,
            frames=frames,
            first_latent=self._at[stream],
            start_frame=self._at[stream],
            noise_scale=0.5,
            timesteps=step_timesteps(400, self._spec.steps[:1]),
            seed=0,
            prompt_version=1,
            ops=ops,
        )

    def _run(self, role: StageRole, items: list[Item], frames: int) -> None:
        like = {"device": self._runtime.device, "dtype": self._runtime.dtype}
        if role.stage.is_first:
            rows, columns = self._spec.latent_size(*self._size)
            shape = (frames, self._spec.latent_channels, rows, columns)
            role.run(items, [torch.zeros(shape, **like)] * len(items))
        else:
            tokens = frames * self._spec.tokens(*self._size)
            role.run(items, torch.zeros(len(items), tokens, role.stage.wire_width, **like))
