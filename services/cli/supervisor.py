"""Starts service processes, watches them, restarts what dies, and stops everything.

Each child runs in its own session (a Ctrl-C in the terminal reaches only the command line, which then stops the rest in
order), logs to a file under the run directory, and ends by itself if this process disappears (``RHEOCAST_PARENT_PID``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from services.cli.errors import CommandError, ExitCode
from services.cli.topology import ProcessSpec
from shared.lifecycle import ExitCode as ServiceExit

MAX_RESTARTS = 5
RESTART_WINDOW_S = 60.0
BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 4.0)


class ChildState(StrEnum):
    """A child's life."""

    STARTING = "starting"
    RUNNING = "running"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    EXITED = "exited"
    GIVEN_UP = "given_up"


_MOVES: Mapping[ChildState, frozenset[ChildState]] = {
    ChildState.STARTING: frozenset(
        {ChildState.RUNNING, ChildState.BACKOFF, ChildState.STOPPING, ChildState.EXITED, ChildState.GIVEN_UP}
    ),
    ChildState.RUNNING: frozenset({ChildState.BACKOFF, ChildState.STOPPING, ChildState.EXITED, ChildState.GIVEN_UP}),
    ChildState.BACKOFF: frozenset({ChildState.STARTING, ChildState.STOPPING, ChildState.EXITED}),
    ChildState.STOPPING: frozenset({ChildState.EXITED}),
    ChildState.EXITED: frozenset(),
    ChildState.GIVEN_UP: frozenset({ChildState.STOPPING, ChildState.EXITED}),
}


@dataclass(slots=True)
class Child:
    """One supervised process."""

    spec: ProcessSpec
    log_path: Path
    state: ChildState = ChildState.STARTING
    process: asyncio.subprocess.Process | None = None
    deaths: list[float] = field(default_factory=list)
    not_started: str = ""  # why the last try to start it failed

    def move(self, to: ChildState) -> None:
        """Change state; an illegal move is a defect of the supervisor."""
        if to not in _MOVES[self.state]:
            raise RuntimeError(f"{self.spec.name}: illegal move {self.state} → {to}")
        self.state = to

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self.process.pid if self.process is not None and self.process.returncode is None else None


@dataclass(frozen=True, slots=True)
class Death:
    """An unexpected end. ``code`` None: it could not be started again, and ``line`` says why; else ``line`` is its log's
    last one."""

    name: str
    code: int | None
    line: str
    restarted: bool

    @property
    def what(self) -> str:
        """What happened."""
        return f"{self.name} could not be started" if self.code is None else f"{self.name} ended with {self.code}"

    @property
    def next(self) -> str:
        """What the supervisor does about it."""
        return "restarting it" if self.restarted else "it is not restarted"


class Supervisor:
    """Owns the children. ``on_death`` is told of every unexpected end."""

    def __init__(
        self,
        specs: list[ProcessSpec],
        env: Mapping[str, str],
        log_dir: Path,
        on_death: Callable[[Death], None] | None = None,
    ) -> None:
        self._env = {**os.environ, **env, "RHEOCAST_PARENT_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        self.children = {spec.name: Child(spec, log_dir / f"{spec.name}.log") for spec in specs}
        self._log_dir = log_dir
        self._on_death = on_death
        self._watchers: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def start(self) -> None:
        """Start every child; they become ready on their own time."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for child in self.children.values():
            await self._spawn(child)
            watcher = asyncio.create_task(self._watch(child), name=f"watch {child.spec.name}")
            self._watchers.add(watcher)

    def failed(self) -> list[str]:
        """Children that were given up."""
        return [name for name, child in self.children.items() if child.state is ChildState.GIVEN_UP]

    def last_line(self, name: str) -> str:
        """The newest line of a child's log, or why it could not be started, for an error message."""
        if self.children[name].not_started:
            return self.children[name].not_started
        with contextlib.suppress(OSError):
            lines = self.children[name].log_path.read_text(errors="replace").strip().splitlines()
            if lines:
                return lines[-1][:300]
        return "it left no log"

    async def stop(self, deadline_s: float = 10.0) -> None:
        """SIGTERM to all, then SIGKILL to what is left at the deadline. Idempotent; always reaches the end."""
        self._stopping = True
        for watcher in self._watchers:  # first, so that none starts a child again while the others are being ended
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers.clear()
        waiting: list[Child] = []
        for child in self.children.values():
            if child.process is None or child.process.returncode is not None:
                continue
            if child.state is not ChildState.STOPPING:
                child.move(ChildState.STOPPING)
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGTERM)
                child.process.send_signal(signal.SIGCONT)
            waiting.append(child)
        until = time.monotonic() + deadline_s
        for child in waiting:
            if child.process is None:
                continue
            try:
                await asyncio.wait_for(child.process.wait(), max(0.05, until - time.monotonic()))
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    child.process.kill()
                await child.process.wait()
            child.move(ChildState.EXITED)

    async def _spawn(self, child: Child) -> None:
        with child.log_path.open("ab") as log:
            child.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                child.spec.module,
                env={"RHEOCAST_LOG_JSON": "false", **self._env, **child.spec.env},  # a person reads these files
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        child.move(ChildState.RUNNING)

    async def _spawn_again(self, child: Child) -> None:
        """Like ``_spawn``; a machine that has no process or file to give just then is one more death of the child."""
        child.move(ChildState.STARTING)
        try:
            await self._spawn(child)
            child.not_started = ""
        except OSError as error:
            child.not_started = " ".join(str(error).split()) or type(error).__name__

    async def _watch(self, child: Child) -> None:
        while child.process is not None:
            code = await child.process.wait() if not child.not_started else None
            now = time.monotonic()
            child.deaths = [at for at in child.deaths if now - at < RESTART_WINDOW_S] + [now]
            restarted = len(child.deaths) <= MAX_RESTARTS and code != ServiceExit.BAD_SETTINGS
            child.move(ChildState.BACKOFF if restarted else ChildState.GIVEN_UP)
            self._tell(Death(child.spec.name, code, self.last_line(child.spec.name), restarted))
            if not restarted:
                return
            await asyncio.sleep(BACKOFF_S[min(len(child.deaths) - 1, len(BACKOFF_S) - 1)])
            await self._spawn_again(child)

    def _tell(self, death: Death) -> None:
        if self._on_death is not None:
            with contextlib.suppress(OSError):  # a terminal that is gone must not end the watching
                self._on_death(death)


def refuse_if_given_up(supervisor: Supervisor) -> None:
    """Raise when a service cannot be kept running."""
    for name in supervisor.failed():
        raise CommandError(
            f"{name} keeps ending: {supervisor.last_line(name)} (its log: {supervisor.children[name].log_path})",
            ExitCode.FAILED,
        )
