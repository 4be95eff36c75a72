"""A worker that is stopped for a second, and for five: how soon the latency is back, and that every frame has a verdict."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

from bench.system.driver import Driver, Watched, driving
from shared.contracts.events import EventKind


async def _one(driver: Driver, seconds: float, fields: dict[str, Any]) -> dict[str, Any]:
    watched = await driver.begin(**fields)
    await asyncio.sleep(8.0)
    pid = driver.pid("worker-0")
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)
    went_on_ns = time.time_ns()
    await asyncio.sleep(12.0)
    await driver.stop(watched)
    return {
        "stopped_s": seconds,
        "same_process": driver.pid("worker-0") == pid,
        "back_under_deadline_s": back_s(watched, went_on_ns),
        "told": [
            f"{event.event.value}: {event.reason}"
            for event in watched.events
            if event.event in (EventKind.RECOVERING, EventKind.RESUMED, EventKind.WARNING, EventKind.FAILED)
        ],
        **watched.figures(),
    }


def back_s(watched: Watched, since_ns: int) -> float | None:
    """Seconds from ``since_ns`` to the first chunk that is shown within its deadline; None: there was none."""
    before = max((c.totals.on_time for at, c in watched.closed if at < since_ns), default=0)
    for at, closed in watched.closed:
        if at >= since_ns and closed.totals.on_time > before and closed.latency_ms <= watched.spec.deadline_ms:
            return round((at - since_ns) / 1e9, 3)
    return None


async def stall(*, width: int, height: int, fps: float, steps: int, deadline_ms: int) -> dict[str, Any]:
    """Both, one after the other, on one system."""
    fields: dict[str, Any] = {"width": width, "height": height, "fps": fps, "steps": steps, "deadline_ms": deadline_ms}
    async with driving() as driver:
        await driver.warm_up(**fields)
        return {"runs": [await _one(driver, seconds, fields) for seconds in (1.0, 5.0)]}
