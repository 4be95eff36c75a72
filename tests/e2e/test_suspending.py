"""A stream that stays paused goes to host memory, keeps its promise, and comes back with the pixels it would have had."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.beats import Beat
from shared.contracts.events import EventKind
from shared.contracts.tiers import Refusal
from tests.support import clips
from tests.support.lab import Lab, frames_of, reconciles

pytestmark = pytest.mark.e2e


async def test_a_paused_stream_is_set_aside_and_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    env = {"RHEOCAST_SUSPEND_AFTER_S": "0.5", "RHEOCAST_MAX_STREAMS": "1"}
    async with Lab.start(tmp_path, env=env) as lab:
        source = clips.make_clip(lab.folder / "a.mp4", frames=81, width=176, height=112, seed=1)
        alone = await lab.run(source, lab.folder / "alone.mp4", seed=5)
        assert alone.last.event is EventKind.STOPPED, alone.last
        aside: dict[str, int] = {}

        async def on_beat(received: Received) -> None:
            beat: Beat = received.message
            if beat.service == "worker":
                aside.clear()
                aside.update(beat.suspended)

        await lab.system.bus.subscribe(subjects.beat("*"), on_beat)
        paused = await lab.begin(source, lab.folder / "paused.mp4", seed=5)
        async with asyncio.timeout(15):  # the first one's seat is free once its workers have let go
            while not paused.accepted:
                await asyncio.sleep(0.3)
                paused = await lab.begin(source, lab.folder / "paused.mp4", seed=5)
        assert paused.accepted, paused.last
        await lab.update(paused, paused=True)
        async with asyncio.timeout(30):
            while not aside.get(paused.stream):
                await asyncio.sleep(0.05)
        other = await lab.run(source, lab.folder / "other.mp4", seed=6)
        assert other.last.event is EventKind.REFUSED, "what is promised to a paused stream is given to nobody else"
        assert other.last.refusal is Refusal.CAPACITY
        await lab.update(paused, paused=False)
        last = await lab.end(paused)
        assert last.event is EventKind.STOPPED, last
        assert reconciles(last)
        async with asyncio.timeout(10):  # beats weigh memory once a second
            while aside.get(paused.stream):
                await asyncio.sleep(0.05)
        assert np.array_equal(frames_of(lab.folder / "paused.mp4"), frames_of(lab.folder / "alone.mp4"))
