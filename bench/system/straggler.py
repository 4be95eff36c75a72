"""Re-balancing by itself on real services: a worker that is held up is relieved, and nothing else ever moves blocks."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from bench.system.company import Company
from bench.system.driver import Driver, Watched, driving
from shared.contracts import subjects
from shared.contracts.events import EventKind
from shared.contracts.operating import CutPipeline, FleetAsked, FleetTold, PipelineView

STAGES = 2
SETTLE_S = 8.0
PATIENCE_S = 20.0  # how long a move is waited for
HELD_UP = {"steadily": (0.02, 0.02), "in_bursts": (0.3, 0.3)}  # seconds stopped, seconds going
LIGHT: dict[str, Any] = {"width": 160, "height": 96, "fps": 8.0, "steps": 1, "deadline_ms": 1000}


@asynccontextmanager
async def held_up(pid: int, stopped_s: float, going_s: float) -> AsyncIterator[None]:
    """A process that is stopped for ``stopped_s`` and goes on for ``going_s``, in turns; afterwards it goes on."""

    async def turns() -> None:
        try:
            while True:
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(stopped_s)
                os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(going_s)
        finally:
            os.kill(pid, signal.SIGCONT)

    task = asyncio.create_task(turns())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def pipeline_of(driver: Driver) -> PipelineView:
    """What the scheduler tells of the one pipeline."""
    told: FleetTold = await driver.bus.request(subjects.FLEET, FleetAsked(), 10.0)
    return told.pipelines[0]


def tiers_of(watched: Watched, since_ns: int) -> list[str]:
    """What the ladder did: seconds since then, the steps and the rate, why."""
    return [
        f"{(event.at_ns - since_ns) / 1e9:.1f} s: {event.tier.steps} steps, {event.tier.fps:g} fps: {event.reason}"
        for event in watched.events
        if event.event is EventKind.TIER_CHANGED and event.tier is not None
    ]


def moves_of(watched: Watched) -> list[str]:
    """What a stream was told of blocks that changed hands."""
    return [event.reason for event in watched.events if event.event is EventKind.REBALANCED]


async def slowed(stage: int, how: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A stream, and after a while a worker that is held up for half of the time: when its blocks have moved."""
    async with driving(stages=STAGES) as driver:
        await driver.warm_up(**fields)
        watched = await driver.begin(**fields)
        company = Company(driver)
        await asyncio.sleep(SETTLE_S)
        before, early = await pipeline_of(driver), moves_of(watched)
        loop = asyncio.get_running_loop()
        began, after_s = loop.time(), None
        async with held_up(driver.pid(f"worker-{stage}"), *HELD_UP[how]):
            while after_s is None and loop.time() - began < PATIENCE_S:
                await asyncio.sleep(0.05)
                if len(moves_of(watched)) > len(early):
                    after_s = round(loop.time() - began, 2)
            await asyncio.sleep(5.0)
            after = await pipeline_of(driver)
        await driver.stop(watched)
        return {
            "stage": stage,
            "held_up": how,
            "moved_after_s": after_s,
            "cuts": [before.cuts, after.cuts],
            "busy_before": before.stage_busy,
            "busy_after": after.stage_busy,
            "told_before": early,
            "told": moves_of(watched)[len(early) :],
            "cores_of_others": company.in_use(),
            **watched.figures(),
        }


async def undisturbed(seconds: float, streams: int, cuts: tuple[int, ...], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Streams that nobody disturbs: nothing should move. ``cuts``: set by an operator before; none: as they are."""
    async with driving(stages=STAGES) as driver:
        if cuts:
            await driver.bus.request(
                subjects.FLEET, CutPipeline(pipeline=(await pipeline_of(driver)).name, cuts=cuts), 30.0
            )
        watched = [await driver.begin(**fields) for _ in range(streams)]
        company = Company(driver)
        await asyncio.sleep(seconds / 2)
        busy = [(await pipeline_of(driver)).stage_busy]
        await asyncio.sleep(seconds / 2)
        told = await pipeline_of(driver)
        moves = moves_of(watched[0])
        await driver.stop(*watched)
        return {
            "streams": streams,
            "cuts": told.cuts,
            "busy": [*busy, told.stage_busy],
            "moves": moves,
            "cores_of_others": company.in_use(),
            **watched[0].figures(),
        }


async def straggler(*, runs: int, quiet_s: float, fields: dict[str, Any]) -> dict[str, Any]:
    """``runs`` systems with a held-up worker each, by turns which and how; then a light and an even load for ``quiet_s``."""
    kinds = [(stage, how) for how in HELD_UP for stage in range(STAGES)]
    found = [await slowed(*kinds[run % len(kinds)], fields) for run in range(runs)]
    still: dict[str, Any] = {}
    if quiet_s:
        still["light"] = await undisturbed(quiet_s, 1, (), LIGHT)
        still["even"] = await undisturbed(quiet_s, 1, (), fields)
    return {"slowed": found, **still}
