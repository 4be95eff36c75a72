"""Open-loop arrivals: streams come when they come, whatever became of those before them."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

from bench.system.driver import Watched, driving
from bench.system.latency import percentile


def summary(streams: list[Watched]) -> dict[str, Any]:
    """Over all streams that were let in and have ended."""
    done = [stream for stream in streams if stream.final is not None]
    if not done:
        return {"streams": 0}
    figures = [stream.figures() for stream in done]

    def spread(name: str) -> dict[str, float]:
        values = [float(figure[name]) for figure in figures]
        return {"p50": percentile(values, 0.5), "worst": min(values) if name in ("cpr", "attained") else max(values)}

    names = ("cpr", "attained", "ttff_s", "latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "jitter_p95_ms")
    return {
        "streams": len(done),
        "failed": sum(stream.final is not None and stream.final.event.value == "failed" for stream in done),
        "reconciles": all(stream.reconciles for stream in done),
        "cpr_mean": round(sum(figure["cpr"] for figure in figures) / len(figures), 4),
        **{name: spread(name) for name in names},
    }


async def arrivals(
    *, seconds: float, every_s: float, stays_s: float, seed: int, nats: str, fields: dict[str, Any]
) -> dict[str, Any]:
    """Poisson arrivals, one each ``every_s`` seconds in the mean; each stays for ``stays_s`` in the mean (exponential)."""
    dice = random.Random(seed)
    seen: list[Watched] = []
    async with driving(nats=nats) as driver:
        await driver.warm_up(**fields)

        async def visit(stays: float) -> None:
            stream = await driver.begin(**fields)
            seen.append(stream)
            if stream.accepted:
                await asyncio.sleep(stays)
                await driver.stop(stream)

        visits: list[asyncio.Task[None]] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            visits.append(asyncio.create_task(visit(max(2.0, dice.expovariate(1 / stays_s)))))
            await asyncio.sleep(dice.expovariate(1 / every_s))
        await asyncio.gather(*visits)
    refused = [stream.refusal.reason for stream in seen if stream.refusal is not None and not stream.accepted]
    return {"asked": len(seen), "refused": len(refused), "why": sorted(set(refused))[:5], **summary(seen)}
