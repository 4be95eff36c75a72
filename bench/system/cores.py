"""Where the cores' time goes: CPU seconds a second by process, while ``streams`` play, beside what the device did."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from bench.system.arrivals import summary
from bench.system.company import Company, cpu_by_process
from bench.system.driver import Watched, driving
from bench.system.latency import breakdown
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.beats import Beat


class WorkerCores:
    """What a worker's beats tell of its cores, over a while."""

    def __init__(self) -> None:
        self.first: Beat | None = None
        self.last: Beat | None = None
        self._times = [0.0, 0.0]

    async def on_beat(self, received: Received) -> None:
        """Beats of all services come here."""
        if received.message.service == "worker":
            if self.first is None:
                self.first, self._times[0] = received.message, time.monotonic()
            self.last, self._times[1] = received.message, time.monotonic()

    def figures(self) -> dict[str, float]:
        """Cores in use by all and by the forwards, and the threads that these had."""
        if self.first is None or self.last is None or self.first is self.last:
            return {}
        took = self._times[1] - self._times[0]
        names = ("host_busy_s", "compute_s", "thread_s")
        told = {name: (getattr(self.last, name) - getattr(self.first, name)) / took for name in names}
        return {"host": told["host_busy_s"], "forwards": told["compute_s"], "threads": told["thread_s"]}


async def cores(*, seconds: float, streams: int, fields: dict[str, Any], env: dict[str, str]) -> dict[str, Any]:
    """``streams`` at once, whatever is promised."""
    async with driving(env=env) as driver:
        await driver.warm_up(**fields)
        idle = cpu_by_process(driver)
        await asyncio.sleep(2.0)
        still = cpu_by_process(driver)
        watched: list[Watched] = []
        for _ in range(streams):
            watched.append(await driver.begin(frames=True, **fields))
            await asyncio.sleep(0.15)
        await asyncio.sleep(3.0)
        told, company = WorkerCores(), Company(driver)
        hearing = await driver.bus.subscribe(subjects.beat(subjects.ANY), told.on_beat)
        before, began = cpu_by_process(driver), time.monotonic()
        await asyncio.sleep(seconds)
        after, took = cpu_by_process(driver), time.monotonic() - began
        foreign = company.in_use()
        await hearing.unsubscribe()
        await driver.stop(*watched)
    chunks = [chunk for stream in watched for chunk in stream.decoded if chunk.chunk >= 4]
    return {
        "streams": streams,
        "refused": [stream.refusal.reason for stream in watched if stream.refusal is not None],
        "idle_cores": {name: round((still[name] - idle[name]) / 2.0, 3) for name in still},
        "cores": {name: round((after[name] - before[name]) / took, 3) for name in after},
        "cores_in_all": round(sum(after[name] - before[name] for name in after) / took, 3),
        "cores_of_others": foreign,
        "by_beats": {name: round(value, 3) for name, value in told.figures().items()},
        "way": breakdown(chunks),
        "played": summary([stream for stream in watched if stream.accepted]),
    }
