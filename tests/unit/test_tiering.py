"""What the ladder says is carried out and told: blocks are bound, sources paced, sessions and users know. Virtual time."""

from __future__ import annotations

import asyncio

import pytest

from services.scheduler.admitting import Admitting
from services.scheduler.core import PipelineCore
from services.scheduler.cost_model import CostModel
from services.scheduler.fleet import Fleet
from services.scheduler.messenger import Messenger, RefusedError
from services.scheduler.records import StreamRecord
from services.scheduler.settings import Settings
from services.scheduler.stream_queue import Applied
from services.scheduler.tiering import COMMAND, EVERY_S, Tiering
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import Received
from shared.clock import VirtualClock
from shared.contracts import subjects
from shared.contracts.beats import Beat
from shared.contracts.commands import Mode, StreamPatch
from shared.contracts.events import ChunkClosed, EventKind, LedgerTotals, StreamEvent
from shared.contracts.tiers import PaceStream
from shared.session.memory import MemoryStore
from shared.session.state import StreamState
from tests.unit.test_recovery import MODEL, queue, record

TOKENS = MODEL.tokens(160, 96)


class Bench:
    """Streams at 8 fps and 2 steps on the pipelines p0 and p1; a step alone takes ``step_ms`` on p0, batching gains nothing."""

    def __init__(self, step_ms: float) -> None:
        settings, self.clock, self.bus = Settings(), VirtualClock(), MemoryBus(MemoryBroker())
        self.store, fleet = MemoryStore(), Fleet(1e9)
        self.cores: dict[str, PipelineCore] = {}
        for name in ("p0", "p1"):
            cost = CostModel()
            cost.seed("stage.0", [(n, float(n * TOKENS), n * step_ms) for n in (1, 2, 4, 8)])
            for role in ("encode", "decode"):
                cost.seed(role, [(1, float(TOKENS), 1.0)])
            self.cores[name] = PipelineCore(name, 1, 1, cost)
            roles = ("text", "encode", "stage", "decode")
            beat = {
                "service": "worker",
                "instance": f"{name}-w",
                "incarnation": "a",
                "roles": roles,
                "model": "rheo-tiny",
            }
            fleet.beat(Beat.model_validate({**beat, "pipeline": name, "stage": 0, "stages": 1}), 0.0)
        self.admitting = Admitting(settings, fleet, self.clock, lambda name: self.cores[name].cost)
        self.admitting.follow()
        self.records: dict[str, StreamRecord] = {}
        messenger = Messenger(settings, self.bus, self.clock)
        self.tiering = Tiering(self.store, messenger, self.clock, self.admitting, self.records, self.cores)
        self.events: list[StreamEvent] = []
        self.paced: list[PaceStream] = []

    async def begin(self, name: str, mode: Mode = Mode.LIVE, **spec: object) -> StreamRecord:
        made = record(name, mode)
        wanted = {**made.spec.model_dump(), "fps": 8.0, "steps": 2, "deadline_ms": 2000, **spec}
        made.spec = type(made.spec).model_validate(wanted)
        self.records[name] = made
        await self.store.create(name, made.spec)
        for state in (StreamState.STARTING, StreamState.LIVE):
            if (await self.store.get(name) or {}).get("state") != state:
                await self.store.move(name, state)
        self.tiering.begin(made, MODEL)
        self.cores["p0"].add(queue(name))

        async def hear(received: Received) -> None:
            self.events.append(received.message)

        await self.bus.subscribe(subjects.stream(name, "event"), hear)
        return made

    async def listen(self) -> None:
        async def hear(received: Received) -> None:
            if isinstance(received.message, PaceStream):
                self.paced.append(received.message)

        await self.bus.subscribe(subjects.assign("ingest"), hear)

    async def run(self, seconds: float) -> None:
        for _ in range(round(seconds / EVERY_S)):
            self.clock.jump(EVERY_S + 1e-6)
            await self.tiering.tick()
            for _ in range(3):
                await asyncio.sleep(0)

    async def enters(self, stream: str) -> None:
        """A block enters: what waits to be applied is."""
        held = self.cores["p0"].streams[stream]
        for command in [name for name in held.pending if name.startswith(COMMAND)]:
            del held.pending[command]
            assert await self.tiering.applied(Applied(stream, command, 3, 7, 700))
        await asyncio.sleep(0)
        await asyncio.sleep(0)


