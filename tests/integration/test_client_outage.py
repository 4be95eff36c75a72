"""A client over an outage of NATS: old frames are not sent later, and it knows that something may have been missed."""

from __future__ import annotations

import argparse
import asyncio
import json
import runpy
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from shared.bus.nats import NatsBus
from shared.bus.port import Received
from shared.client import Api, Broker, UnreachableError
from shared.contracts import subjects
from shared.contracts.commands import Mode
from shared.contracts.events import LedgerTotals
from shared.contracts.sources import PushedFrame
from shared.contracts.views import Receipt, StreamView
from shared.embedded import EmbeddedServers
from tests.support.servers import embedded

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[2] / "examples"
VIEW = StreamView(
    id="s",
    state="live",
    prompt="a violent scene",
    prompt_version=1,
    model="rheo-tiny",
    mode=Mode.LIVE,
    width=96,
    height=64,
    steps=1,
    seed=0,
    ledger=LedgerTotals(),
)


class Telling(Api):
    """An API whose one stream runs from ``there`` on, until it is stopped."""

    there = True
    stopped = 0

    async def start(self, spec: Any, stream: str | None = None, *, key: str | None = None) -> StreamView:
        return VIEW

    async def stream(self, stream: str) -> StreamView:
        return VIEW

    async def streams(self, *states: str) -> AsyncIterator[StreamView]:
        if self.there and not self.stopped:
            yield VIEW

    async def stop(self, stream: str, *, drain: bool = True) -> Receipt:
        self.stopped += 1
        return Receipt(stream=stream, command="c", version=1)

    async def ended(self, stream: str, timeout_s: float = 60.0) -> StreamView:
        return VIEW.model_copy(update={"state": "stopped"})


def example(name: str, api: Api) -> dict[str, Any]:
    """An example's functions, which find this API wherever it is."""
    found = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    found["moderate" if name == "moderation" else "publish"].__globals__["Api"] = lambda *_: api
    return found


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


async def listening(servers: EmbeddedServers, heard: list[PushedFrame]) -> NatsBus:
    """Who takes the frames of stream ``s``, as ingest does."""

    async def keep(received: Received) -> None:
        heard.append(received.message)

    bus = await NatsBus.connect(servers.nats_url)
    await bus.subscribe(subjects.stream("s", "push"), keep)
    return bus


async def heard_of(broker: Broker, heard: list[PushedFrame], data: bytes) -> None:
    """Push it until it comes: the other's subscription may be a moment behind."""
    async with asyncio.timeout(20):
        while not any(frame.data == data for frame in heard):
            await broker.push("s", data)
            await asyncio.sleep(0.05)


async def test_frames_of_an_outage_are_dropped_and_counted(tmp_path: Path) -> None:
    heard: list[PushedFrame] = []
    with embedded(tmp_path, redis=False) as servers:
        async with Broker.connect(servers.nats_url) as broker:
            bus = await listening(servers, heard)
            await heard_of(broker, heard, b"before")
            assert (broker.dropped, broker.reconnects) == (0, 0)
            servers.kill("nats")
            async with asyncio.timeout(10):
                while broker.dropped < 5:  # much more than is kept for later
                    await broker.push("s", bytes(800_000))
                    await asyncio.sleep(0.02)
            await broker.end("s")  # nothing is in its way
            lost = broker.dropped
            assert broker.reconnects == 0
            servers.start()
            await until(lambda: bus.connected and broker.reconnects == 1)
            await heard_of(broker, heard, b"after")
            assert broker.dropped == lost
            assert not [frame for frame in heard if len(frame.data) == 800_000]
            await bus.close()
        with pytest.raises(UnreachableError):  # closed for good: nobody is made to believe that it comes back
            await broker.push("s", b"never")
        assert broker.dropped == lost


async def test_moderation_judges_what_was_told_while_nats_was_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api = Telling()
    api.there = False
    with embedded(tmp_path, redis=False) as servers:
        options = argparse.Namespace(
            forbid=["violent"], instead="", actions=1, api="", token=None, nats=servers.nats_url
        )
        moderating = asyncio.create_task(example("moderation", api)["moderate"](options))
        told = ""
        async with asyncio.timeout(10):
            while "watching" not in told:
                told += capsys.readouterr().out
                await asyncio.sleep(0.01)
        servers.kill("nats")
        api.there = True  # nobody hears of it
        await asyncio.sleep(0.2)
        assert not api.stopped
        servers.start()
        async with asyncio.timeout(20):
            await moderating
    assert api.stopped == 1
    assert json.loads(capsys.readouterr().out)["did"] == "stop"


async def test_the_publisher_goes_on_over_an_outage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[PushedFrame] = []
    with embedded(tmp_path, redis=False) as servers:
        bus = await listening(servers, heard)
        options = argparse.Namespace(
            size=(96, 64), prompt="ink", fps=50, deadline_ms=1000, seconds=4, file=None, stream="s", api="", token=None
        )
        options.nats = servers.nats_url
        publishing = asyncio.create_task(example("publisher", Telling())["publish"](options))
        await until(lambda: len(heard) > 3)
        servers.kill("nats")
        await asyncio.sleep(0.5)
        servers.start()
        async with asyncio.timeout(30):
            await publishing
        await until(lambda: heard[-1].last)
        await bus.close()
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["state"] == "stopped"
    assert done["unsent"] > 5
    assert len(heard) <= 4 * 50 + 1 - done["unsent"]
