"""A transport that loses messages and services that are killed: every frame is closed exactly once, nothing hangs."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
import pytest_asyncio

from shared.contracts.catalog import CHANNELS
from shared.contracts.events import EventKind
from shared.embedded import free_port
from tests.support import clips
from tests.support.lab import Lab, frames_of, reconciles

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

FPS = 16


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    folder = tmp_path_factory.mktemp("faults")
    clips.make_clip(folder / "in.mp4", frames=10 * FPS, width=176, height=112, fps=FPS)
    clips.make_clip(folder / "short.mp4", frames=FPS, width=176, height=112, fps=FPS)
    env = {"RHEOCAST_LOSS_TIMEOUT_S": "3", "RHEOCAST_STALL_S": "8"}
    async with Lab.start(folder, env=env, gateway_port=free_port()) as lab:
        yield lab


async def until_under_way(running: object, frames: int) -> None:
    for _ in range(600):
        closed = getattr(running, "closed", None)
        if closed is not None and closed.totals.closed >= frames:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the stream did not get going")


async def back(lab: Lab, name: str, pid: int) -> None:
    """Until the supervisor has restarted a service and all are ready."""
    for _ in range(400):
        child = lab.system.supervisor.children[name]
        if child.pid not in (None, pid):
            break
        await asyncio.sleep(0.05)
    lab.system._beats.pop(name, None)
    await lab.system.wait_ready()


@pytest.mark.parametrize("service", ["ingest-0", "motion-0", "scheduler-0", "worker-0", "egress-0", "gateway-0"])
async def test_kill_9_in_the_middle_of_a_live_and_a_lossless_run(lab: Lab, service: str) -> None:
    outputs = {mode: lab.folder / f"{service}-{mode}.mp4" for mode in ("live", "lossless")}
    running = {
        mode: await lab.begin(lab.folder / "in.mp4", output, mode=mode, deadline_ms=800)
        for mode, output in outputs.items()
    }
    for one in running.values():
        await until_under_way(one, 20)
    pid = lab.system.supervisor.children[service].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    live, lossless = await asyncio.gather(*(lab.end(one, 60) for one in running.values()))
    await back(lab, service, pid)
    for event in (live, lossless):
        assert reconciles(event), event
        if service == "gateway-0":
            assert event.event is EventKind.STOPPED, "the gateway stands beside the way: streams go on without it"
        if event.event is EventKind.FAILED:
            assert event.reason, "a failure says why"
            assert "\n" not in event.reason
    if service in ("worker-0", "egress-0"):
        assert live.event is EventKind.STOPPED, f"a live stream goes on when {service} is back: {live.reason}"
    if lossless.event is EventKind.STOPPED:
        assert lossless.totals is not None
        assert lossless.totals.dropped_total == 0, "a lossless run that lost a frame must not end as if it had not"
        assert len(frames_of(outputs["lossless"])) == 10 * FPS
    assert all(len(frames_of(output)) > 0 for output in outputs.values()), "what was done is playable"
    again = await lab.run(lab.folder / "short.mp4", None, mode="lossless")
    assert again.last.event is EventKind.STOPPED, (
        f"after {service} came back, the next stream runs: {again.last.reason}"
    )


async def test_rubbish_on_every_subject_harms_nobody(lab: Lab) -> None:
    running = await lab.begin(lab.folder / "in.mp4", lab.folder / "rubbish.mp4", mode="live", deadline_ms=5000)
    connection = await nats.connect(lab.system.nats_url)
    for _ in range(3):
        for channel in CHANNELS:
            subject = channel.subject.replace("rheo.stream.*", f"rheo.stream.{running.stream}").replace("*", "p0")
            for rubbish in (b"", b"\xc1", b"not msgpack", secrets.token_bytes(64), b"\x81\xa4kind\xa5chunk"):
                await connection.publish(subject, rubbish)
        await asyncio.sleep(0.2)
    await connection.drain()
    event = await lab.end(running)
    assert event.event is EventKind.STOPPED, event.reason
    assert reconciles(event)
    assert event.totals is not None
    assert event.totals.on_time == event.totals.frames_in == 10 * FPS


async def test_two_commands_at_once_a_repeated_id_and_a_missing_file(lab: Lab) -> None:
    missing = await lab.begin(lab.folder / "nothing.mp4")
    assert missing.last.event is EventKind.REFUSED
    assert "nothing.mp4" in missing.last.reason
    outside = await lab.begin(Path("/etc/hostname"))
    assert outside.last.event is EventKind.REFUSED, "a path outside the allowed folders"


async def test_a_lossy_transport(tmp_path: Path) -> None:
    clips.make_clip(tmp_path / "in.mp4", frames=12 * FPS, width=176, height=112, fps=FPS)
    env = {
        "RHEOCAST_BUS_FAULTS": "drop=0.01,duplicate=0.01,delay=0.01,seed=3",
        "RHEOCAST_BATCH_TIMEOUT_S": "1.5",
        "RHEOCAST_LOSSLESS_BATCH_TIMEOUT_S": "5",
        "RHEOCAST_LOSS_TIMEOUT_S": "3",
        "RHEOCAST_STALL_S": "8",
    }
    async with Lab.start(tmp_path, env=env) as lab:
        runs = (lab.run(tmp_path / "in.mp4", tmp_path / f"{mode}.mp4", mode=mode) for mode in ("live", "lossless"))
        live, lossless = (running.last for running in await asyncio.gather(*runs))
    for event in (live, lossless):
        assert reconciles(event), event
    assert live.event is EventKind.STOPPED, live.reason
    assert live.totals is not None
    assert live.totals.frames_in == 12 * FPS
    assert live.stats is not None
    assert live.stats.frames_out == len(frames_of(tmp_path / "live.mp4"))
    if lossless.event is EventKind.FAILED:
        assert lossless.reason
    else:
        assert len(frames_of(tmp_path / "lossless.mp4")) == 12 * FPS, "luck: nothing that mattered was lost"
