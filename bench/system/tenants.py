"""A tenant that floods with requests, and what another tenant's stream notices of it.

One system, one stream of the calm tenant all the time; phases with and without a flood take turns, so that what a system does
when it is young falls on neither.
"""

from __future__ import annotations

import asyncio
import json
import time
from statistics import median
from typing import Any

from bench.system.company import Company
from bench.system.driver import Driver, Watched, driving
from bench.system.latency import percentile

ALLOWED = 2  # streams of the flooding tenant: what it may have is its own, and counts in all phases
SETTLE_S = 15.0  # of all streams together, before the first phase
BETWEEN_S = 3.0  # the end of one phase does not count for the next


async def tenants(*, seconds: float, requests: int, rounds: int, fields: dict[str, Any]) -> dict[str, Any]:
    """``rounds`` times: ``seconds`` of calm, then as many in which the other tenant asks for ``requests`` more at once."""
    env = {"RHEOCAST_TENANTS": json.dumps({"flood": {"max_streams": ALLOWED}})}
    async with driving(env=env) as driver:
        await driver.warm_up(tenant="quiet", **fields)
        own = [await driver.begin(tenant="flood", **fields) for _ in range(ALLOWED)]
        calm = await driver.begin(tenant="quiet", frames=True, **fields)
        await asyncio.sleep(SETTLE_S)
        phases, asked = list[dict[str, Any]](), list[Watched]()
        for _ in range(rounds):
            phases.append(await _phase(driver, calm, seconds))
            phases.append(await _phase(driver, calm, seconds, flood := [], requests, fields))
            asked += flood
        await driver.stop(calm, *own, *asked)
    before, after = ([phase for phase in phases if bool(phase["requests"]) is flooded] for flooded in (False, True))
    figures: dict[str, Any] = {
        "requests": len(asked),
        "let_in": sum(stream.accepted for stream in asked),
        "refused": sum(stream.refusal is not None and not stream.accepted for stream in asked),
        "phases": phases,
        "calm_tenants_stream": calm.figures(),
    }
    for what in ("shown_p95_ms", "ready_p95_ms"):
        calm_ms, flooded_ms = (median(phase[what] for phase in each) for each in (before, after))
        figures[what] = {
            "calm": round(calm_ms, 1), "flooded": round(flooded_ms, 1), "ratio": round(flooded_ms / max(0.1, calm_ms), 3)
        }  # fmt: skip
    return figures


async def _phase(
    driver: Driver, calm: Watched, seconds: float, flood: list[Watched] | None = None, requests: int = 0,
    fields: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What the calm stream had meanwhile; ``flood`` gets the streams that were asked for."""
    company, begun_ns = Company(driver), time.time_ns()
    if flood is not None:
        for _ in range(requests):
            flood.append(await driver.begin(wait=False, tenant="flood", **(fields or {})))
    await asyncio.sleep(max(0.0, seconds - (time.time_ns() - begun_ns) / 1e9))
    until_ns = time.time_ns()
    found = {"requests": requests, "cores_of_others": company.in_use(), **latencies(calm, begun_ns, until_ns)}
    await asyncio.sleep(BETWEEN_S)
    return found


def latencies(stream: Watched, begun_ns: int, until_ns: int) -> dict[str, float]:
    """Of the chunks shown, and of those that became ready, in a span: milliseconds since capture.

    ``shown`` is what a viewer has, playout's delay included; ``ready`` is before it, since the chunk's first frame.
    """
    shown = [closed.latency_ms for at, closed in stream.closed if begun_ns <= at < until_ns]
    ready = [(each.ready_ns - each.first_ns) / 1e6 for each in stream.decoded if begun_ns <= each.ready_ns < until_ns]
    return {
        "chunks": len(ready),
        "shown_p50_ms": round(percentile(shown, 0.5), 1),
        "shown_p95_ms": round(percentile(shown, 0.95), 1),
        "ready_p50_ms": round(percentile(ready, 0.5), 1),
        "ready_p95_ms": round(percentile(ready, 0.95), 1),
    }
