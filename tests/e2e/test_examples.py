"""Every example as a person runs it, against one running system, and the client itself where they do not reach."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.client import Api, Broker, ClientError, InvalidError, NotFoundError, UnreachableError
from shared.contracts.commands import StreamSpec
from shared.contracts.events import EventKind
from shared.contracts.sinks import NatsSink
from shared.contracts.sources import PatternSource, PushSource
from shared.embedded import free_port
from shared.media.jpeg import decode_jpeg
from tests.e2e.conftest import Rheocast, processes_of
from tests.support.clips import make_clip
from tests.support.lab import frames_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 96, 64
SIZE = f"{WIDTH}x{HEIGHT}"
PATIENT = ("--deadline-ms", "4000")  # the machine may be busy


@dataclass
class Site:
    """A running system, and a way to run examples against it."""

    url: str
    nats: str
    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def begin(self, name: str, *arguments: str | Path, nats: bool = True) -> subprocess.Popen[str]:
        """Start an example."""
        command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *map(str, arguments), "--api", self.url]
        command += ["--nats", self.nats] if nats else []
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=self.folder, env=env, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_ctrl_c
        )
        self.started.append(process)
        return process

    def run(self, name: str, *arguments: str | Path, nats: bool = True) -> dict[str, Any]:
        """Run one to its end; its last line."""
        return last_line(self.begin(name, *arguments, nats=nats))


def hear_ctrl_c() -> None:
    """As from a terminal: what a shell starts in the background ignores it, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def last_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "media").mkdir()
    port = free_port()
    rheocast = Rheocast(folder)
    process = rheocast.start("up", "--port", str(port), "--media", folder / "media")
    assert process.stdout is not None
    assert "Rheocast is up" in (line := process.stdout.readline()), line
    told = re.search(r"nats://\S+", process.stdout.readline())
    assert told is not None, "it says where frames are pushed to"
    made = Site(f"http://127.0.0.1:{port}", told[0], folder)
    yield made
    for each in made.started:
        if each.poll() is None:
            each.kill()
            each.communicate()
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert processes_of(rheocast.run_id) == []


@pytest.fixture(scope="module")
def published(site: Site) -> Iterator[str]:
    """A stream that the publisher feeds from a file while the others look at it."""
    clip = site.folder / "clip.mp4"
    make_clip(clip, width=WIDTH, height=HEIGHT, frames=16, fps=8)
    arguments = ("--file", clip, "--size", SIZE, "--fps", "8", "--seconds", "8", *PATIENT, "--stream", "pushed")
    process = site.begin("publisher", *arguments)
    assert first_line(process) == "pushed"
    yield "pushed"
    done = last_line(process)
    assert done["state"] == "stopped"
    ledger = done["ledger"]
    shown = ledger["on_time"] + ledger["late"]
    assert shown > 8
    assert shown + ledger["skipped"] + sum(ledger["dropped"].values()) == ledger["frames_in"] <= 64


def test_what_was_pushed_comes_back_restyled(site: Site, published: str) -> None:
    done = site.run("subscriber", published, "--frames", "6", "--out", "frames")
    assert done["frames"] == 6
    assert done["latency_ms"] > 0
    files = sorted((site.folder / "frames").glob("*.jpg"))
    assert len(files) == 6
    source = frames_of(site.folder / "clip.mp4").astype(int)
    colour = np.ptp(source, axis=-1).mean()
    for path in files:
        picture = decode_jpeg(path.read_bytes()).to_ndarray(format="rgb24").astype(int)
        assert picture.shape == (HEIGHT, WIDTH, 3)
        assert np.ptp(picture, axis=-1).mean() < colour / 4, "a pencil drawing has no colours"
        assert np.abs(source - picture).mean(axis=(1, 2, 3)).min() > 20, "it is none of the source's pictures"


def test_a_recording_of_a_running_stream_plays(site: Site, published: str) -> None:
    done = site.run("recorder", published, "--seconds", "1.2", "--out", "recording.mp4", nats=False)
    path = site.folder / "recording.mp4"
    assert done["bytes"] == path.stat().st_size > 0
    frames = frames_of(path)
    assert frames.shape[0] >= 3
    assert frames.shape[1:] == (HEIGHT, WIDTH, 3)


async def test_a_forbidden_prompt_ends_its_stream_or_is_replaced(site: Site) -> None:
    spec = StreamSpec(source=PatternSource(), prompt="a violent scene", width=WIDTH, height=HEIGHT, fps=4, steps=1)
    spec = spec.model_copy(update={"deadline_ms": 4000})
    async with Api(site.url) as api:
        stopper = site.begin("moderation", "--forbid", "VIOLENT", "--actions", "1")
        assert json.loads(first_line(stopper)) == {"watching": ["VIOLENT"]}
        innocent = await api.start(spec.model_copy(update={"prompt": "neon lights"}), "innocent")
        guilty = await api.start(spec, "guilty")
        assert last_line(stopper) == {"stream": "guilty", "prompt": spec.prompt, "rule": "VIOLENT", "did": "stop"}
        assert (await api.ended(guilty.id)).state == "stopped"
        changer = site.begin("moderation", "--forbid", "violent", "--instead", "no style", "--actions", "1")
        first_line(changer)
        await api.patch(innocent.id, prompt="now violent, too")
        assert last_line(changer)["did"] == "prompt"
        view = await api.stream(innocent.id)
        assert (view.prompt, view.state in ("live", "degraded")) == ("no style", True)
        await api.stop(innocent.id, drain=False)


