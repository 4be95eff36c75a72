"""What the command line decides before it starts anything, and how it supervises."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from services.cli import demo_clip
from services.cli.errors import CommandError, ExitCode
from services.cli.interrupts import HeldInterrupt
from services.cli.supervisor import MAX_RESTARTS, Child, ChildState, Death, Supervisor, refuse_if_given_up
from services.cli.topology import ProcessSpec, Topology, processes, worker_threads
from services.cli.validate import default_size, parse_size
from shared.engine.plan.registry import model_spec
from shared.media.probe import probe
from tests.support import clips


def topology(stages: int) -> Topology:
    return Topology(model="rheo-tiny", stages=stages, read_roots=(Path("/in"),), write_roots=(Path("/out"),))


@pytest.mark.parametrize(("text", "size"), [("320x192", (320, 192)), ("96X64", (96, 64)), (None, None)])
def test_sizes_that_will_do(text: str | None, size: tuple[int, int] | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0x-3", "333x187", "320", "axb", "99999x16", ""])
def test_a_size_that_will_not_do_is_refused_with_one_that_would(text: str) -> None:
    with pytest.raises(CommandError, match="--size") as error:
        parse_size(text)
    assert error.value.code is ExitCode.REFUSED
    assert "e.g. --size " in error.value.line
    parse_size(error.value.line.rsplit("e.g. --size ", 1)[1])


def test_the_default_size_stands_upright_for_a_portrait(tmp_path: Path) -> None:
    model = model_spec("rheo-tiny")
    wide = probe(clips.make_clip(tmp_path / "wide.mp4", width=96, height=64, frames=3))
    tall = probe(clips.make_rotated_clip(tmp_path / "tall.mp4", frames=3))
    assert default_size(wide, model) == (model.default_width, model.default_height)
    assert default_size(tall, model) == (model.default_height, model.default_width)


@pytest.mark.parametrize(("stages", "cores", "threads"), [(1, 2, 2), (2, 2, 1), (4, 2, 1), (2, 16, 8)])
def test_threads_never_exceed_the_cores(stages: int, cores: int, threads: int) -> None:
    assert worker_threads(stages, cores) == threads


def test_encode_sits_with_the_first_stage_and_decode_with_the_last() -> None:
    one = {spec.name: spec.env for spec in processes(topology(1))}
    assert set(one["worker-0"]["RHEOCAST_ROLES"].split(",")) == {"text", "encode", "stage", "decode"}
    three = [spec.env for spec in processes(topology(3)) if spec.module == "services.worker"]
    assert [set(env["RHEOCAST_ROLES"].split(",")) for env in three] == [
        {"stage", "text", "encode"},
        {"stage"},
        {"stage", "decode"},
    ]
    assert [env["RHEOCAST_STAGE"] for env in three] == ["0", "1", "2"]
    assert one["ingest-0"]["RHEOCAST_FILE_ROOTS"] == "/in"
    assert one["egress-0"]["RHEOCAST_FILE_ROOTS"] == "/out"


def test_illegal_moves_of_a_child_are_named() -> None:
    child = Child(ProcessSpec("x", "y"), Path("x.log"))
    child.move(ChildState.RUNNING)
    with pytest.raises(RuntimeError, match="running → starting"):
        child.move(ChildState.STARTING)


async def test_a_killed_child_is_restarted_and_stop_leaves_none(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time\nprint('hello', flush=True)\ntime.sleep(60)\n")
    deaths: list[Death] = []
    env = {"PYTHONPATH": str(tmp_path)}
    supervisor = Supervisor([ProcessSpec("a", "sleeper")], env, tmp_path / "logs", deaths.append)
    await supervisor.start()
    first = supervisor.children["a"].pid
    assert first is not None
    for _ in range(100):
        if supervisor.last_line("a") == "hello":
            break
        await asyncio.sleep(0.05)
    os.kill(first, signal.SIGKILL)
    for _ in range(100):
        if supervisor.children["a"].pid not in (None, first):
            break
        await asyncio.sleep(0.05)
    second = supervisor.children["a"].pid
    assert second not in (None, first)
    assert deaths == [Death("a", -signal.SIGKILL, "hello", restarted=True)]
    await supervisor.stop(5)
    assert supervisor.children["a"].pid is None
    await supervisor.stop(5)


async def test_a_child_that_keeps_ending_is_given_up_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.cli.supervisor.BACKOFF_S", (0.0,))
    (tmp_path / "broken.py").write_text("import sys\nsys.exit('the port is taken')\n")
    supervisor = Supervisor([ProcessSpec("b", "broken")], {"PYTHONPATH": str(tmp_path)}, tmp_path / "logs")
    await supervisor.start()
    for _ in range(400):
        if supervisor.failed():
            break
        await asyncio.sleep(0.05)
    assert supervisor.failed() == ["b"]
    assert len(supervisor.children["b"].deaths) == MAX_RESTARTS + 1
    with pytest.raises(CommandError, match="the port is taken"):
        refuse_if_given_up(supervisor)
    await supervisor.stop(5)


def test_the_demo_clip_moves_and_is_what_it_says(tmp_path: Path) -> None:
    demo_clip.write(tmp_path / "demo.mp4", 0.5)
    info = probe(tmp_path / "demo.mp4")
    assert (info.width, info.height, info.frames) == (demo_clip.WIDTH, demo_clip.HEIGHT, 8)
    assert np.abs(demo_clip.frame(0, 1.0).astype(int) - demo_clip.frame(8, 1.0)).mean() > 1


def test_ctrl_c_at_a_bad_moment_is_noted_and_not_lost() -> None:
    former = signal.getsignal(signal.SIGINT)
    with HeldInterrupt() as held:
        assert not held.noted
        os.kill(os.getpid(), signal.SIGINT)
        assert held.noted
    assert signal.getsignal(signal.SIGINT) is former
