"""Taking and leaving while the device has work: nothing that runs loses what it needs, nothing fresh is closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.worker import assignments
from services.worker.assignments import LIVE_TTL_S, PAUSED_TTL_S, Assignments
from services.worker.core import Rank
from services.worker.device_thread import DeviceThread
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream, TakeStream
from tests.support.messages import spec


class Bench:
    """A worker's assignments on a real device thread; the runtime only tells what it was asked."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.refuses = False
        self.device = DeviceThread(asyncio.get_running_loop(), lambda: None)
        self.device.start()
        self.bus = MemoryBus(MemoryBroker())
        settings = SimpleNamespace(max_streams=4, roles=(), pipeline="p0")
        runtime = SimpleNamespace(settings=settings, open=self.open, close=lambda stream: self.told.append("close"))
        context = SimpleNamespace(bus=self.bus, instance="w0")
        self.worker = Assignments(
            cast("Any", context), cast("Any", runtime), self.device, cast("Any", None), cast("Any", None)
        )

    def open(self, stream: str, height: int, width: int, steps: int) -> None:
        self.told.append(f"open {steps}")
        if self.refuses:
            raise RuntimeError("no room")

    def take(self, epoch: int = 1, live: bool = True) -> asyncio.Task[None]:
        wanted = spec() if live else spec().model_copy(update={"mode": "lossless"})
        message = TakeStream(
            instance="w0", stream="s", epoch=epoch, spec=wanted, width=64, height=64, noise=0.5, credits=4
        )
        return asyncio.ensure_future(self.worker.on_assign(Received(subjects.assign("worker"), message, 0, {})))

    async def leave(self, epoch: int = 1) -> None:
        message = LeaveStream(instance="w0", stream="s", epoch=epoch, drain=False)
        await self.worker.on_assign(Received(subjects.assign("worker"), message, 0, {}))

    def busy(self) -> threading.Event:
        """The device has a batch under way until this is set, and another one behind it."""
        done = threading.Event()
        self.device.submit(Rank.STAGE, lambda: done.wait(5), lambda _: None)
        self.device.submit(Rank.STAGE, lambda: self.told.append("batch"), lambda _: None)
        return done

    async def settle(self) -> None:
        """Until the device has nothing left to do."""
        for _ in range(3):
            await self.device.call(Rank.TEXT, lambda: None)
            await asyncio.sleep(0.01)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(assignments, "CLOSE_DELAY_S", 0.0)
    made = Bench()
    yield made
    made.device.stop()
    await made.bus.close()


async def test_a_stream_that_is_taken_anew_waits_for_its_batches_under_way(bench: Bench) -> None:
    await bench.take()
    done = bench.busy()
    again = bench.take(epoch=2)
    await asyncio.sleep(0.05)
    done.set()
    await again
    assert bench.told == ["open 2", "batch", "open 2"]


async def test_a_close_that_comes_late_leaves_the_next_stream_of_that_name_alone(bench: Bench) -> None:
    await bench.take()
    await bench.leave()
    done = bench.busy()
    await asyncio.sleep(0.05)  # the close waits behind the batches now
    again = bench.take(epoch=2)
    await asyncio.sleep(0.05)
    done.set()
    await again
    await bench.settle()
    assert bench.told == ["open 2", "open 2", "batch"]
    await bench.leave(epoch=2)
    await asyncio.sleep(0.05)
    await bench.settle()
    assert bench.told[-1] == "close"


async def test_what_could_not_be_opened_is_closed_again(bench: Bench) -> None:
    bench.refuses = True
    await bench.take()
    await bench.settle()
    assert bench.told == ["open 2", "close"]
    assert not bench.worker.streams


async def test_latents_of_a_lossless_stream_wait_out_a_pause(bench: Bench) -> None:
    await bench.take()
    assert bench.worker.streams["s"].waiting_ttl_s == LIVE_TTL_S
    await bench.take(epoch=2, live=False)
    assert bench.worker.streams["s"].waiting_ttl_s == PAUSED_TTL_S