async def test_subscribers_coexist_and_leave_nothing_behind_when_interrupted(site: Site) -> None:
    spec = StreamSpec(source=PatternSource(), prompt="ink", width=WIDTH, height=HEIGHT, fps=4, steps=1)
    async with Api(site.url) as api:
        watched = (await api.start(spec.model_copy(update={"deadline_ms": 4000}), "watched")).id
        folders = (site.folder / "one", site.folder / "two")
        watching = [site.begin("subscriber", watched, "--out", folder) for folder in folders]
        await taking(api, watched, 2)
        for left, process, folder in zip((1, 0), watching, folders, strict=True):
            seen = len(list(folder.glob("*.jpg")))  # the other one's end is not this one's
            async with asyncio.timeout(30):
                while len(list(folder.glob("*.jpg"))) <= seen:
                    await asyncio.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, err = await asyncio.to_thread(process.communicate, timeout=30)
            assert (process.returncode, err) == (130, "")
            await taking(api, watched, left)
        await api.stop(watched, drain=False)


async def taking(api: Api, stream: str, count: int) -> None:
    """Wait until so many subscribers have a sink."""
    async with asyncio.timeout(30):
        while sum(sink.sink_kind == "nats" for sink in (await api.stats(stream)).sinks) != count:
            await asyncio.sleep(0.1)


def test_a_load_is_told_with_its_figures(site: Site) -> None:
    arguments = ("--streams", "2", "--every", "0.3", "--seconds", "2", "--fps", "4", "--size", SIZE, *PATIENT)
    done = site.run("load_generator", *arguments, nats=False)
    assert (done["streams"], done["served"] + done["refused"], done["balanced"]) == (2, 2, True)
    assert done["served"] >= 1
    assert 0 < done["cpr_worst"] <= done["cpr_mean"] <= 1
    assert 0 < done["latency_p50_ms"] <= done["latency_p95_worst_ms"]


async def test_the_client_says_what_is_wrong(site: Site) -> None:
    async with Api(site.url) as api, Broker.connect(site.nats) as broker:
        with pytest.raises(NotFoundError, match="there is no stream nobody") as unknown:
            await api.stream("nobody")
        assert unknown.value.status == 404
        with pytest.raises(NotFoundError):  # not another page
            await api.stream("../../healthz")
        missing = StreamSpec.model_construct(source=PushSource(), sinks=(NatsSink(),), prompt="neon", steps=9)
        with pytest.raises(InvalidError, match="steps"):
            await api.start(missing)
        with pytest.raises(ClientError, match="at most 900000"):
            await broker.push("x", bytes(1_000_000))
    async with Api(f"http://127.0.0.1:{free_port()}") as nobody:
        with pytest.raises(UnreachableError, match="start `rheocast up`"):
            await nobody.stream("x")
        with pytest.raises(UnreachableError):
            await anext(nobody.events("x"))
    with pytest.raises(UnreachableError, match="no NATS server at 127"):
        async with Broker.connect(f"nats://user:secret@127.0.0.1:{free_port()}", timeout_s=0.5):
            pass


async def test_the_client_starts_pushes_follows_and_changes(site: Site) -> None:
    spec = StreamSpec(source=PushSource(), sinks=(NatsSink(format="rgb24"),), prompt="ink", width=WIDTH, height=HEIGHT)
    spec = spec.model_copy(update={"fps": 8.0, "steps": 1, "deadline_ms": 4000})
    async with Api(site.url) as api, Broker.connect(site.nats) as broker:
        view = await api.start(spec, key="once")
        assert (await api.start(spec, key="once")).id == view.id, "the same key starts nothing anew"
        assert view.id in [each.id async for each in api.streams("live")]
        assert (await api.capacity(width=WIDTH, height=HEIGHT, fps=8)).streams >= 1
        black = bytes(WIDTH * HEIGHT * 3)
        async with broker.frames(view.id) as frames:
            receipt = await api.patch(view.id, seed=3)
            until = time.monotonic() + 30
            while not frames.came and time.monotonic() < until:
                await broker.push(view.id, black, format="rgb24", width=WIDTH, height=HEIGHT)
                await api.stats(view.id)
            frame = await anext(frames)
        assert (len(frame.data), frame.width, frame.height) == (len(black), WIDTH, HEIGHT)
        assert (await api.applied(receipt)).chunk >= 0
        await broker.end(view.id)
        kinds = [told.event.event async for told in api.events(view.id)]
        assert {EventKind.ACCEPTED, EventKind.APPLIED} < set(kinds)
        assert kinds[-1] is EventKind.STOPPED
        assert [told async for told in api.events(view.id, after=f"{time.time_ns()}-x")] == [], "all was told"
        ended = await api.ended(view.id)
        assert ended.ledger.closed == ended.ledger.frames_in > 0
