"""Two schedulers, one lease: what the one that stands by hears, and does not count."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.scheduler.app import Scheduler
from services.scheduler.settings import Settings
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.clock import SystemClock
from shared.contracts import subjects
from shared.contracts.beats import Beat
from shared.lifecycle import Context
from shared.session.memory import MemoryStore
from shared.telemetry.metrics import Metrics
from shared.telemetry.setup import silent
from shared.tensors.store import HostTensorStore

pytestmark = pytest.mark.integration


WORKER = Beat(service="worker", instance="p0-w", incarnation="a", roles=("stage",), model="rheo-tiny", pipeline="p0")


def counted(metrics: Metrics) -> list[str]:
    """The lines about workers."""
    lines = metrics.exposition()[0].decode().splitlines()
    return [line for line in lines if line.startswith("rheocast_workers{")]


async def test_workers_are_counted_by_who_leads_alone(run_id: str, tmp_path: Path) -> None:
    broker, store = MemoryBroker(), MemoryStore()
    made: list[tuple[Scheduler, Context]] = []
    try:
        for number in range(2):
            name, bus = f"scheduler-{number}", MemoryBus(broker)
            settings = Settings(instance=name, models_dir=tmp_path)
            tensors = HostTensorStore(Path("/dev/shm"), run_id, name, bus=bus)
            context = Context(settings, bus, store, tensors, silent(), SystemClock(), name, "life", Metrics(name, name))
            scheduler = Scheduler(context, settings)
            await scheduler.start()
            scheduler.declare(context.metrics)
            made.append((scheduler, context))
            async with asyncio.timeout(5):
                while not made[0][0].beat_fields()["ready"]:
                    await asyncio.sleep(0.005)
        await made[0][1].bus.publish(subjects.beat("p0-w"), WORKER)
        async with asyncio.timeout(5):
            while not counted(made[0][1].metrics):
                await asyncio.sleep(0.005)
        assert [len(counted(context.metrics)) for _, context in made] == [1, 0]
    finally:
        for scheduler, context in made:
            await scheduler.close()
            await context.bus.close()
            context.tensors.close()
