"""``rheocast run``: one clip through every service."""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.cli.errors import CommandError, ExitCode
from services.cli.interrupts import HeldInterrupt
from services.cli.progress import Progress
from services.cli.supervisor import Death
from services.cli.system import System
from services.cli.topology import Topology
from services.cli.validate import RunRequest
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.commands import StartStream, StopStream
from shared.contracts.events import ChunkClosed, EventKind, LedgerTotals, StreamEvent, StreamStats
from shared.media.probe import MediaError, probe
from shared.media.salvage import discard, earlier_pieces, finalise_part, part_path

ACCEPT_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
SILENCE_TIMEOUT_S = 90.0
REFUSAL_GRACE_S = 3.0


@dataclass(slots=True)
class Watch:
    """What the command line has heard of its stream. ``command`` is the id of its start command."""

    command: str = ""
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    accepted: bool = False
    last: StreamEvent | None = None
    closed: ChunkClosed | None = None
    heard_at: float = field(default_factory=time.monotonic)
    warnings: list[str] = field(default_factory=list)

    async def on_event(self, received: Received) -> None:
        """A lifecycle event."""
        event: StreamEvent = received.message
        self.heard_at = time.monotonic()
        if event.event in (EventKind.ACCEPTED, EventKind.REFUSED):
            if event.command == self.command:
                self.last = event
                self.accepted = event.event is EventKind.ACCEPTED
                self.answered.set()
                if not self.accepted:
                    self.ended.set()
        elif event.event is EventKind.WARNING:
            self.warnings.append(event.reason)
        elif event.event in (EventKind.STOPPED, EventKind.FAILED) and event.service == "egress":
            if self.last is None or self.accepted:
                self.last = event
            # A stream that is refused is closed by egress first: the scheduler's reason follows at once.
            asyncio.get_running_loop().call_later(0.0 if self.accepted else REFUSAL_GRACE_S, self._end)

    def _end(self) -> None:
        self.answered.set()
        self.ended.set()

    async def on_closed(self, received: Received) -> None:
        """Verdicts."""
        if self.closed is None or received.message.totals.closed >= self.closed.totals.closed:
            if self.closed is None or received.message.closed_chunks != self.closed.closed_chunks:
                self.heard_at = time.monotonic()
            self.closed = received.message


def summary(request: RunRequest, totals: LedgerTotals, stats: StreamStats, output: Path) -> dict[str, Any]:
    """The last line of ``--json``."""
    return {
        "output": str(output),
        "frames_in": totals.frames_in,
        "frames_out": stats.frames_out,
        "on_time": totals.on_time,
        "late": totals.late,
        "dropped": totals.dropped_total,
        "skipped": totals.skipped,
        "fps": round(stats.fps, 2),
        "ttff_s": round(stats.ttff_s, 3),
        "latency_p50_ms": round(stats.latency_p50_ms, 1),
        "latency_p95_ms": round(stats.latency_p95_ms, 1),
        "latency_p99_ms": round(stats.latency_p99_ms, 1),
        "jitter_p95_ms": round(stats.jitter_p95_ms, 1),
        "cpr": round(stats.cpr, 4),
        "steps": request.spec.steps,
        "stages": request.stages,
        "model": request.model.name,
    }


