"""How many streams a machine holds, by bisection, beside what ``GET /v1/capacity`` promises; and that a promise is kept."""

from __future__ import annotations

import asyncio
import json
import urllib.parse
import urllib.request
from typing import Any

from bench.system.arrivals import summary
from bench.system.driver import Driver, Watched, driving
from shared.embedded import free_port

HOLDS_CPR = 0.99
MOST = 64
# No rung of the ladder may be taken: capacity as asked for.
PIN = {"min_steps": 2, "steps": 2, "max_frames_per_block": 1}
# Everybody is let in, whatever is predicted.
OPEN = {"RHEOCAST_ADMISSION": "false", "RHEOCAST_MAX_STREAMS": str(MOST)}


async def _told(driver: Driver, fields: dict[str, Any]) -> dict[str, Any]:
    """What the gateway promises for one more such stream."""
    wanted = {name: fields[name] for name in ("width", "height", "fps", "steps", "deadline_ms")}
    url = f"{driver.gateway}/v1/capacity?{urllib.parse.urlencode(wanted)}"

    def ask() -> dict[str, Any]:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())

    return await asyncio.to_thread(ask)


async def _fill(driver: Driver, count: int, fields: dict[str, Any]) -> list[Watched]:
    """As many of ``count`` streams as are let in; they begin at different times within a chunk."""
    streams: list[Watched] = []
    for _ in range(count):
        stream = await driver.begin(**fields)
        if not stream.accepted:
            break
        streams.append(stream)
        await asyncio.sleep(0.15)
    return streams


async def _holds(count: int, seconds: float, fields: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Whether ``count`` streams each play without a stall. A system of its own: nothing is left of the try before."""
    async with driving(env=OPEN) as driver:
        await driver.warm_up(**fields)
        streams = await _fill(driver, count, fields)
        let_in = len(streams)
        if let_in == count:
            await asyncio.sleep(seconds)
        await driver.stop(*streams)
    figures = {"streams": count, "let_in": let_in, **(summary(streams) if let_in == count else {})}
    holds = let_in == count and all(stream.stats.cpr >= HOLDS_CPR for stream in streams)
    return holds, {**figures, "holds": holds}


async def bisect(seconds: float, fields: dict[str, Any], low: int = 1) -> tuple[int, list[dict[str, Any]]]:
    """The largest number of streams that all hold, and every try: doubled until one fails, then halved."""
    tries: list[dict[str, Any]] = []

    async def holds(count: int) -> bool:
        good, figures = await _holds(count, seconds, fields)
        tries.append(figures)
        return good

    if not await holds(low):
        return 0, tries
    high = low * 2
    while high < MOST and await holds(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if await holds(middle) else (low, middle)
    return low, tries


async def promise(seconds: float, fields: dict[str, Any]) -> dict[str, Any]:
    """Fill a system as far as it lets in, hold that, and let one more in at the tier that its refusal names."""
    env = {"RHEOCAST_MAX_STREAMS": str(MOST)}
    async with driving(env=env, port=free_port()) as driver:
        await driver.warm_up(**fields)
        asked = await _told(driver, fields)
        streams = await _fill(driver, MOST, fields)
        after = await _told(driver, fields)
        refused = await driver.begin(**fields)
        answer = refused.refusal
        lower: Watched | None = None
        if answer is not None and answer.tier is not None:
            tier = answer.tier
            offered = {
                **fields,
                "steps": tier.steps,
                "min_steps": min(tier.steps, fields.get("min_steps", 1)),
                "fps": tier.fps or fields["fps"],
                "min_fps": min(tier.fps or fields["fps"], fields.get("min_fps", fields["fps"])),
                "width": tier.width,
                "height": tier.height,
                "frames_per_block": tier.frames_per_block,
                "max_frames_per_block": max(tier.frames_per_block, fields.get("max_frames_per_block", 1)),
            }
            lower = await driver.begin(**offered)
        await asyncio.sleep(seconds)
        everyone = [*streams, *([lower] if lower is not None and lower.accepted else [])]
        await driver.stop(*everyone)
    return {
        "promised": {"before": asked, "when_full": after},
        "let_in": len(streams),
        "held": summary(streams),
        "next": None
        if answer is None
        else {
            "reason": answer.reason,
            "tier": answer.tier.model_dump() if answer.tier is not None else None,
            "then_let_in": lower is not None and lower.accepted,
            "then": lower.figures() if lower is not None and lower.accepted else None,
        },
    }


async def capacity(*, seconds: float, hold_s: float, fields: dict[str, Any]) -> dict[str, Any]:
    """Both: the number by bisection and the promise."""
    pinned = {**fields, **PIN, "min_fps": fields["fps"]}
    most, tries = await bisect(seconds, pinned)
    promised = await promise(hold_s, pinned)
    ratio = round(promised["let_in"] / most, 3) if most else None
    return {"by_bisection": most, "tries": tries, "promised_to_measured": ratio, **promised}
