"""Streams that lost somebody who does not come back: another leader ends them, another egress closes them, another
motion estimator goes on. Virtual time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from services.scheduler.core import PipelineCore
from services.scheduler.cost_model import CostModel
from services.scheduler.desk import StreamDesk
from services.scheduler.fleet import Fleet
from services.scheduler.messenger import Messenger
from services.scheduler.migrating import Migrator
from services.scheduler.records import Phase, StreamRecord
from services.scheduler.recutting import STEADY_S, Recutter
from services.scheduler.settings import Settings
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import BusUnavailableError, Received
from shared.clock import VirtualClock
from shared.contracts import subjects
from shared.contracts.beats import Beat
from shared.contracts.commands import LeaveStream, TakeStream
from shared.contracts.events import EventKind, StreamEvent
from shared.session.memory import MemoryStore
from shared.session.state import Owner, StreamState
from tests.unit.test_recovery import queue, record

SERVICES = ("ingest", "worker", "motion", "egress")


class Leader:
    """A scheduler's desk, and what it says to everybody."""

    def __init__(self, *beating: str) -> None:
        self.clock, self.bus, self.store = VirtualClock(), MemoryBus(MemoryBroker()), MemoryStore()
        self.fleet = Fleet(1.5)
        for instance in beating:
            beat = Beat(service=instance.rsplit("-", 1)[0], instance=instance, incarnation="a", roles=())
            self.fleet.beat(beat, 0.0)
        self.desk = StreamDesk(Settings(), self.bus, self.store, self.clock, self.fleet)
        self.left: list[LeaveStream] = []
        self.taken: list[TakeStream] = []
        self.events: list[StreamEvent] = []

    async def listen(self) -> None:
        async def assigned(received: Received) -> None:
            message = received.message
            if isinstance(message, LeaveStream):
                self.left.append(message)
            elif isinstance(message, TakeStream):
                self.taken.append(message)

        async def told(received: Received) -> None:
            self.events.append(received.message)

        for service in SERVICES:
            await self.bus.subscribe(subjects.assign(service), assigned)
        await self.bus.subscribe(subjects.stream("a", "event"), told)

    async def session(self, made: StreamRecord) -> dict[str, Any]:
        """The store's session of a live stream."""
        await self.store.create("a", made.spec)
        await self.store.put("a", Owner.SCHEDULER, {"assignment": made.assignment(), "epoch": made.epoch})
        await self.store.move("a", StreamState.LIVE)
        return await self.store.get("a") or {}

    async def through(self, work: Coroutine[Any, Any, None], seconds: float) -> None:
        task = asyncio.create_task(work)
        for _ in range(round(seconds / 0.1)):
            for _ in range(5):
                await asyncio.sleep(0)
            await self.clock.advance(0.1)
        assert task.done(), f"it takes longer than {seconds} s"
        await task

    async def state(self) -> object:
        return ((await self.store.get("a")) or {}).get("state")


async def test_a_stream_that_another_leader_left_is_ended() -> None:
    leader = Leader("egress-0")
    await leader.listen()
    session = await leader.session(record())
    await leader.through(leader.desk.adopt_lost("a", session), 1.0)
    assert [(leave.instance, leave.failure) for leave in leader.left] == [
        ("ingest-0", "the scheduler was restarted"),
        ("egress-0", "the scheduler was restarted"),
    ]
    assert await leader.state() == StreamState.STOPPING
    failed = StreamEvent(stream="a", event=EventKind.FAILED, service="egress", at_ns=1, epoch=1, reason="closed")
    await leader.desk.on_ended(failed)
    assert await leader.state() == StreamState.FAILED
    assert leader.desk.records == {}
    assert {leave.instance for leave in leader.left} >= {"p0-w", "motion-0"}, "everyone let go"


