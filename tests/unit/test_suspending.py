"""Which paused streams are set aside, when, and that going on brings them back first."""

from __future__ import annotations

import pytest

from services.scheduler.core import PipelineCore
from services.scheduler.cost_model import CostModel
from services.scheduler.messenger import RefusedError
from services.scheduler.moves import Moves
from services.scheduler.records import Phase, StreamRecord
from services.scheduler.stream_queue import StreamQueue, StreamSettings
from services.scheduler.suspending import Suspending, is_still
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import Received
from shared.clock import SystemClock
from shared.contracts import subjects
from shared.contracts.moving import StreamSuspended, SuspendStream
from shared.engine.plan.stream_plan import StreamPlan
from tests.support.messages import spec
from tests.unit.test_scheduler_core import MODEL, MS, chunk


def record(stream: str = "s", **changes: object) -> StreamRecord:
    made = StreamRecord(stream=stream, epoch=1, spec=spec(), width=96, height=64, noise=0.7)
    made.pipeline, made.workers, made.phase, made.paused = "p0", ("w0", "w1"), Phase.RUNNING, True
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def core(*streams: str) -> PipelineCore:
    made = PipelineCore("p0", 2, 1, CostModel())
    for stream in streams:
        plan = StreamPlan.for_model(stream, 1, MODEL)
        made.add(StreamQueue(stream, 1, False, 64, 96, MODEL, plan, StreamSettings(steps=2, seed=0, prompt_version=1)))
    return made


class Workers:
    """Two workers that answer on a bus, as real ones do; ``room`` says whether what is brought back finds any."""

    def __init__(self) -> None:
        self.bus = MemoryBus(MemoryBroker())
        self.moves = Moves(self.bus, SystemClock())
        self.asked: list[tuple[str, bool]] = []
        self.room = True

    async def start(self) -> None:
        await self.bus.subscribe(subjects.MOVED, self.moves.on_moved)
        await self.bus.subscribe(subjects.assign("worker"), self._on_assign)

    async def _on_assign(self, received: Received) -> None:
        asked: SuspendStream = received.message
        self.asked.append((asked.instance, asked.suspended))
        error = None if self.room or asked.suspended else f"{asked.instance} holds 16 streams already"
        answer = StreamSuspended(
            instance=asked.instance,
            stream=asked.stream,
            epoch=asked.epoch,
            move=asked.move,
            suspended=asked.suspended,
            error=error,
        )
        await self.bus.publish(subjects.MOVED, answer)


def test_a_stream_is_due_once_it_has_been_paused_for_long_and_nothing_of_it_is_under_way() -> None:
    suspending = Suspending(Workers().moves, 10.0)
    paused, running, stopping = record(), record("r", paused=False), record("x", phase=Phase.STOPPING)
    records, cores = [paused, running, stopping], {"p0": core("s", "r", "x")}
    assert suspending.due(records, cores, 100.0) == []
    assert suspending.due(records, cores, 109.9) == []
    assert suspending.due(records, cores, 110.0) == [paused]
    assert suspending.due(records, cores, 110.1) == [], "told once"
    assert suspending.due(records, cores, 150.0) == [paused], "a worker refused: asked again later"
    paused.suspended = True
    assert suspending.due(records, cores, 200.0) == []
    paused.suspended = paused.paused = False
    assert suspending.due(records, cores, 201.0) == []
    paused.paused = True
    assert suspending.due(records, cores, 202.0) == [], "the pause counts from its own beginning"
    assert Suspending(Workers().moves, -1.0).due(records, cores, 1e9) == []


def test_what_has_steps_left_or_in_flight_is_not_still() -> None:
    cores = {"p0": core("s", "other")}
    assert is_still(record(), cores)
    assert not is_still(record("unknown"), cores)
    cores["p0"].offer(chunk("s", 0, captured_ms=0, live=False), 0)
    assert is_still(record(), cores), "chunks that wait stay where they are"
    assert cores["p0"].schedule(10 * MS).batches
    assert not is_still(record(), cores)
    assert is_still(record("other"), cores)


async def test_every_worker_is_asked_and_going_on_brings_all_of_it_back() -> None:
    workers, cores = Workers(), {"p0": core("s")}
    await workers.start()
    suspending, paused = Suspending(workers.moves, 0.0), record()
    await suspending.set_aside(paused, cores)
    assert paused.suspended
    assert workers.asked == [("w0", True), ("w1", True)]
    workers.room = False
    with pytest.raises(RefusedError, match="w0 holds 16 streams already"):
        await suspending.bring_back(paused)
    assert paused.suspended, "it stays where it is"
    workers.room = True
    await suspending.bring_back(paused)
    assert not paused.suspended
    asked = len(workers.asked)
    await suspending.bring_back(paused)
    paused.paused = False
    await suspending.set_aside(paused, cores)
    assert len(workers.asked) == asked, "a stream that is not paused is left alone"