async def run(
    request: RunRequest,
    progress: Progress,
    batch_log: Path | None = None,
    extra_env: Mapping[str, str] | None = None,
    held: HeldInterrupt | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Run the clip. Returns the summary and the warnings. Raises CommandError; leaves nothing behind in any case."""
    topology = Topology(
        model=request.model.name,
        stages=request.stages,
        read_roots=(request.source.parent,) if request.source is not None else (),
        write_roots=(request.output.parent,),
        batch_log=batch_log,
        models_dir=request.models_dir,
        extra_env=extra_env or {},
    )
    interrupted, started = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    if held is not None and held.noted:
        interrupted.set()  # it came before anybody could act on it
    deaths: list[str] = []

    def on_death(death: Death) -> None:
        deaths.append(f"{death.what}: {death.line}")
        progress.note(f"{death.what}; {death.next}")

    system = System(topology, on_death=on_death)
    try:
        async with system:
            return await _unless(interrupted, _drive(request, system, progress, interrupted, started, deaths))
    except asyncio.CancelledError:
        raise CommandError("interrupted before the first frame; nothing was written", ExitCode.INTERRUPTED) from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        if started.is_set():
            _salvage(request.output, progress)


def _salvage(output: Path, progress: Progress) -> None:
    """A part file is left only when egress could not finish it: make it the output. It is removed only if empty."""
    part = part_path(output)
    if not part.exists() and not earlier_pieces(part):
        return
    try:
        finalise_part(part, output)
    except (MediaError, OSError) as error:
        try:
            probe(part)
        except MediaError:
            discard(part)  # it holds no picture
        else:
            progress.note(f"{part} could not be finished ({error}); it is playable as it is")


async def _unless(interrupted: asyncio.Event, work: Any) -> Any:
    """Await ``work``; if interrupted, let it stop its stream by itself within its own deadline."""
    task = asyncio.ensure_future(work)
    signal_task = asyncio.ensure_future(interrupted.wait())
    await asyncio.wait({task, signal_task}, return_when=asyncio.FIRST_COMPLETED)
    signal_task.cancel()
    if not task.done():
        try:
            return await asyncio.wait_for(task, STOP_TIMEOUT_S)
        except TimeoutError:
            raise CommandError("interrupted; the stream did not stop in time", ExitCode.INTERRUPTED) from None
    return task.result()


async def _drive(
    request: RunRequest,
    system: System,
    progress: Progress,
    interrupted: asyncio.Event,
    started: asyncio.Event,
    deaths: list[str],
) -> tuple[dict[str, Any], list[str]]:
    ready = asyncio.ensure_future(system.wait_ready(progress.note))
    await _first(ready, interrupted)
    if interrupted.is_set():
        ready.cancel()
        raise CommandError("interrupted before the first frame; nothing was written", ExitCode.INTERRUPTED)
    await ready
    stream, watch = f"run-{secrets.token_hex(4)}", Watch(command=secrets.token_hex(8))
    await system.bus.subscribe(subjects.stream(stream, "event"), watch.on_event)
    await system.bus.subscribe(subjects.stream(stream, "closed"), watch.on_closed)
    control = subjects.stream(stream, "control")
    started.set()
    await system.bus.publish(control, StartStream(command=watch.command, stream=stream, spec=request.spec))
    await _first(asyncio.ensure_future(watch.answered.wait()), interrupted, ACCEPT_TIMEOUT_S)
    if not watch.answered.is_set() and not interrupted.is_set():
        raise CommandError(
            f"the scheduler did not answer in {ACCEPT_TIMEOUT_S:.0f} s: {_why(deaths, system)}", ExitCode.FAILED
        )
    stop_sent_at: float | None = None
    while not watch.ended.is_set():
        if interrupted.is_set() and stop_sent_at is None:
            stop_sent_at = time.monotonic()
            progress.note("stopping: finishing the file")
            await system.bus.publish(control, StopStream(command=secrets.token_hex(8), stream=stream, drain=False))
        if stop_sent_at is not None and time.monotonic() - stop_sent_at > STOP_TIMEOUT_S * 0.8:
            raise CommandError("interrupted; the stream did not stop in time", ExitCode.INTERRUPTED)
        if not system.servers_alive():
            raise CommandError("the embedded NATS or Redis server ended; run it again", ExitCode.FAILED)
        if time.monotonic() - watch.heard_at > SILENCE_TIMEOUT_S:
            raise CommandError(f"no progress for {SILENCE_TIMEOUT_S:.0f} s: {_why(deaths, system)}", ExitCode.FAILED)
        for name in system.supervisor.failed():
            raise CommandError(f"{name} keeps ending: {system.supervisor.last_line(name)}", ExitCode.FAILED)
        progress.show(watch.closed)
        with suppress(TimeoutError):
            await asyncio.wait_for(watch.ended.wait(), 0.1)
    progress.show(watch.closed)
    return _result(request, watch, interrupted.is_set())


def _result(request: RunRequest, watch: Watch, interrupted: bool) -> tuple[dict[str, Any], list[str]]:
    event = watch.last
    if event is not None and event.event is EventKind.REFUSED:
        if interrupted:
            raise CommandError("interrupted before the first frame; nothing was written", ExitCode.INTERRUPTED)
        raise CommandError(event.reason)
    if event is None or event.totals is None or event.stats is None:
        raise CommandError("the stream ended without its ledger", ExitCode.FAILED)
    result = summary(request, event.totals, event.stats, request.output)
    if interrupted:
        raise RunEnded(result, watch.warnings, "interrupted", ExitCode.INTERRUPTED)
    if event.event is EventKind.FAILED:
        raise RunEnded(result, watch.warnings, event.reason, ExitCode.FAILED)
    return result, watch.warnings


class RunEnded(CommandError):
    """The run ended early, with a ledger: what was done is in the output."""

    def __init__(self, result: dict[str, Any], warnings: list[str], reason: str, code: ExitCode) -> None:
        done = result["frames_out"]
        kept = f"{done} frames are in {result['output']}" if done else "no frame was finished"
        super().__init__(f"{reason}; {kept}", code)
        self.result = result
        self.warnings = warnings


def _why(deaths: list[str], system: System) -> str:
    return deaths[-1] if deaths else f"the services' logs are in {system.run_dir / 'logs'}"


async def _first(task: asyncio.Future[Any], interrupted: asyncio.Event, timeout_s: float | None = None) -> None:
    stop = asyncio.ensure_future(interrupted.wait())
    await asyncio.wait({task, stop}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
