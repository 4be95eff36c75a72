"""Builds, wires and drains a worker."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import time
from typing import Any

import torch

from services.worker.calibration import Calibration, device_name
from services.worker.core import Rank
from services.worker.device_thread import DeviceThread
from services.worker.fencing import Fence
from services.worker.handlers import Handlers
from services.worker.runtime import Runtime
from services.worker.settings import Settings
from services.worker.threads import Threads
from services.worker.timeline import Timeline, timeline_for
from shared.bus.port import BusError
from shared.contracts.beats import MeasuredCost
from shared.cores import Cores
from shared.engine.model.checkpoints import WeightsError
from shared.engine.plan.spec import SpecError
from shared.lifecycle import Context, UnusableError, run_service
from shared.telemetry import names
from shared.telemetry.metrics import Metrics

log = logging.getLogger(__name__)
WATCH_S = 0.1
WEIGH_EVERY = 10
CROWD_S = 0.9  # over so long others' use of the cores is judged


class Worker:
    """One worker process."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        self._runtime = Runtime(settings)
        # A device that is the host's cores, and has two of them for itself, does two small things at once.
        self._on_cores = self._runtime.device.type == "cpu"
        self._threads = Threads(self._thread_count() if self._on_cores else 1)
        hands = min(2, self._threads.most)
        self._device = DeviceThread(asyncio.get_running_loop(), self._prepare, lost=give_up, hands=hands)
        self._handlers = Handlers(context, self._runtime, self._device, self._threads)
        self._ready = False
        self._watch: asyncio.Task[None] | None = None
        self._beat_at = time.monotonic()
        self._memory: dict[str, Any] = {}
        self._device_name = ""
        self._calibration: tuple[MeasuredCost, ...] = ()
        self._cores = Cores()
        self._cores_at = (self._beat_at, self._cores.busy_s(), 0.0)
        self._fence = Fence(settings.fence_s)
        self._emptying: asyncio.Task[None] | None = None

    def _prepare(self) -> Timeline:
        """In each device thread: thread counts come from the launcher (rule 12)."""
        torch.set_num_threads(self._thread_count())
        torch.set_grad_enabled(False)
        return timeline_for(self._runtime.device)

    def _thread_count(self) -> int:
        return self._settings.threads or len(os.sched_getaffinity(0))

    async def start(self) -> None:
        """Load and warm up in the device thread, then take work."""
        self._device.start()
        try:
            await self._device.call(Rank.CONTROL, self._runtime.load)
        except (WeightsError, SpecError, FileNotFoundError) as error:
            raise UnusableError(str(error)) from None
        await self._device.call(Rank.CONTROL, self._runtime.warm_up)
        await self._device.call(Rank.CONTROL, self._calibrate)
        await self._handlers.start()
        self._ready = True
        self._watch = asyncio.create_task(self._watch_gaps(), name="gaps")

    def _calibrate(self) -> None:
        """In the device thread."""
        runtime = self._runtime
        begin = time.perf_counter()
        self._device_name = device_name(runtime.device, runtime.dtype, self._settings.speed)
        self._calibration = Calibration(runtime, self._settings.calibrate_s, self._threads).run()
        shapes, took = len(self._calibration), time.perf_counter() - begin
        log.info("measured %d shapes on %s in %.1f s", shapes, self._device_name, took)

    def declare(self, metrics: Metrics) -> None:
        """What the device does, and holds."""
        metrics.value(names.BUSY, lambda: self._device.busy_s)
        metrics.value(names.DEVICE_QUEUE, lambda: self._device.waiting)
        metrics.value(names.STREAMS, lambda: len(self._handlers.assignments.streams))
        metrics.read(names.STATE_BYTES, self._state_bytes)
        metrics.counts(names.INCIDENTS, "incident", lambda: self._handlers.counters)

    def _state_bytes(self) -> list[tuple[dict[str, str], float]]:
        told = self._memory
        held, aside, free = told.get("stream_bytes", {}), told.get("suspended", {}), told.get("memory_free", 0)
        return [
            ({"use": "streams"}, sum(held.values())),
            ({"use": "suspended"}, sum(aside.values())),
            ({"use": "free"}, free),
        ]

    def beat_fields(self) -> dict[str, object]:
        """What the scheduler places by."""
        now = time.monotonic()
        self._check_fence(now)
        elapsed, self._beat_at = now - self._beat_at, now
        busy = self._device.take_busy_s() / elapsed if elapsed > 0 else 0.0
        settings = self._settings
        return {
            "roles": tuple(role.value for role in settings.roles),
            "pipeline": settings.pipeline,
            "stage": self._runtime.place.stage,
            "stages": self._runtime.place.stages,
            "model": settings.model,
            "ready": self._ready and self._emptying is None,
            "busy": min(1.0, busy),
            "streams": tuple(self._handlers.assignments.streams),
            "role_ms": dict(self._handlers.role_ms),
            "generation": self._handlers.generation,
            **self._memory,
            "device": self._device_name,
            "calibration": self._calibration,
            "measured": self._handlers.measured.take(),
            **self._runtime.block_fields(),
            **self._core_fields(now),
        }

    def _core_fields(self, now: float) -> dict[str, object]:
        """To be called in the event loop's thread: what this process does elsewhere is its device's."""
        busy_s = self._cores.busy_s()
        compute_s = time.process_time() - time.thread_time() if self._on_cores else 0.0
        at, busy_before, compute_before = self._cores_at
        if now - at > CROWD_S:
            self._threads.is_crowded((busy_s - busy_before - compute_s + compute_before) / (now - at))
            self._cores_at = (now, busy_s, compute_s)
        many = self._threads.most > 1
        return {
            "host": self._cores.host,
            "cores": self._cores.count,
            "host_busy_s": busy_s,
            "compute_s": compute_s,
            "thread_s": (self._threads.used_s if many else self._device.busy_s) if self._on_cores else 0.0,
            "threads": self._threads.most if self._on_cores else 0,
            "wide_from": self._threads.wide_from,
        }

    def _check_fence(self, now: float) -> None:
        """Who stood still for so long has been given up: come back empty, and say so (rule 6)."""
        if not self._fence.check(now) or not self._ready or self._emptying is not None:
            return
        self._context.incarnation = secrets.token_hex(8)
        log.warning("this worker stood still for more than %g s: it comes back empty", self._settings.fence_s)
        self._emptying = asyncio.create_task(self._empty(), name="empty")

    async def _empty(self) -> None:
        try:
            await self._handlers.empty()
        except Exception as error:  # half empty is worse than gone: the process that follows is empty for sure
            give_up(error)
        self._emptying = None

    async def _watch_gaps(self) -> None:
        for turn in itertools.count():
            await asyncio.sleep(WATCH_S)
            self._check_fence(time.monotonic())
            if turn % WEIGH_EVERY == 0:
                try:
                    self._memory = await self._device.call(Rank.CONTROL, self._runtime.memory_fields)
                except Exception as error:  # gaps must be watched whatever becomes of this
                    log.warning("the streams' memory could not be told: %s", error)
            try:
                await self._handlers.watch_gaps()
            except BusError as error:
                log.warning("a fault could not be told: %s", error)

    async def drain(self, deadline_s: float) -> None:
        """Finish the jobs that are queued, within the deadline."""
        until = time.monotonic() + min(deadline_s, 3.0)
        while self._device.waiting and time.monotonic() < until:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End the device thread; weights and slots go with the process."""
        if self._watch is not None:
            self._watch.cancel()
        await self._handlers.close()
        await asyncio.to_thread(self._device.stop)


def give_up(error: Exception) -> None:
    """The device failed: end the process at once, so that it is restarted empty, which the scheduler knows how to mend."""
    log.critical("the device failed, this worker ends: %s", error)
    logging.shutdown()
    os._exit(1)


def main() -> None:
    """Run the service until it is told to stop."""
    settings = Settings()
    run_service("worker", settings, lambda context: Worker(context, settings))