@pytest.mark.parametrize("others", [("egress-1",), ()])
async def test_a_stream_whose_egress_stays_away_is_closed_by_another_or_ends_without(others: tuple[str, ...]) -> None:
    leader = Leader(*others)
    await leader.listen()
    made = record()
    leader.desk.records["a"] = made
    await leader.session(made)
    await leader.through(leader.desk.fail("a", "egress-0 sent no heartbeat"), 20.0)
    told = {leave.instance: leave.failure for leave in leader.left}
    assert told["ingest-0"] == "egress-0 sent no heartbeat"
    if others:
        assert told["egress-1"] == "egress-0 sent no heartbeat"
        assert made.phase is Phase.STOPPING, "until that one has told that the ledger is closed"
    else:
        assert {"p0-w", "motion-0", "egress-0"} <= told.keys()
        assert await leader.state() == StreamState.FAILED
        assert leader.desk.records == {}
        assert [(event.event, event.reason) for event in leader.events] == [
            (EventKind.FAILED, "egress-0 sent no heartbeat")
        ]


async def test_a_motion_that_comes_back_under_another_name_is_given_the_streams() -> None:
    leader = Leader("motion-0")
    await leader.listen()
    made = record()
    leader.desk.records["a"] = made
    await leader.session(made)
    recovering = leader.desk.recovering
    assert recovering.without_motion() == []
    leader.fleet.members["motion-0"].lost = True
    assert recovering.without_motion() == [], "there is nobody else"
    leader.fleet.beat(Beat(service="motion", instance="motion-9", incarnation="b", roles=()), 3.0)
    for renewal in recovering.without_motion():
        await renewal
    await asyncio.sleep(0)
    assert [take.instance for take in leader.taken] == ["motion-9"]
    session = await leader.store.get("a") or {}
    assert session["assignment"]["motion"] == "motion-9"
    assert recovering.without_motion() == []


async def test_a_migration_does_not_wait_for_chunks_that_egress_has_closed() -> None:
    """A still picture's chunks are skipped: they go from ingest to egress, and the scheduler never sees them."""
    leader = Leader()
    made = record()
    await leader.session(made)
    migrator = Migrator(
        Settings(),
        leader.clock,
        leader.store,
        leader.fleet,
        leader.desk,
        Messenger(Settings(), leader.bus, leader.clock),
    )
    waiting = asyncio.create_task(migrator._drained(made, queue(), 2))
    await leader.clock.advance(2.0)
    assert not waiting.done(), "chunks 0 and 1 may be on their way"
    for number in (0, 1):
        await leader.store.close_chunk("a", number, {"skipped": 4})
    for _ in range(20):
        await leader.clock.advance(0.1)
    await asyncio.wait_for(waiting, 5.0)


async def test_a_pipeline_whose_repair_cannot_be_told_is_not_busy_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    leader = Leader()
    for stage in (0, 1):  # both have the first blocks: one came back as it was started
        roles = ("text", "encode", "stage") if stage == 0 else ("stage", "decode")
        beat = Beat(
            service="worker", instance=f"p0-{stage}", incarnation="a", roles=roles, pipeline="p0", stage=stage, stages=2,
            model="rheo-tiny", first_block=0, last_block=2, generation=1,
        )  # fmt: skip
        leader.fleet.beat(beat, 0.0)
    leader.desk.make_core = lambda pipeline: PipelineCore(pipeline.name, 2, 1, CostModel())
    (unfit,) = leader.fleet.pipelines(usable=False)
    leader.desk.core_of(unfit).add(queue())

    async def away(*_: object) -> None:
        raise BusUnavailableError("no broker")

    recutter = Recutter(Settings(), leader.clock, leader.fleet, leader.desk, away)
    monkeypatch.setattr(leader.bus, "publish", away)
    for _ in range(2):
        leader.clock.jump(STEADY_S + 1.0)
        await recutter.tick()
    task = recutter.of("p0").task
    assert task is not None
    await asyncio.wait_for(asyncio.wait({task}), 5.0)
    assert not recutter.of("p0").state.busy
    async with asyncio.timeout(5.0), recutter.opening("p0"):
        pass
