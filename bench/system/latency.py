"""Latency and jitter of live streams, and where the milliseconds go.

A frame's latency is from its capture to when it is shown. The first frame of a chunk waits for the other three before
anything can begin (3 frame intervals: 187 ms at 16 fps), then for encode, its steps, decode and the hops between them, and
then for its playout time, which is the same for every frame of the stream.
"""

from __future__ import annotations

import asyncio
import statistics
from typing import Any

from bench.system.company import Company
from bench.system.driver import Decoded, Watched, driving


def percentile(values: list[float], share: float) -> float:
    """By nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered)) - 1))] if ordered else 0.0


def breakdown(chunks: list[Decoded], settle: int = 8) -> dict[str, Any]:
    """Medians in milliseconds of the steps on a chunk's way; the first ``settle`` chunks are left out."""
    chunks = [chunk for chunk in chunks if chunk.chunk >= settle]
    if not chunks:
        return {}

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 1)

    waits: dict[str, list[float]] = {}
    works: dict[str, list[float]] = {}
    for chunk in chunks:
        sums: dict[str, tuple[float, float]] = {}
        for hop, waited, worked in chunk.hops:
            before = sums.get(hop, (0.0, 0.0))
            sums[hop] = (before[0] + waited, before[1] + worked)
        for hop, (waited, worked) in sums.items():
            waits.setdefault(hop, []).append(waited)
            works.setdefault(hop, []).append(worked)
    ready = [(chunk.ready_ns - chunk.first_ns) / 1e6 for chunk in chunks]
    return {
        "collecting_ms": median([(chunk.last_ns - chunk.first_ns) / 1e6 for chunk in chunks]),
        "publishing_ms": median([(chunk.published_ns - chunk.last_ns) / 1e6 for chunk in chunks]),
        "published_to_ready_ms": median([(chunk.ready_ns - chunk.published_ns) / 1e6 for chunk in chunks]),
        "waited_ms": {hop: median(values) for hop, values in waits.items()},
        "worked_ms": {hop: median(values) for hop, values in works.items()},
        "ready_p50_ms": round(percentile(ready, 0.5), 1),
        "ready_p95_ms": round(percentile(ready, 0.95), 1),
        "ready_p99_ms": round(percentile(ready, 0.99), 1),
    }


async def latency(
    *, seconds: float, streams: int, width: int, height: int, fps: float, steps: int, deadline_ms: int, nats: str
) -> dict[str, Any]:
    """``streams`` at once for ``seconds``, on a warm system."""
    fields: dict[str, Any] = {"width": width, "height": height, "fps": fps, "steps": steps, "deadline_ms": deadline_ms}
    async with driving(nats=nats) as driver:
        await driver.warm_up(**fields)
        company = Company(driver)
        watched: list[Watched] = []
        for _ in range(streams):
            watched.append(await driver.begin(frames=True, **fields))
            await asyncio.sleep(0.37 / fps * 4)  # not all at the same instant
        await asyncio.sleep(seconds)
        foreign = company.in_use()
        await driver.stop(*watched)
    rows = [{**stream.figures(), **breakdown(stream.decoded)} for stream in watched]
    setting = {"size": f"{width}x{height}", "fps": fps, "steps": steps, "deadline_ms": deadline_ms}
    return {**setting, "cores_of_others": foreign, "streams": rows}
