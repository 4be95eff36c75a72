"""A task that is cancelled during a call to Redis ends, whenever the cancellation comes."""

from __future__ import annotations

import asyncio

import pytest

from shared.contracts.commands import StreamSpec
from shared.session.redis import RedisStore

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("ticks", [1, 2, 3, 4, 8])
async def test_a_cancellation_is_never_swallowed(redis_store: RedisStore, ticks: int) -> None:
    spec = StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon"})
    await redis_store.create("a", spec)
    calls = 0

    async def endless() -> None:
        nonlocal calls
        while True:
            await redis_store.close_chunk("a", calls, {"on_time": 4})
            calls += 1

    for _ in range(10):
        task = asyncio.create_task(endless())
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=2.0)
        assert done, "the cancellation was swallowed"
        assert task.cancelled()
