"""The watching of a child goes on, whatever happens to who is told of its deaths or to its new process."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from services.cli.errors import CommandError
from services.cli.supervisor import MAX_RESTARTS, Child, ChildState, Death, Supervisor, refuse_if_given_up
from services.cli.topology import ProcessSpec
from shared.lifecycle import ExitCode as ServiceExit


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.cli.supervisor.BACKOFF_S", (0.0,))


async def given_up(supervisor: Supervisor) -> None:
    async with asyncio.timeout(20):
        while not supervisor.failed():
            await asyncio.sleep(0.02)


async def running_again(child: Child, first: int | None) -> None:
    async with asyncio.timeout(20):
        while child.pid in (None, first):
            await asyncio.sleep(0.02)


def sleeper(folder: Path, deaths: list[Death]) -> Supervisor:
    (folder / "sleeper.py").write_text("import time\ntime.sleep(60)\n")
    return Supervisor([ProcessSpec("a", "sleeper")], {"PYTHONPATH": str(folder)}, folder / "logs", deaths.append)


async def test_a_terminal_that_is_gone_keeps_nobody_from_being_restarted(tmp_path: Path) -> None:
    def gone(_: Death) -> None:
        raise BrokenPipeError

    supervisor = sleeper(tmp_path, [])
    supervisor._on_death = gone
    await supervisor.start()
    child = supervisor.children["a"]
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await running_again(child, first)
    await supervisor.stop(5)


async def test_a_start_that_fails_is_a_death_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[Death] = []
    supervisor = sleeper(tmp_path, deaths)
    await supervisor.start()
    child, spawn = supervisor.children["a"], supervisor._spawn
    first, left = child.pid, 2
    assert first is not None

    async def spawn_later(child: Child) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        await spawn(child)

    monkeypatch.setattr(supervisor, "_spawn", spawn_later)
    os.kill(first, signal.SIGKILL)
    await running_again(child, first)
    assert [death.code for death in deaths] == [-signal.SIGKILL, None, None]
    assert (
        f"{deaths[1].what} ({deaths[1].line})" == "a could not be started ([Errno 11] Resource temporarily unavailable)"
    )
    assert len(child.deaths) == 3
    assert child.state is ChildState.RUNNING
    assert supervisor.last_line("a") == "it left no log"
    await supervisor.stop(5)


async def test_a_child_that_can_never_be_started_again_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaths: list[Death] = []
    supervisor = sleeper(tmp_path, deaths)
    await supervisor.start()
    first = supervisor.children["a"].pid
    assert first is not None

    async def never(_: Child) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(supervisor, "_spawn", never)
    os.kill(first, signal.SIGKILL)
    await given_up(supervisor)
    assert [death.restarted for death in deaths] == [True] * MAX_RESTARTS + [False]
    with pytest.raises(CommandError, match="Too many open files"):
        refuse_if_given_up(supervisor)
    await supervisor.stop(5)


async def test_bad_settings_are_not_said_to_be_restarted(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        f"import sys\nprint('no', flush=True)\nsys.exit({int(ServiceExit.BAD_SETTINGS)})\n"
    )
    deaths: list[Death] = []
    env = {"PYTHONPATH": str(tmp_path)}
    supervisor = Supervisor([ProcessSpec("b", "wrong")], env, tmp_path / "logs", deaths.append)
    await supervisor.start()
    await given_up(supervisor)
    assert deaths == [Death("b", int(ServiceExit.BAD_SETTINGS), "no", restarted=False)]
    assert deaths[0].next == "it is not restarted"
    await supervisor.stop(5)
