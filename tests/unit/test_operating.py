"""What an operator asked for outlives the scheduler that was asked, and what recutting measures is what was done."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from services.scheduler.balancing import MIN_BATCHES
from services.scheduler.core import PipelineCore
from services.scheduler.cost_model import CostModel
from services.scheduler.desk import StreamDesk
from services.scheduler.fleet import Fleet
from services.scheduler.messenger import Messenger, RefusedError
from services.scheduler.migrating import Migrator
from services.scheduler.operating import Operating
from services.scheduler.recutting import Recutter
from services.scheduler.settings import Settings
from services.scheduler.stream_queue import StreamQueue
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import Received
from shared.clock import SystemClock
from shared.contracts import subjects
from shared.contracts.beats import Beat, MeasuredCost
from shared.contracts.events import MotionEstimated, StageTiming
from shared.contracts.operating import DrainWorker, FleetTold, Refused, WorkerState
from shared.contracts.tiers import Refusal
from shared.session.memory import MemoryStore
from tests.unit.test_recovery import MODEL, estimated, queue, record


def beat(incarnation: str = "a", **more: object) -> Beat:
    roles = ("text", "encode", "stage", "decode")
    values = {"service": "worker", "instance": "p0-w", "incarnation": incarnation, "roles": roles}
    return Beat.model_validate({**values, "model": "rheo-tiny", "pipeline": "p0", "stage": 0, "stages": 1, **more})


async def no_rebuild(core: PipelineCore, reason: str) -> None:
    raise AssertionError(f"{core.pipeline}: {reason}")


class Leader:
    """One scheduler's life."""

    def __init__(
        self, store: MemoryStore, rebuild: Callable[[PipelineCore, str], Awaitable[None]] = no_rebuild
    ) -> None:
        settings, clock, bus = Settings(), SystemClock(), MemoryBus(MemoryBroker())
        self.fleet = Fleet(1.5)
        desk = StreamDesk(settings, bus, store, clock, self.fleet)
        self.recutter = Recutter(settings, clock, self.fleet, desk, rebuild)
        migrator = Migrator(settings, clock, store, self.fleet, desk, Messenger(settings, bus, clock))
        self.operating = Operating(settings, clock, self.fleet, desk, self.recutter, migrator)

    async def ask(self, request: DrainWorker) -> FleetTold:
        return await self.operating.on_ask(Received(subjects.FLEET, request, 0, {}))


async def test_a_worker_that_is_emptied_stays_so_when_the_scheduler_is_another() -> None:
    store = MemoryStore()
    first = Leader(store)
    first.fleet.beat(beat(), 0.0)
    told = await first.ask(DrainWorker(worker="p0-w"))
    assert told.workers[0].state is WorkerState.DRAINED
    assert (await first.ask(DrainWorker(worker="p9-w"))).refused is Refused.UNKNOWN

    second = Leader(store)
    await second.operating.take_over()
    second.fleet.beat(beat(), 0.0)
    assert second.fleet.pipelines() == []
    assert second.operating.told().workers[0].state is WorkerState.DRAINED
    await second.ask(DrainWorker(worker="p0-w", undo=True))
    assert len(second.fleet.pipelines()) == 1

    third = Leader(store)
    await third.operating.take_over()
    third.fleet.beat(beat(), 0.0)
    assert len(third.fleet.pipelines()) == 1, "it was taken back"

    await third.ask(DrainWorker(worker="p0-w"))
    fourth = Leader(store)
    await fourth.operating.take_over()
    fourth.fleet.beat(beat("b"), 0.0)
    assert len(fourth.fleet.pipelines()) == 1, "a worker that was started anew is used"


async def test_a_worker_that_was_drained_and_stopped_is_not_counted_as_lost() -> None:
    leader = Leader(MemoryStore())
    for name in ("p0", "p1"):
        leader.fleet.beat(beat(instance=f"{name}-w", pipeline=name), 0.0)
    await leader.ask(DrainWorker(worker="p0-w"))
    assert leader.operating.worker_states() == {"drained": 1, "ready": 1}
    for member in leader.fleet.members.values():
        member.lost = True
    assert leader.operating.worker_states() == {"lost": 1}


def test_a_pipeline_that_is_not_there_is_told_apart_from_one_that_cannot() -> None:
    leader = Leader(MemoryStore())
    for name in ("p0", "p1"):
        leader.fleet.beat(beat(instance=f"{name}-w", pipeline=name), 0.0)
    with pytest.raises(RefusedError, match="there is no pipeline p7; it could go to: p1") as unknown:
        leader.operating.choose(record(), "p7")
    assert unknown.value.refusal is Refusal.UNKNOWN
    with pytest.raises(RefusedError, match="is on pipeline p0 already") as already:
        leader.operating.choose(record(), "p0")
    assert already.value.refusal is Refusal.OTHER


def test_encode_is_counted_by_what_was_encoded_and_decode_by_what_was_measured() -> None:
    recutter = Leader(MemoryStore()).recutter
    core = PipelineCore("p0", 2, 1, CostModel())
    stream: StreamQueue = queue()
    core.add(stream)
    tokens = MODEL.tokens(stream.width, stream.height)

    def encoded(chunk: int, frames: int, ms: float) -> MotionEstimated:
        timings = (StageTiming(hop="encode", queue_ms=0.0, compute_ms=ms),)
        return estimated(chunk, 1).model_copy(update={"latent_frames": frames, "timings": timings})

    recutter.on_encoded(core, encoded(0, 2, 20.0))  # the first chunk of a stream: two latent frames
    recutter.on_encoded(core, encoded(1, 1, 10.0))  # never offered to the core: as if it had been dropped
    recutter.on_encoded(core, estimated(2, 1))  # nothing was encoded for it
    watched = recutter.of("p0")
    assert watched.meter.encoded == 3 * tokens
    recutter.on_beat(beat(measured=(MeasuredCost(role="decode", items=1, units=2 * tokens, ms=50.0),)))
    recutter.on_beat(beat(role_ms={"decode": 999.0, "encode": 999.0}))
    for _ in range(MIN_BATCHES):  # a latent frame is decoded with each
        watched.meter.batch(1.0, tokens, (0.0, 0.0), tokens)
    first, last = watched.meter.workers((1,), MODEL.layers, 1, 1.0) or ()
    assert first.fixed / last.fixed == pytest.approx(30.0 / (MIN_BATCHES * 25.0))
