"""One stream at egress: messages into its core, the core's decisions to sinks, ledger and bus."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from services.egress.accounts import Accounts
from services.egress.audio import AudioOrder
from services.egress.core import Arrival, Decisions, Emit, StreamCore
from services.egress.ends import ChunkEnds
from services.egress.figures import Due, nothing_told
from services.egress.ledger import ChunkVerdict, StreamLedger, drop_key
from services.egress.rules import rules_of
from services.egress.settings import Settings
from services.egress.sink_thread import SinkThread
from services.egress.sinks.port import Sink
from services.egress.stats import StreamMeter
from services.egress.stills import Stills
from services.egress.waiting import Waiting
from shared.bus.port import Bus, BusError
from shared.clock import Clock
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream, TakeStream
from shared.contracts.events import (
    AudioCaptured,
    ChunkCaptured,
    ChunkClosed,
    ChunkDropped,
    EventKind,
    FramesDecoded,
    LedgerTotals,
    SourceEnded,
    StreamEvent,
    StreamStats,
)
from shared.media.errors import one_line
from shared.session.port import SessionStore
from shared.telemetry.metrics import Timing
from shared.telemetry.propagation import as_sampled
from shared.tensors.port import TensorError, TensorReader

log = logging.getLogger(__name__)

IDLE_S = 1.0
# How long the end waits for a write to the store that is under way, and repeats the last event if the bus refuses it.
BOOKS_STOP_S = 15.0
LAST_EVENT_S = 10.0
LAST_EVENT_PAUSE_S = 0.5


class EgressStream:
    """Plays one stream until its ledger is closed. ``done`` is called once, after the sinks are finished."""

    def __init__(
        self,
        take: TakeStream,
        settings: Settings,
        bus: Bus,
        store: SessionStore,
        tensors: TensorReader,
        tracer: Any,
        clock: Clock,
        sinks: dict[str, Sink],
        ledger: StreamLedger,
        done: Callable[[EgressStream], None],
        latency: Timing | None = None,
    ) -> None:
        self.stream, self.spec = take.stream, take.spec
        self.counters: dict[str, int] = {}
        self._settings, self._bus, self._tensors, self._clock = settings, bus, tensors, clock
        self._done, self._latency = done, latency
        self._wake = asyncio.Event()
        self._core = StreamCore(rules_of(take, settings), take.epoch, ledger)
        self._accounts = Accounts(self.stream, ledger, store)
        self._ends = ChunkEnds(tracer, self.stream, take.epoch, clock.now_ns(), self._count)
        self._sinks = SinkThread(self.stream, sinks, settings.sink_frames, self._wake.set, take.steadying)
        self.remove_sink = self._sinks.remove
        self.figures: Due = nothing_told
        self._meter = StreamMeter(clock.now_ns())
        self._waiting = Waiting(self._count)
        self._sound, self._stills = AudioOrder(resumed=ledger.closed_chunks > 0), Stills()
        self._audio_parts, self._paused, self._audio_known = 0, 0, False
        self._source_error: str | None = None
        self._ending: tuple[str | None, str] | None = None  # (failure, drop key) once told to leave at once
        self._closes = asyncio.Event()
        self._books_end = False
        self._sound_came = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._bookkeeper: asyncio.Task[None] | None = None

    @property
    def epoch(self) -> int:
        """The newest epoch it was taken in."""
        return self._core.epoch

    @property
    def totals(self) -> LedgerTotals:
        """The ledger as it stands."""
        return self._core.ledger.totals()

    def stats(self) -> StreamStats:
        """What was measured so far."""
        return self._meter.stats()

    def adopt(self, take: TakeStream) -> None:
        """The same stream in a newer epoch."""
        if take.given_up:
            self._core.give_up(take.epoch, f"scheduler:{take.given_up}")
            self._wake.set()
        self._core.epoch = take.epoch

    def start(self) -> None:
        """Begin to play."""
        self._task = asyncio.create_task(self._run(), name=f"egress-{self.stream}")
        self._bookkeeper = asyncio.create_task(self._keep_books(), name=f"ledger-{self.stream}")

    # --- messages ----------------------------------------------------------------------------------------------------

    def on_captured(self, message: ChunkCaptured) -> None:
        """What was numbered."""
        if not self._audio_known:
            self._audio_known = True
            self._sinks.expect_audio(message.audio and self.spec.audio)
        if not self._core.ledger.is_closed(message.stamp.chunk):  # else it would wait for a verdict for ever
            self._ends.captured(message.stamp)
        self._waiting.captured(message)
        self._core.captured(message.stamp, message.totals, self._clock.now_ns())
        paused, self._paused = self._paused, max(self._paused, message.totals.dropped.get("paused", 0))
        self._meter.excuse(self._paused - paused)
        self._wake.set()

    def on_ended(self, message: SourceEnded) -> None:
        """The source gives nothing more."""
        self._source_error = self._source_error or message.error
        self._audio_parts = max(self._audio_parts, message.audio_parts)
        self._core.ended(message.totals, self._clock.now_ns())
        self._wake.set()

    def on_audio(self, message: AudioCaptured) -> None:
        """Sound."""
        for part in self._sound.push(message):
            self._sinks.put_audio(part)
        self._sound_came.set()

    async def on_frames(self, message: FramesDecoded) -> None:
        """Frames: fetched at once, so that the worker's slot is free again."""
        stamp = message.stamp
        arrival = self._core.arrival(stamp)
        if arrival is Arrival.WANTED:
            try:
                pixels = await self._tensors.fetch(message.pixels)
            except (TensorError, TimeoutError, OSError, RuntimeError) as error:
                log.warning("stream %s: the frames of chunk %d are gone: %s", self.stream, stamp.chunk, error)
                self._core.lose(stamp, "egress:frames_gone")
                self._wake.set()
                return
            arrival = self._core.ready(stamp, now := self._clock.now_ns())
            if arrival is Arrival.WANTED:
                self._waiting.came(stamp, pixels)
                self._ends.came(message, now)
        if arrival is not Arrival.WANTED:
            self._count(f"frames_{arrival.value}")
        await self._tensors.release_anywhere(message.pixels)
        self._wake.set()

    def on_dropped(self, message: ChunkDropped) -> None:
        """A service gave a chunk up."""
        key = f"{message.service}:{message.reason}"
        if not self._core.ledger.is_closed(message.stamp.chunk):
            self._ends.came(message)
        if not self._core.dropped(message.stamp, key, message.skipped, self._clock.now_ns()):
            self._count("drops_ignored")
        elif message.skipped:
            self._meter.excuse(len(message.stamp.frames))
            self._stills.add(message.stamp, self._core.delay)
        self._wake.set()

    def leave(self, message: LeaveStream) -> None:
        """End. ``drain`` without a failure: play on until everything is closed."""
        if message.failure is not None:
            self._ending = (message.failure, drop_key(message.failure))
        elif not message.drain:
            self._ending = (None, "scheduler:stopped")
        self._wake.set()

    def shut_down(self) -> None:
        """This process ends: finish the sinks and tell so."""
        self._ending = self._ending or ("egress was shut down", "egress:shut_down")
        self._wake.set()

    async def close(self) -> None:
        """End the task, whatever it is doing; the sinks are finished all the same."""
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._stop_books()
        await self._sinks.finish()

    # --- the loop ----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        failure: str | None = None
        try:
            failure = await self._play()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("stream %s: egress fails", self.stream)
            failure = f"egress failed: {one_line(error)}"
            self._close(self._core.abort("egress:failed"), self._clock.now_ns(), failed=True)
        try:
            await self._end(failure)
        except Exception as error:
            log.exception("stream %s: its end fails", self.stream)
            await self._tell_last(EventKind.FAILED, f"egress failed: {one_line(error)}")
        finally:
            self._done(self)

    async def _play(self) -> str | None:
        """Play until the end; the failure in one line, None when it ended well."""
        while True:
            self._wake.clear()
            now = self._clock.now_ns()
            if self._ending is not None:
                failure, key = self._ending
                self._close(self._core.abort(key), now, failed=failure is not None)
                return failure
            room = self._sinks.room
            decisions = self._core.due(now, room)
            self._act(decisions, now)
            self._sinks.still(self._stills.due(now))
            failure = decisions.failure or self._sinks.error
            if failure is not None:
                key = "egress:sink" if decisions.failure is None else "egress:lost"
                self._close(self._core.abort(key), now, failed=True)
                return failure
            if self._core.complete:
                return None
            await self._wait(room > len(decisions.emits))

    async def _wait(self, may_go_on: bool) -> None:
        """Until the next frame is due, a message comes, or a second has passed."""
        now = self._clock.now_ns()
        due = min((at for at in (self._core.next_at(now), self._stills.next_at) if at is not None), default=None)
        seconds = IDLE_S if due is None else min(IDLE_S, max(0.0, (due - now) / 1e9))
        if seconds <= 0 and may_go_on:
            await asyncio.sleep(0)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds or IDLE_S):
                await self._wake.wait()

    def _act(self, decisions: Decisions, now: int) -> None:
        for emit in decisions.emits:
            self._emit(emit, now)
        for verdict in decisions.closes:
            self._waiting.forget(verdict.chunk)
        if decisions.closes:
            self._close(decisions.closes, now)
            self._closes.set()

    def _close(self, closes: list[ChunkVerdict], now: int, failed: bool = False) -> None:
        self._accounts.add(closes)
        self._ends.closed(closes, now, failed)

    def _emit(self, emit: Emit, now: int) -> None:
        frame, given = emit.frame, self._waiting.frame(emit, now)
        self._sinks.put(given)
        self._meter.emitted(frame, now, given.time_base)
        self._ends.shown(emit.chunk, now)
        if self._latency is not None:  # a late one's trace is written down, whatever the share is
            late, trace = 0 < frame.deadline_ns < now, self._waiting.stamp(emit.chunk).trace
            self._latency.record((now - frame.captured_ns) / 1e9, as_sampled(trace) if late else trace)

    async def _keep_books(self) -> None:
        """Verdicts to the store and the bus, beside the playing; the newest is repeated every second."""
        while not self._books_end:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.repeat_s):
                    await self._closes.wait()
            self._closes.clear()
            if self._books_end:
                return
            try:
                await self._accounts.write()
                await self._tell_closed()
            except Exception as error:
                # It must not end: without verdicts no credit comes back.
                known = isinstance(error, BusError | OSError)
                log.warning(
                    "stream %s: its verdicts were not told: %s", self.stream, error, exc_info=None if known else error
                )

    async def _tell_closed(self) -> None:
        ledger = self._core.ledger
        message = ChunkClosed(
            stream=self.stream,
            epoch=self.epoch,
            closed_chunks=ledger.closed_chunks,
            through=ledger.through,
            totals=ledger.totals(),
            latency_ms=self._meter.newest_latency_ms,
            sinks=self.figures(),
            ends=self._ends.take(),
        )
        await self._bus.publish(subjects.stream(self.stream, "closed"), message)

    # --- the end -----------------------------------------------------------------------------------------------------

    async def _end(self, failure: str | None) -> None:
        self._waiting.clear()
        await self._stop_books()
        await self._rest_of_sound(failure)
        made = await self._sinks.finish()
        failure = failure or self._sinks.error
        if self._sound.lost:
            await self._warn(f"{self._sound.lost} parts of the sound were lost on their way")
        if self._source_error is not None and failure is None:
            await self._warn(f"the source broke: {self._source_error}")
        await self._accounts.finish(self._meter.stats())
        with suppress(Exception):
            await self._tell_closed()
        totals = self._core.ledger.totals()
        if totals.closed != totals.frames_in:
            log.error("stream %s: the ledger does not add up: %s", self.stream, totals)
            self._count("ledger_mismatch")
        self._ends.finish(failure or "", totals)
        kind = EventKind.STOPPED if failure is None else EventKind.FAILED
        log.info("stream %s %s: %s", self.stream, kind.value, failure or "; ".join(made) or "done")
        await self._accounts.move(failed=failure is not None)
        await self._tell_last(kind, failure or self._source_error or "")

    async def _stop_books(self) -> None:
        """Let the bookkeeper end by itself: a write to the store is not to be cut off between question and answer.

        Nor would a cancellation always be heard: ``asyncio.wait_for`` of Python 3.11, which the clients use, swallows
        one that comes together with its result.
        """
        self._books_end = True
        self._closes.set()
        if self._bookkeeper is None:
            return
        await asyncio.wait({self._bookkeeper}, timeout=BOOKS_STOP_S)
        if not self._bookkeeper.done():
            self._bookkeeper.cancel()
            await asyncio.wait({self._bookkeeper}, timeout=1.0)
        self._bookkeeper = None

    async def _rest_of_sound(self, failure: str | None) -> None:
        """Sound comes on a subject of its own: give its last parts a moment."""
        grace = self._settings.audio_grace_s if failure is None and self.spec.audio else 0.0
        with suppress(TimeoutError):
            async with asyncio.timeout(grace):
                while not self._sound.complete(self._audio_parts):
                    self._sound_came.clear()
                    await self._sound_came.wait()
        for part in self._sound.flush(self._audio_parts):
            self._sinks.put_audio(part)

    async def _warn(self, reason: str) -> None:
        """Tell a warning. One that cannot be told does not hold up the end."""
        try:
            await self._tell(EventKind.WARNING, reason)
        except (BusError, OSError) as error:
            log.warning("stream %s: a warning was not told (%s): %s", self.stream, reason, error)

    async def _tell_last(self, kind: EventKind, reason: str) -> None:
        """The event everybody waits for: a bus that refuses it is asked again for a while."""
        until = time.monotonic() + LAST_EVENT_S
        while True:
            try:
                return await self._tell(kind, reason)
            except (BusError, OSError) as error:
                if time.monotonic() > until:
                    log.error("stream %s: its end (%s) could not be told: %s", self.stream, kind.value, error)
                    return None
            await asyncio.sleep(LAST_EVENT_PAUSE_S)

    async def _tell(self, kind: EventKind, reason: str) -> None:
        last = kind in (EventKind.STOPPED, EventKind.FAILED)
        event = StreamEvent(
            stream=self.stream,
            event=kind,
            service="egress",
            at_ns=self._clock.now_ns(),
            reason=reason,
            totals=self._core.ledger.totals() if last else None,
            stats=self._meter.stats() if last else None,
            epoch=self.epoch,
        )
        await self._bus.publish(subjects.stream(self.stream, "event"), event)

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1
