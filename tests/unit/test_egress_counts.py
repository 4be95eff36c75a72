"""Counts of a client of both ways outlive its stream: a metric's count never goes back."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

from services.egress.handlers import Handlers
from services.egress.settings import Settings
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.clock import SystemClock
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream, StreamSpec, TakeStream
from shared.contracts.sinks import WhepSink
from shared.contracts.sources import PushSource
from shared.session.memory import MemoryStore
from shared.telemetry import names
from shared.telemetry.metrics import Metrics
from shared.telemetry.setup import silent
from shared.tensors.store import HostTensorStore

COUNT = 'rheocast_incidents_total{incident="peer_changes"} 3.0'


async def test_what_a_client_was_counted_for_stays_counted_when_it_has_gone() -> None:
    bus, store = MemoryBus(MemoryBroker()), MemoryStore()
    tensors = HostTensorStore(Path("/dev/shm"), secrets.token_hex(4), "egress-0", bus=bus)
    egress = Handlers("egress-0", Settings(), bus, store, tensors, silent().tracer, SystemClock())
    metrics = Metrics("egress", "egress-0")
    metrics.counts(names.INCIDENTS, "incident", egress._all_counters)
    await egress.start()
    spec = StreamSpec(source=PushSource(), sinks=(WhepSink(),), prompt="ink", width=64, height=64, peer_grace_s=60)
    await store.create("a", spec)
    take = TakeStream(instance="egress-0", stream="a", epoch=1, spec=spec, width=64, height=64, noise=0.5, credits=4)
    await bus.publish(subjects.assign("egress"), take)
    async with asyncio.timeout(20):
        while "a" not in egress._peers:
            await asyncio.sleep(0.01)
        egress._peers["a"].counters["peer_changes"] = 3
        assert COUNT in metrics.exposition()[0].decode()
        leave = LeaveStream(instance="egress-0", stream="a", epoch=1, drain=False)
        await bus.publish(subjects.assign("egress"), leave)
        while "a" in egress._peers or egress.streams:
            await asyncio.sleep(0.01)
    assert COUNT in metrics.exposition()[0].decode()
    await egress.close()
    tensors.close()
    await bus.close()
