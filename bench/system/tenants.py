"""A tenant that floods with requests, and what another tenant's stream notices of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from bench.system.company import Company
from bench.system.driver import driving

ALLOWED = 2  # streams of the flooding tenant: what it may have is its own, and counts in both runs


async def tenants(*, seconds: float, requests: int, fields: dict[str, Any]) -> dict[str, Any]:
    """The same stream beside what the other tenant may have, and while that asks for ``requests`` more as fast as it can."""
    env = {"RHEOCAST_TENANTS": json.dumps({"flood": {"max_streams": ALLOWED}})}
    async with driving(env=env) as driver:
        await driver.warm_up(tenant="quiet", **fields)
        company = Company(driver)
        own = [await driver.begin(tenant="flood", **fields) for _ in range(ALLOWED)]
        calm = await driver.begin(tenant="quiet", **fields)
        await asyncio.sleep(seconds)
        await driver.stop(calm)
        flooded = await driver.begin(tenant="quiet", **fields)
        await asyncio.sleep(2.0)
        flood = [await driver.begin(wait=False, tenant="flood", **fields) for _ in range(requests)]
        await asyncio.sleep(max(2.0, seconds - 2.0))
        let_in = [stream for stream in flood if stream.accepted]
        foreign = company.in_use()
        await driver.stop(flooded, *own, *let_in)
    before, after = calm.figures(), flooded.figures()
    return {
        "requests": requests,
        "let_in": len(let_in),
        "refused": sum(stream.refusal is not None and not stream.accepted for stream in flood),
        "cores_of_others": foreign,
        "calm": before,
        "flooded": after,
        "p95_ratio": round(after["latency_p95_ms"] / max(0.1, before["latency_p95_ms"]), 3),
        "p99_ratio": round(after["latency_p99_ms"] / max(0.1, before["latency_p99_ms"]), 3),
    }
