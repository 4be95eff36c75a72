"""Batching across streams against one batch per stream: the same streams, with forwards of up to 8 items and of one."""

from __future__ import annotations

import asyncio
from typing import Any

from bench.system.arrivals import summary
from bench.system.capacity import OPEN
from bench.system.company import Company
from bench.system.driver import Driver, driving
from shared.contracts.commands import Mode, PatternSource

LOSSLESS_FRAMES = 121


async def _throughput(driver: Driver, streams: int, fields: dict[str, Any]) -> float:
    """Frames a second of all streams together, as fast as the machine goes."""
    lossless = {**fields, "mode": Mode.LOSSLESS, "source": PatternSource(frames=LOSSLESS_FRAMES)}
    loop = asyncio.get_running_loop()
    began = loop.time()
    watched = [await driver.begin(**lossless) for _ in range(streams)]
    await asyncio.gather(*(asyncio.wait_for(stream.ended.wait(), 600) for stream in watched))
    shown = sum(stream.stats.frames_out for stream in watched)
    driver.running.clear()
    return round(shown / (loop.time() - began), 2)


async def batching(*, seconds: float, streams: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Live tails, and the most that goes through."""
    found: dict[str, Any] = {}
    for name, most in (("across_streams", 8), ("one_per_stream", 1)):
        async with driving(env={**OPEN, "RHEOCAST_MAX_BATCH": str(most)}) as driver:
            await driver.warm_up(**fields)
            company = Company(driver)
            watched = [await driver.begin(**fields) for _ in range(streams)]
            watched = [stream for stream in watched if stream.accepted]
            await asyncio.sleep(seconds)
            await driver.stop(*watched)
            live = summary(watched)
            found[name] = {"live": live, "lossless_fps": await _throughput(driver, streams, fields)}
            found[name]["cores_of_others"] = company.in_use()
    gain = found["across_streams"]["lossless_fps"] / max(0.01, found["one_per_stream"]["lossless_fps"])
    return {"streams": streams, **found, "throughput_gain": round(gain, 3)}
