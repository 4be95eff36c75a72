"""A tenant that floods with requests, and what another tenant's stream notices of it."""

from __future__ import annotations

import asyncio
from typing import Any

from bench.system.driver import driving


async def tenants(*, seconds: float, requests: int, fields: dict[str, Any]) -> dict[str, Any]:
    """The same stream alone, and while another tenant asks for ``requests`` streams as fast as it can."""
    async with driving() as driver:
        await driver.warm_up(tenant="quiet", **fields)
        alone = await driver.begin(tenant="quiet", **fields)
        await asyncio.sleep(seconds)
        await driver.stop(alone)
        beside = await driver.begin(tenant="quiet", **fields)
        await asyncio.sleep(2.0)
        flood = [await driver.begin(wait=False, tenant="flood", **fields) for _ in range(requests)]
        await asyncio.sleep(seconds)
        let_in = [stream for stream in flood if stream.accepted]
        await driver.stop(beside, *let_in)
    before, after = alone.figures(), beside.figures()
    return {
        "requests": requests,
        "let_in": len(let_in),
        "refused": sum(stream.refusal is not None and not stream.accepted for stream in flood),
        "alone": before,
        "beside": after,
        "p95_ratio": round(after["latency_p95_ms"] / max(0.1, before["latency_p95_ms"]), 3),
    }
