"""A worker that has too much to do, stands still or dies: live streams lose some quality or a moment, never their place.

Every frame has one verdict.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from shared.contracts import subjects
from shared.contracts.commands import PatternSource
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.tiers import CapacityAsked, CapacityTold
from tests.support.lab import Lab, Running, reconciles

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    async with Lab.start(tmp_path_factory.mktemp("recovery")) as lab:
        yield lab


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_left(lab: Lab) -> AsyncIterator[None]:
    yield
    await lab.stop_all()


async def begin(lab: Lab) -> Running:
    """A live stream that has shown 24 frames."""
    running = await lab.begin(PatternSource(), mode="live", fps=8, deadline_ms=1500)
    await more(running, 24)
    return running


async def more(running: Running, frames: int) -> None:
    """Until so many frames more were shown."""

    def shown() -> int:
        totals = running.closed.totals if running.closed is not None else None
        return totals.on_time + totals.late if totals is not None else 0

    wanted = shown() + frames
    for _ in range(600):
        if shown() >= wanted:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{shown()} frames were shown, not {wanted}: {running.events}")


async def told_of(running: Running, kind: EventKind) -> StreamEvent:
    for _ in range(600):
        for event in running.events:
            if event.event is kind:
                return event
        await asyncio.sleep(0.05)
    raise AssertionError(f"{kind} was never told: {running.events}")


def worker_pid(lab: Lab) -> int:
    pid = lab.system.supervisor.children["worker-0"].pid
    assert pid is not None
    return pid


async def test_too_much_to_do_takes_steps_from_a_stream_and_its_viewer_is_told(lab: Lab) -> None:
    size = {"width": 320, "height": 192}
    asked = CapacityAsked(**size, fps=16, steps=4, deadline_ms=5000)
    told: CapacityTold = await lab.system.bus.request(subjects.CAPACITY, asked, 10.0)
    # With four steps much more than this machine can do, with one (about a third of the work) well within it.
    fps = min(240.0, round(16 * 1.8 / told.tiers[0].load, 1))
    live = await lab.begin(PatternSource(), mode="live", fps=fps, min_fps=fps, steps=1, deadline_ms=5000, **size)
    assert live.accepted, live.last.reason
    await more(live, 8)
    wished = await lab.update(live, steps=4)
    assert wished.event is EventKind.APPLIED, "a wish is not refused: the ladder makes room"
    changed = await told_of(live, EventKind.TIER_CHANGED)
    assert "too much to do" in changed.reason
    assert changed.tier is not None
    assert changed.tier.steps < 4
    assert (changed.tier.width, changed.tier.height, changed.tier.fps) == (320, 192, fps)
    assert changed.chunk >= wished.chunk, "while its first chunk with four steps waits, it is bound anew"
    blocks = {
        item["chunks"][0]: item["steps"]
        for batch in lab.batches()
        for item in batch["items"]
        if item["stream"] == live.stream and item["step"] == 0
    }
    assert blocks[changed.chunk] == changed.tier.steps, "it is in force from the chunk that was told"
    await more(live, 8)
    event = await lab.stop(live, drain=False)
    assert event.event is EventKind.STOPPED, event.reason
    assert reconciles(event), event


async def test_a_worker_stopped_for_a_second_is_no_fault(lab: Lab) -> None:
    running = await begin(lab)
    pid = worker_pid(lab)
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(1.0)
    os.kill(pid, signal.SIGCONT)
    await more(running, 16)
    skipping = await lab.update(running, skip_similar=0.05)
    assert skipping.event is EventKind.APPLIED, skipping.reason
    event = await lab.stop(running)
    assert event.event is EventKind.STOPPED, event.reason
    assert reconciles(event), event
    assert worker_pid(lab) == pid
    assert not [e for e in running.events if e.event in (EventKind.RECOVERING, EventKind.WARNING)], running.events


async def test_a_worker_stopped_for_longer_is_fenced_and_comes_back_empty(lab: Lab) -> None:
    running = await begin(lab)
    lossless = await lab.begin(PatternSource(), mode="lossless", fps=8)
    pid = worker_pid(lab)
    os.kill(pid, signal.SIGSTOP)
    recovering = await told_of(running, EventKind.RECOVERING)
    assert "worker-0" in recovering.reason
    failed = await lab.end(lossless)
    assert failed.event is EventKind.FAILED, "what a lossless stream had there, nobody has any more"
    assert reconciles(failed), failed
    refused = await lab.update(running, steps=1)
    assert refused.event is EventKind.REFUSED
    assert refused.retry_after_s > 0
    await asyncio.sleep(1.5)
    os.kill(pid, signal.SIGCONT)
    resumed = await told_of(running, EventKind.RESUMED)
    assert resumed.epoch > recovering.epoch or resumed.epoch == 0
    assert worker_pid(lab) == pid, "it came back by itself, as the same process"
    await more(running, 16)
    applied = await lab.update(running, steps=1)
    assert applied.event is EventKind.APPLIED, "a stream that came back is a stream like any other"
    event = await lab.stop(running)
    assert event.event is EventKind.STOPPED, event.reason
    assert reconciles(event), event
    assert event.totals is not None
    assert event.totals.dropped.get("ingest:recovering"), event.totals
    reasons = set(event.totals.dropped)
    assert reasons <= {
        "ingest:recovering",
        "ingest:no_credit",
        "ingest:rate",  # the ladder may have lowered its rate
        "scheduler:recovering",
        "scheduler:stale",
        "worker:stale",
        "egress:lost",
    }, reasons


async def test_a_worker_that_was_killed_costs_a_live_stream_one_gap(lab: Lab) -> None:
    running = await begin(lab)
    pid = worker_pid(lab)
    os.kill(pid, signal.SIGKILL)
    await told_of(running, EventKind.RESUMED)
    assert worker_pid(lab) != pid
    await more(running, 16)
    os.kill(worker_pid(lab), signal.SIGKILL)
    await asyncio.sleep(0.5)
    event = await lab.stop(running)
    assert event.event is EventKind.STOPPED, "a stream may be stopped while it recovers"
    assert reconciles(event), event