async def test_too_much_to_do_takes_steps_tells_it_with_the_chunk_and_gives_them_back() -> None:
    bench = Bench(step_ms=90.0)
    for name in "abc":
        await bench.begin(name)
    await bench.run(0.4)
    assert all(bench.cores["p0"].streams[name].settings.steps == 2 for name in "abc"), "not at once"
    await bench.run(1.0)
    given = [name for name in "abc" if bench.cores["p0"].streams[name].settings.steps == 1]
    assert given
    assert bench.events == [], "told with its first chunk, not before"
    for name in given:
        await bench.enters(name)
    assert [(event.stream, event.event, event.chunk, event.pts) for event in bench.events] == [
        (name, EventKind.TIER_CHANGED, 7, 700) for name in given
    ]
    assert all("too much to do" in event.reason for event in bench.events)
    assert all(event.tier is not None and event.tier.steps == 1 for event in bench.events)
    kept = await bench.store.get(given[0])
    assert kept is not None
    assert kept["state"] == StreamState.DEGRADED
    assert "too much to do" in str(kept["tier"])

    bench.cores["p0"].cost.scale("stage.0", 0.2)
    await bench.run(30.0)
    assert all(bench.cores["p0"].streams[name].settings.steps == 2 for name in "abc"), "there is room again"
    for name in given:
        await bench.enters(name)
    assert {event.reason for event in bench.events[len(given) :]} == {"there is room again"}


async def test_a_stream_that_may_not_give_steps_is_paced_at_its_source() -> None:
    bench = Bench(step_ms=300.0)
    await bench.listen()
    await bench.begin("a", min_steps=2)
    await bench.run(1.6)
    assert bench.paced
    assert bench.paced[-1].stream == "a"
    assert 4.0 <= bench.paced[-1].fps < 8.0
    assert bench.records["a"].pace_version == len(bench.paced)


async def test_lossless_streams_have_no_ladder_and_a_stream_that_ended_is_forgotten() -> None:
    bench = Bench(step_ms=300.0)
    lossless = await bench.begin("a", Mode.LOSSLESS)
    live = await bench.begin("b")
    assert bench.tiering.ladders["p0"].tier("a") is None
    assert bench.tiering.ladders["p0"].tier("b") is not None
    with pytest.raises(RefusedError, match="only a live source"):
        bench.tiering.check_rate(lossless, 4.0, False)
    bench.tiering.check_rate(live, 4.0, False)
    assert live.fps_cap == 4.0
    bench.tiering.end(live)
    assert len(bench.tiering.ladders["p0"]) == 0
    await bench.run(2.0)
    assert bench.cores["p0"].streams["a"].settings.steps == 2


async def test_a_stream_takes_its_tier_along_to_another_pipeline() -> None:
    bench = Bench(step_ms=300.0)
    moved = await bench.begin("a")
    await bench.run(1.6)
    had = bench.tiering.ladders["p0"].tier("a")
    assert had is not None
    assert had.steps == 1
    moved.pipeline = "p1"
    await bench.run(0.2)
    assert bench.tiering.ladders["p0"].tier("a") is None
    assert bench.tiering.ladders["p1"].tier("a") == had


async def test_what_the_user_asks_for_counts_from_now_on_and_only_what_was_missed_for_time_counts_as_late() -> None:
    bench = Bench(step_ms=10.0)
    live = await bench.begin("a")
    held = bench.cores["p0"].streams["a"]
    assert bench.tiering.asked(live, StreamPatch(steps=1), held.settings) == (1, 1)
    assert live.wish is not None
    assert live.wish.asked.steps == 1
    ladder = bench.tiering.ladders["p0"]
    for dropped, late in (({"ingest:paused": 50}, set[str]()), ({"ingest:paused": 50, "scheduler:stale": 50}, {"a"})):
        totals = LedgerTotals(frames_in=50 + sum(dropped.values()), on_time=50, dropped=dropped)
        bench.tiering.on_closed(ChunkClosed(stream="a", epoch=1, closed_chunks=25, through=25, totals=totals))
        assert ladder._late(bench.clock.monotonic()) == late
