"""A metric's count never goes back: it outlives what was counted, and begins with nothing that another has counted."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

from services.egress.accounts import Accounts
from services.egress.handlers import Handlers
from services.egress.ledger import ChunkVerdict, StreamLedger
from services.egress.settings import Settings
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.clock import SystemClock
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream, StreamSpec, TakeStream
from shared.contracts.events import LedgerTotals, SourceTotals
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


async def test_what_a_predecessor_has_counted_is_not_counted_again() -> None:
    bus, store = MemoryBus(MemoryBroker()), MemoryStore()
    tensors = HostTensorStore(Path("/dev/shm"), secrets.token_hex(4), "egress-0", bus=bus)
    egress = Handlers("egress-0", Settings(), bus, store, tensors, silent().tracer, SystemClock())
    metrics = Metrics("egress", "egress-0")
    egress.declare(metrics)
    await egress.start()
    spec = StreamSpec(source=PushSource(), sinks=(WhepSink(),), prompt="ink", width=64, height=64)
    await store.create("a", spec)
    await store.close_chunk("a", 0, {"on_time": 5})
    await store.close_chunk("a", 1, {"worker:lost": 4})
    await store.put_ledger_frames_in("a", 12, {"ingest:rate": 3})
    take = TakeStream(instance="egress-0", stream="a", epoch=2, spec=spec, width=64, height=64, noise=0.5, credits=4)
    await bus.publish(subjects.assign("egress"), take)

    def counted() -> dict[str, float]:
        lines = metrics.exposition()[0].decode().splitlines()
        each = [line.rpartition(" ") for line in lines if line.startswith("rheocast_frames_total{")]
        return {labels: float(count) for labels, _, count in each if float(count)}

    async with asyncio.timeout(20):
        while "a" not in egress.streams:
            await asyncio.sleep(0.01)
        assert counted() == {}
        stream = egress._streams["a"]
        assert (stream.totals.frames_in, stream.totals.on_time, stream.totals.dropped_total) == (12, 5, 7), "whole"
        stream._core.ledger.close(ChunkVerdict(2, on_time=1, late=3))
        mine = counted()
        assert sorted(mine.values()) == [1, 3]
        await bus.publish(subjects.assign("egress"), LeaveStream(instance="egress-0", stream="a", epoch=2, drain=False))
        while egress.streams:
            await asyncio.sleep(0.01)
    assert counted() == mine, "and it stays so when the stream has ended"
    await egress.close()
    tensors.close()
    await bus.close()


def test_a_ledger_tells_what_came_since_it_began() -> None:
    base = LedgerTotals(frames_in=14, on_time=5, late=2, dropped={"worker:lost": 4, "ingest:rate": 3})
    ledger = StreamLedger(base, closed_chunks=2, through=2)
    assert ledger.totals_here() == LedgerTotals()
    ledger.observe(SourceTotals(captured=20, numbered=15, chunks=3, dropped={"rate": 5}), ended=False)
    ledger.close(ChunkVerdict(2, skipped=1, dropped={"worker:lost": 1, "egress:late": 2}))
    here = {"egress:late": 2, "ingest:rate": 2, "worker:lost": 1}
    assert ledger.totals_here() == LedgerTotals(frames_in=6, skipped=1, dropped=here)
    assert base.plus(ledger.totals_here()) == ledger.totals()


async def test_drops_at_ingest_are_stored_while_no_chunk_is_closed() -> None:
    store, ledger = MemoryStore(), StreamLedger()
    await store.create("a", StreamSpec(source=PushSource(), sinks=(WhepSink(),), prompt="ink", width=64, height=64))
    accounts = Accounts("a", ledger, store)
    ledger.observe(SourceTotals(captured=30, dropped={"paused": 30}), ended=False)
    assert await accounts.write() == 0
    totals, _, _ = await store.ledger("a")
    assert totals == LedgerTotals(frames_in=30, dropped={"ingest:paused": 30})
