"""Blocks change hands and streams change pipelines while they run: their pixels are those of an undisturbed run."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Any

import pytest

from shared.contracts import subjects
from shared.contracts.commands import Mode, PatternSource
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.operating import (
    CutPipeline,
    DrainWorker,
    FleetAsked,
    FleetTold,
    MigrateStream,
    Refused,
    WorkerState,
)
from shared.contracts.tiers import Refusal
from tests.support import clips
from tests.support.lab import Lab, Running, difference, frames_of, reconciles

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
FRAMES = 85
SMALL = {"width": 96, "height": 64, "seed": 5}


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


async def test_a_stream_goes_to_another_pipeline_and_a_worker_is_emptied(tmp_path: Path) -> None:
    clip = clips.make_clip(tmp_path / "in.mp4", frames=FRAMES, width=96, height=64, seed=3)
    async with Lab.start(tmp_path, pipelines=2) as lab:
        told = await ask(lab, FleetAsked())
        assert [pipeline.name for pipeline in told.pipelines] == ["p0", "p1"]
        assert {worker.state for worker in told.workers} == {WorkerState.READY}
        alone = await lab.run(clip, tmp_path / "alone.mp4", **SMALL)
        whole(alone)

        running = await lab.begin(clip, tmp_path / "moved.mp4", **SMALL)
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
        assert alone.output is not None
        assert running.output is not None
        assert difference(frames_of(running.output), frames_of(alone.output)) == 0

        # A prompt that comes after a move reaches the workers that have the stream now.
        live = await lab.begin(PatternSource(), mode=Mode.LIVE, fps=8, width=96, height=64, deadline_ms=4000)
        await under_way(live, 2)
        here = next(p for p in (await ask(lab, FleetAsked())).pipelines if live.stream in p.streams)
        worker = here.workers[0]
        told = await ask(lab, DrainWorker(worker=worker))
        assert told.error is None
        async with asyncio.timeout(40):
            while (await ask(lab, FleetAsked(worker=worker))).workers[0].state is not WorkerState.DRAINED:
                await asyncio.sleep(0.1)
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


async def test_a_pipeline_is_cut_anew_while_it_streams(tmp_path: Path) -> None:
    clip = clips.make_clip(tmp_path / "in.mp4", frames=FRAMES, width=96, height=64, seed=3)
    async with Lab.start(tmp_path, stages=2) as lab:
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
