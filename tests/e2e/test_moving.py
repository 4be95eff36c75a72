"""Blocks change hands and streams change pipelines while they run: their pixels are those of an undisturbed run.

The tests on two pipelines share a system; all but the last, whose worker dies, leave both of them taking streams.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from bench.system.straggler import held_up
from services.cli.drain import drain
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.commands import Mode, PatternSource
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.moving import ExportState
from shared.contracts.operating import (
    CutPipeline,
    DrainWorker,
    FleetAsked,
    FleetTold,
    MigrateStream,
    PipelineView,
    Refused,
    WorkerState,
)
from shared.contracts.tiers import Refusal
from shared.embedded import free_port
from tests.support import clips
from tests.support.lab import Lab, Running, difference, frames_of, reconciles
from tests.support.pace import is_slow

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]
FRAMES = 85
SMALL = {"width": 96, "height": 64, "seed": 5}
LIVE = {"mode": Mode.LIVE, "fps": 8, "width": 96, "height": 64, "deadline_ms": 4000}


@dataclass(frozen=True, slots=True)
class Pair:
    """A system of two pipelines of one worker each, and a clip with what an undisturbed run makes of it."""

    lab: Lab
    url: str
    clip: Path
    alone: Path


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    folder, port = tmp_path_factory.mktemp("pair"), free_port()
    clip, output = clips.make_clip(folder / "in.mp4", frames=FRAMES, width=96, height=64, seed=3), folder / "alone.mp4"
    async with Lab.start(folder, pipelines=2, gateway_port=port) as lab:
        whole(await lab.run(clip, output, **SMALL))
        yield Pair(lab, f"http://127.0.0.1:{port}", clip, output)


async def ask(lab: Lab, request: Any) -> FleetTold:
    told: FleetTold = await lab.system.bus.request(subjects.FLEET, request, 60.0)
    return told


async def event_of(running: Running, command: str, *kinds: EventKind) -> StreamEvent:
    async with asyncio.timeout(40):
        while True:
            for event in running.events:
                if event.command == command and event.event in kinds:
                    return event
            await asyncio.sleep(0.02)


async def migrate(lab: Lab, running: Running, pipeline: str = "") -> StreamEvent:
    command = secrets.token_hex(6)
    message = MigrateStream(command=command, stream=running.stream, pipeline=pipeline)
    await lab.system.bus.publish(subjects.stream(running.stream, "control"), message)
    return await event_of(running, command, EventKind.MIGRATED, EventKind.WARNING, EventKind.REFUSED)


async def under_way(running: Running, chunks: int) -> None:
    """Until so many chunks were shown."""
    async with asyncio.timeout(60):
        while running.closed is None or running.closed.closed_chunks < chunks:
            await asyncio.sleep(0.02)


def whole(running: Running, frames: int = FRAMES) -> None:
    """Every frame went out, and the ledger knows of each."""
    event = running.last
    assert event.event is EventKind.STOPPED, event.reason
    assert reconciles(event)
    assert event.totals is not None
    assert (event.totals.frames_in, event.totals.dropped_total) == (frames, 0)


async def place(lab: Lab, running: Running) -> PipelineView:
    """The pipeline that a stream is on."""
    return next(p for p in (await ask(lab, FleetAsked())).pipelines if running.stream in p.streams)


async def worker_is(lab: Lab, worker: str, state: WorkerState) -> None:
    async with asyncio.timeout(40):
        while (await ask(lab, FleetAsked(worker=worker))).workers[0].state is not state:
            await asyncio.sleep(0.1)


async def test_a_stream_goes_to_another_pipeline_and_a_worker_is_emptied(pair: Pair) -> None:
    lab = pair.lab
    told = await ask(lab, FleetAsked())
    assert [pipeline.name for pipeline in told.pipelines] == ["p0", "p1"]
    assert {worker.state for worker in told.workers} == {WorkerState.READY}

    running = await lab.begin(pair.clip, lab.folder / "moved.mp4", **SMALL)
    await under_way(running, 4)
    for _ in range(2):  # there, and back again
        moved = await migrate(lab, running)
        assert moved.event is EventKind.MIGRATED, moved.reason
        assert moved.chunk > 0
    refused = await migrate(lab, running, "p7")
    assert refused.event is EventKind.REFUSED
    assert "there is no pipeline p7" in refused.reason
    assert refused.refusal is Refusal.UNKNOWN
    await lab.end(running)
    whole(running)
    assert difference(frames_of(lab.folder / "moved.mp4"), frames_of(pair.alone)) == 0

    # A prompt that comes after a move reaches the workers that have the stream now.
    live = await lab.begin(PatternSource(), **LIVE)
    await under_way(live, 2)
    worker = (await place(lab, live)).workers[0]
    told = await ask(lab, DrainWorker(worker=worker))
    assert told.error is None
    await worker_is(lab, worker, WorkerState.DRAINED)
    async with asyncio.timeout(20):
        while not live.of(EventKind.MIGRATED):
            await asyncio.sleep(0.05)
    applied = await lab.update(live, prompt="neon lights")
    assert applied.event is EventKind.APPLIED, applied.reason
    stuck = await migrate(lab, live)
    assert stuck.event is EventKind.REFUSED, "the only other pipeline is being emptied"
    event = await lab.stop(live)
    assert event.event is EventKind.STOPPED, event.reason
    assert reconciles(event)
    told = await ask(lab, DrainWorker(worker=worker, undo=True))
    assert told.workers[0].state is WorkerState.READY


async def test_a_worker_that_is_emptied_by_force_ends_only_what_has_no_other_place(pair: Pair) -> None:
    lab = pair.lab

    def empty(worker: str, **how: bool) -> dict[str, Any]:
        return drain(pair.url, worker, say=lambda _: None, **how)

    live = await lab.begin(PatternSource(), lab.folder / "forced.mp4", **LIVE)
    await under_way(live, 2)
    first = (await place(lab, live)).workers[0]
    view = await asyncio.to_thread(empty, first, force=True)
    assert (view["state"], view["streams"]) == ("drained", [])
    assert live.of(EventKind.MIGRATED), "there was room on the other pipeline: it went on there"
    assert not live.ended.is_set()

    second = (await place(lab, live)).workers[0]
    assert second != first
    waits = await asyncio.to_thread(empty, second, wait=False)
    assert (waits["state"], waits["streams"]) == ("draining", [live.stream])
    await under_way(live, live.closed.closed_chunks + 2 if live.closed is not None else 2)
    assert not live.ended.is_set(), "without force nobody is ended"
    view = await asyncio.to_thread(empty, second, force=True)
    assert view["state"] == "drained"
    event = await lab.end(live)
    assert event.event is EventKind.FAILED
    assert f"worker {second} is being stopped" in event.reason
    assert "no other pipeline" in event.reason
    assert reconciles(event)
    assert event.totals is not None
    assert len(frames_of(lab.folder / "forced.mp4")) == event.totals.on_time + event.totals.late, (
        "what was shown is kept"
    )

    nowhere = await lab.begin(PatternSource(), **LIVE)
    assert nowhere.last.event is EventKind.REFUSED, "both are being emptied: nothing may be placed there"
    for worker in (first, second):
        assert (await asyncio.to_thread(empty, worker, undo=True))["state"] == "ready"
    again = await lab.begin(PatternSource(), **LIVE)
    assert again.accepted, again.last.reason
    await lab.stop(again, drain=False)


async def test_a_move_that_fails_leaves_the_stream_where_it_was(pair: Pair) -> None:
    lab = pair.lab
    running = await lab.begin(pair.clip, lab.folder / "stayed.mp4", **SMALL)
    await under_way(running, 4)
    here = await place(lab, running)
    target = next(p for p in (await ask(lab, FleetAsked())).pipelines if p.name != here.name).workers[0]
    child, killed = lab.system.supervisor.children[target], asyncio.Event()

    async def on_assign(received: Received) -> None:
        """The state is being copied: whoever was to take it dies before it has."""
        asked = received.message
        if isinstance(asked, ExportState) and asked.stream == running.stream and not killed.is_set():
            killed.set()
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    subscription = await lab.system.bus.subscribe(subjects.assign("worker"), on_assign)
    stayed = await migrate(lab, running)
    await subscription.unsubscribe()
    assert killed.is_set()
    assert stayed.event is EventKind.WARNING, stayed
    assert f"stays on pipeline {here.name}" in stayed.reason
    assert (await place(lab, running)).name == here.name
    await lab.end(running)
    whole(running)
    assert not running.of(EventKind.MIGRATED)
    assert difference(frames_of(lab.folder / "stayed.mp4"), frames_of(pair.alone)) == 0


async def test_a_pipeline_is_cut_anew_while_it_streams(tmp_path: Path) -> None:
    clip = clips.make_clip(tmp_path / "in.mp4", frames=FRAMES, width=96, height=64, seed=3)
    async with Lab.start(tmp_path, stages=2, env={"RHEOCAST_REBALANCE": "false"}) as lab:
        alone = await lab.run(clip, tmp_path / "alone.mp4", **SMALL)
        whole(alone)
        running = await lab.begin(clip, tmp_path / "cut.mp4", **SMALL)
        beside = await lab.begin(clip, tmp_path / "beside.mp4", **SMALL, steps=3)
        await under_way(running, 3)
        for cuts in ((5,), (1,), (3,)):
            told = await ask(lab, CutPipeline(pipeline="p0", cuts=cuts))
            assert told.error is None, told.error
            assert told.pipelines[0].cuts == cuts
            assert "stood still" in told.pipelines[0].last_move
        wrong = await ask(lab, CutPipeline(pipeline="p0", cuts=(6,)))
        assert wrong.refused is Refused.INVALID
        await lab.end(running)
        await lab.end(beside)
        whole(running)
        whole(beside)
        assert alone.output is not None
        assert running.output is not None
        assert len(running.of(EventKind.REBALANCED)) == 3
        assert difference(frames_of(running.output), frames_of(alone.output)) == 0
        again = await lab.run(clip, tmp_path / "again.mp4", **SMALL, steps=3)
        assert again.output is not None
        assert beside.output is not None
        assert difference(frames_of(beside.output), frames_of(again.output)) == 0


async def test_a_worker_that_is_held_up_is_relieved_and_nobody_has_to_ask(tmp_path: Path) -> None:
    async with Lab.start(tmp_path, stages=2) as lab:
        # A load that keeps the stages busy and does not drown them, and that nobody makes less of.
        load = {"width": 128, "height": 96} if is_slow() else {"width": 320, "height": 192}
        wanted = {**LIVE, "fps": 16, "min_fps": 16, "steps": 4, "min_steps": 4, **load}
        running = await lab.begin(PatternSource(), tmp_path / "relieved.mp4", **wanted)
        await under_way(running, 12)
        early, before = len(running.of(EventKind.REBALANCED)), (await place(lab, running)).cuts
        child = lab.system.supervisor.children["worker-1"]
        assert child.pid is not None
        async with held_up(child.pid, 0.03, 0.02), asyncio.timeout(60):
            while len(running.of(EventKind.REBALANCED)) == early:
                await asyncio.sleep(0.05)
        assert (await place(lab, running)).cuts > before, "the other worker has more blocks now"
        assert "the slowest stage was busy" in running.of(EventKind.REBALANCED)[-1].reason
        shown = running.closed.closed_chunks if running.closed is not None else 0
        await under_way(running, shown + 4)
        await lab.stop(running)
        assert running.last.event is EventKind.STOPPED, running.last.reason
        assert reconciles(running.last)
