"""How many streams a machine holds, by bisection, beside what ``GET /v1/capacity`` promises; and that a promise is kept."""

from __future__ import annotations

import asyncio
import json
import urllib.parse
import urllib.request
from typing import Any

from bench.system.arrivals import summary
from bench.system.company import Company
from bench.system.driver import Driver, Watched, driving
from shared.embedded import free_port

HOLDS_CPR = 0.99
MOST = 64
# No rung of the ladder may be taken: capacity as asked for.
PIN = {"min_steps": 2, "steps": 2, "max_frames_per_block": 1}
BOUNDS = ("min_steps", "min_fps", "max_frames_per_block")
SETTLE_S = 10.0  # after many streams have begun at once, until what they cost is known
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
        company = Company(driver)
        if let_in == count:
            await asyncio.sleep(seconds)
        foreign = company.in_use()
        await driver.stop(*streams)
    figures = {
        "streams": count,
        "let_in": let_in,
        "cores_of_others": foreign,
        **(summary(streams) if let_in == count else {}),
    }
    holds = let_in == count and all(stream.stats.cpr >= HOLDS_CPR for stream in streams)
    return holds, {**figures, "holds": holds}


async def bisect(seconds: float, fields: dict[str, Any], start: int) -> tuple[int, list[dict[str, Any]]]:
    """The most streams that all hold, and every try: strides from ``start`` until the answer turns, then halves."""
    tries: list[dict[str, Any]] = []

    async def holds(count: int) -> bool:
        good, figures = await _holds(count, seconds, fields)
        tries.append(figures)
        return good

    low, high, stride = 0, MOST + 1, 1
    count = start
    while high - low > 1:
        if await holds(count):
            low = count
        else:
            high = count
        if low and high <= MOST:
            count = (low + high) // 2
        else:
            count = min(MOST, count + stride) if low else max(1, count - stride)
            stride *= 2
    return low, tries


async def _next_at_its_tier(driver: Driver, fields: dict[str, Any]) -> tuple[dict[str, Any], Watched | None]:
    """One stream more, with no bounds of its own: why it is refused, and the stream at the tier that the refusal names."""
    refused = await driver.begin(**{name: value for name, value in fields.items() if name not in BOUNDS})
    answer = refused.refusal
    if answer is None:
        return {"reason": "it was let in", "tier": None}, refused
    if answer.tier is None:
        return {"reason": answer.reason, "tier": None}, None
    tier = answer.tier
    fps = tier.fps or fields["fps"]
    offered = {
        **fields,
        "steps": tier.steps,
        "min_steps": tier.steps,
        "fps": fps,
        "min_fps": fps,
        "width": tier.width,
        "height": tier.height,
        "frames_per_block": tier.frames_per_block,
        "max_frames_per_block": tier.frames_per_block,
    }
    lower = await driver.begin(**offered)
    told = {"reason": answer.reason, "tier": tier.model_dump(), "then_let_in": lower.accepted}
    return told, lower if lower.accepted else None


def _kept(streams: list[Watched]) -> bool:
    return bool(streams) and all(stream.stats.cpr >= HOLDS_CPR for stream in streams)


async def promise(seconds: float, fields: dict[str, Any]) -> dict[str, Any]:
    """Fill a system as far as it lets in and hold that; the same again with one more at the tier that its refusal names."""
    env = {"RHEOCAST_MAX_STREAMS": str(MOST)}
    async with driving(env=env, port=free_port()) as driver:
        await driver.warm_up(**fields)
        before = await _told(driver, fields)
        streams = await _fill(driver, MOST, fields)
        full = await _told(driver, fields)
        company = Company(driver)
        await asyncio.sleep(seconds)
        foreign = company.in_use()
        after = await _told(driver, fields)
        await driver.stop(*streams)
        held = {"kept": _kept(streams), "cores_of_others": foreign, **summary(streams)}
        await asyncio.sleep(2.0)
        again = await _fill(driver, MOST, fields)
        more = again
        while more:  # one at a time, each when it is known what those before it cost
            await asyncio.sleep(SETTLE_S)
            more = await _fill(driver, 1, fields)
            again = [*again, *more]
        answer, lower = await _next_at_its_tier(driver, fields)
        await asyncio.sleep(seconds)
        everyone = [*again, *([lower] if lower is not None else [])]
        await driver.stop(*everyone)
    return {
        "promised": before["tiers"][0]["more"],
        "told": {"before": _short(before), "full": _short(full), "at_the_end": _short(after)},
        "let_in": len(streams),
        "held": held,
        "next": {
            **answer,
            "let_in_before_it": len(again),
            "kept": _kept(everyone),
            "its_own": lower.figures() if lower is not None else None,
            "all": summary(everyone),
        },
    }


def _short(told: dict[str, Any]) -> dict[str, Any]:
    tier = told["tiers"][0]
    return {"more": tier["more"], "latency_ms": tier["latency_ms"], "load": told["load"], "one_more": tier["load"]}


async def capacity(*, seconds: float, hold_s: float, only: str, start: int, fields: dict[str, Any]) -> dict[str, Any]:
    """The promise, the number by bisection beside it, or both. ``start``: where the search begins; 0: at the promise."""
    pinned = {**fields, **PIN, "min_fps": fields["fps"]}
    found: dict[str, Any] = {}
    if only != "bisect":
        found = await promise(hold_s, pinned)
    if only != "promise":
        most, tries = await bisect(seconds, pinned, start or found.get("let_in", 0) or 8)
        found |= {"by_bisection": most, "tries": tries}
        if "let_in" in found and most:
            found["promised_to_measured"] = round(found["let_in"] / most, 3)
    return found
