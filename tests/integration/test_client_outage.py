"""A client over an outage of NATS: old frames are not sent later, and it knows that it was away."""

from __future__ import annotations

import asyncio
import runpy
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.client import Api, Broker
from shared.contracts.views import StreamView
from tests.support.servers import embedded

pytestmark = pytest.mark.integration

EXAMPLE = Path(__file__).parents[2] / "examples" / "moderation.py"


class Counting(Api):
    """An API without streams that counts who asks for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.sweeps = 0

    async def streams(self, *states: str) -> AsyncIterator[StreamView]:
        self.sweeps += 1
        for view in list[StreamView]():
            yield view


async def test_frames_of_an_outage_are_dropped_and_whoever_moderates_looks_for_themselves(tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLE))
    with embedded(tmp_path, redis=False) as servers:
        async with Broker.connect(servers.nats_url) as broker, Counting() as api:
            moderator = example["Moderator"](api, [], "")
            sweeping = asyncio.create_task(moderator.sweep_after_outages(broker))
            await broker.push("s", b"a picture")
            assert broker.dropped == 0
            servers.kill("nats")
            async with asyncio.timeout(10):
                while broker.dropped < 5:
                    await broker.push("s", bytes(800_000))
                    await asyncio.sleep(0.02)
            assert api.sweeps == 0
            servers.start()
            async with asyncio.timeout(20):
                while not api.sweeps:
                    await asyncio.sleep(0.05)
            lost = broker.dropped
            await broker.push("s", b"a picture")
            assert broker.dropped == lost
            sweeping.cancel()
