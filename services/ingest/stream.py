"""One stream at ingest: its reader, its intake, and what is published."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np

from services.ingest.audio import AudioBatcher
from services.ingest.core import Captured, Chunk, DropReason, Intake
from services.ingest.epochs import Epochs
from services.ingest.feed import Feed
from services.ingest.heard import Heard
from services.ingest.links import Links
from services.ingest.mirror import Mirror
from services.ingest.movement import Movement
from services.ingest.pausing import Answer, Pauses
from services.ingest.pixels import no_pixels, put_pixels
from services.ingest.reader import Behind, End, Item, Reader, Shot
from services.ingest.rtc.whip import WhipDesk
from services.ingest.settings import Settings
from services.ingest.similar import SimilarityFilter
from services.ingest.sizing import Sizing
from services.ingest.sources.opening import open_source
from services.ingest.sources.port import Source, SourceError
from services.ingest.thinning import Thinner
from shared.bus.port import Bus, BusError
from shared.contracts import subjects
from shared.contracts.commands import Mode, NoSource, PauseStream, TakeStream
from shared.contracts.events import (
    ChunkCaptured,
    ChunkClosed,
    ChunkDropped,
    ChunkStamp,
    EventKind,
    FrameStamp,
    SourceEnded,
    StreamEvent,
)
from shared.contracts.sources import FileSource, PatternSource, PushSource, WhipSource
from shared.media.errors import one_line
from shared.rtc.inbox import Inbox
from shared.session.port import SessionStore
from shared.telemetry.hops import record_ingest, start_chunk_trace
from shared.tensors.port import TensorStore

log = logging.getLogger(__name__)

# A verdict of the last chunk does not say that the end itself was heard: it is repeated so often after that, unless
# LeaveStream comes first; and at most so often when verdicts stay away.
CLOSED_TELLS = 12
LEFT_TELLS = 24
FAIL_TELLS = 10


class IngestStream:
    """Reads one source and publishes its chunks until everything is closed. ``done`` is called once, at the end."""

    def __init__(
        self,
        take: TakeStream,
        settings: Settings,
        bus: Bus,
        store: SessionStore,
        tensors: TensorStore,
        tracer: Any,
        done: Callable[[IngestStream], None],
    ) -> None:
        self.stream, self.epochs = take.stream, Epochs(take.epoch)
        self._take, self._settings = take, settings
        self._bus, self._tensors, self._tracer = bus, tensors, tracer
        self._done = done
        self._live, self._sizing = take.spec.mode is Mode.LIVE, Sizing(take)
        self._from_text = isinstance(take.spec.source, NoSource)
        self._deadline_ns = take.spec.deadline_ms * 1_000_000
        self._wake = asyncio.Event()
        self._feed: Feed[Item] = Feed(asyncio.get_running_loop(), self._wake, settings.read_ahead)
        self._intake: Intake[np.ndarray] = Intake(live=self._live, credits=take.credits)
        self._reader: Reader | None = None
        self._source: Source | None = None
        self._inbox, self._heard, self._whip = Inbox(), Heard(self.stream, bus), None
        self._links = Links(self.stream, lambda: self.epoch, bus, self._feed, settings.rules)
        if isinstance(source := take.spec.source, WhipSource):
            self._whip = WhipDesk(self.stream, self._links.tell, source.reconnect_s, settings, bus, self._inbox)
        self._audio: AudioBatcher | None = None
        self._sound_from: tuple[int, int | None] = (0, None)
        self._time_base = Fraction(1, 90_000)
        self._movement = Movement(with_flow=take.steadying > 0)
        self._error: str | None = None
        self._task: asyncio.Task[None] | None = None
        self._left_tells = self._closed_tells = 0
        self._leaving = False
        self._flushed = False
        self._closing = False
        self._resumed_ns = 0
        self._pauses = Pauses()
        self.thinner = Thinner()
        self._mirror = Mirror(self.stream, store)
        self._similar = SimilarityFilter(take.skip_similar, int(settings.skip_longest_s * 1e9))
        self._refreshes = take.refreshes

    # --- opening -----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the source in its thread. Raises SourceError with one line."""
        totals, closed, audio_parts, audio_dts = await self._mirror.read()
        self._intake = Intake(live=self._live, credits=self._take.credits, totals=totals, closed_chunks=closed)
        take, settings, heard = self._take, self._settings, self._heard
        await heard.start(pushes=isinstance(take.spec.source, PushSource))
        comes_once = self._live and not isinstance(take.spec.source, FileSource | PatternSource | NoSource)
        reader = self._reader = Reader(
            self.stream,
            lambda: open_source(
                take.spec, self._sizing.width, self._sizing.height, settings, self._inbox, self._links, heard
            ),
            self._feed,
            behind_ns=self._deadline_ns // 2 if self._live else None,
            skip=totals.captured if totals is not None and not comes_once else 0,
            preview=heard.preview,
        )
        reader.start()
        try:
            async with asyncio.timeout(self._settings.open_timeout_s):
                source: Source = await asyncio.wrap_future(reader.opened)
        except TimeoutError:
            self._feed.stop()
            raise SourceError(f"the source did not open in {self._settings.open_timeout_s:.0f} s") from None
        self._time_base, self._source = source.time_base, source
        self._sound_from = (audio_parts, audio_dts)
        if self._whip is not None:
            await self._whip.start()

    def start(self) -> None:
        """Begin to publish."""
        self._task = asyncio.create_task(self._run(), name=f"ingest-{self.stream}")

    # --- from outside ------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """The newest epoch it was taken in."""
        return self.epochs.epoch

    def adopt(self, take: TakeStream) -> None:
        """The same stream in a newer epoch: chunks carry it from now on. Or in its epoch, with more credits."""
        newer = take.epoch > self.epoch
        self.epochs.adopt(take.epoch, self._intake.chunks, take.block_chunks, take.block_start)
        # Within an epoch an older assignment may be delivered after a newer one; credits only grow.
        self._intake.credits = take.credits if newer else max(take.credits, self._intake.credits)
        if newer and self._live:
            self._intake.hold(take.source_held, DropReason(take.held_for))
        if newer and self._sizing.adopt(take, self._source):
            self._similar.reference = None
        if take.refreshes > self._refreshes or newer:
            self._refreshes, self._similar.threshold = take.refreshes, take.skip_similar
            self._similar.refresh()
        self._wake.set()

    def on_closed(self, message: ChunkClosed) -> None:
        """Credits back."""
        self._intake.closed(message.closed_chunks, time.monotonic())
        self._wake.set()

    async def pause(self, message: PauseStream) -> None:
        """Number no chunk from now on, or go on. A pause is told at once, going on with the first chunk numbered."""
        carry_out, answers = self._pauses.ask(message.command, message.paused, ended=self._intake.finished)
        if carry_out and message.paused and not self._intake.paused:
            self._feed.hold()
            self._intake.pause()
        elif carry_out and not message.paused and self._intake.paused:
            self._resumed_ns = time.time_ns()
            self._intake.resume()
            self._feed.go_on()
        await self._tell_applied(answers)
        self._wake.set()

    def leave(self, drain: bool) -> bool:
        """End the source. What is numbered goes on; what is not is dropped. True when there is nothing more to tell."""
        self._leaving = True
        if not self._intake.ended or self._intake.paused:
            self._intake.stop()
            self._feed.stop()
        self._wake.set()
        return not drain and self._intake.all_closed

    async def close(self) -> None:
        """End the reader and the tasks."""
        self._feed.stop()
        self._closing = True  # a client's asyncio.wait_for may swallow the cancellation
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self._whip is not None:
            await self._whip.close()
        await self._heard.close()
        if self._reader is not None:
            await self._reader.stop()

    # --- the loop ----------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._find_audio()
            told_at = 0.0
            while not self._finished():
                self._wake.clear()
                if await self._step():
                    continue
                now = time.monotonic()
                if self._intake.finished and now - told_at >= self._settings.repeat_s:
                    told_at = now
                    await self._tell_end()
                await self._watch(now)
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.repeat_s):
                        await self._wake.wait()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("stream %s: ingest fails", self.stream)
            await self._fail(f"ingest failed: {one_line(error)}")
        finally:
            self._done(self)

    def _finished(self) -> bool:
        return self._closing or self._closed_tells >= CLOSED_TELLS or self._left_tells >= LEFT_TELLS

    async def _step(self) -> bool:
        """One piece of work; False when there is none."""
        chunk = self._intake.take(time.monotonic())
        if chunk is not None:
            await self._publish(chunk)
            return True
        held = self._intake.paused and not self._live  # what waits keeps its place
        if self._intake.ended or held or not (self._live or self._intake.has_room):
            return False
        item = self._feed.pop()
        if item is None:
            return False
        if self._audio is None:
            await self._find_audio()
        if isinstance(item, Shot | Behind) and self._intake.held:
            self._intake.drop(self._intake.held_for)
        elif isinstance(item, Shot | Behind) and self._is_from_the_pause(item):
            self._intake.drop(DropReason.PAUSED)
        elif isinstance(item, Shot) and not self._sizing.fits(item.picture.pixels):
            self._intake.drop(DropReason.RESIZED)
        elif isinstance(item, Shot) and not self.thinner.keeps(item.picture.pts, self._time_base):
            self._intake.drop(DropReason.RATE)
        elif isinstance(item, Shot):
            self._intake.offer(item.picture.pts, item.picture.duration, item.captured_ns, item.picture.pixels)
        elif isinstance(item, Behind):
            self._intake.drop(DropReason.BEHIND)
        elif isinstance(item, End):
            self._error = item.error
            self._intake.end()
        elif self._audio is not None:
            self._audio.add(item)
            if self._audio.is_full:
                await self._send_audio(None)
        return True

    def _is_from_the_pause(self, item: Shot | Behind) -> bool:
        """Whether a live frame was captured before or during a pause, and comes only now."""
        if not self._live:
            return False
        return self._intake.paused or (isinstance(item, Shot) and item.captured_ns < self._resumed_ns)

    async def _publish(self, chunk: Chunk[np.ndarray]) -> None:
        began = time.time_ns()
        frames, last = [frame.pixels for frame in chunk.frames], chunk.frames[-1]
        resumed = self._pauses.numbered(chunk.number, chunk.frames[0].pts, last.pts)
        skipped = not self._from_text and self._similar.skips(frames, last.captured_ns)
        rmse, flow = (0.0,) * (len(frames) + chunk.padding), b""
        ref = no_pixels(self._sizing.width, self._sizing.height)
        if not self._from_text:
            rmse, flow = await self._movement.of(frames, chunk.padding, skipped)
        if not self._from_text and not skipped:
            whole = np.stack(frames + [frames[-1]] * chunk.padding)
            ref = await put_pixels(self._tensors, whole, self._settings.stall_s)
        await self._send_audio((last.pts + last.duration) * self._time_base)
        stamp = self._chunk_stamp(chunk, began)
        # The mirror is written first: a successor must not number this chunk again.
        await self._mirror.write(self._intake.totals(), self._audio)
        if skipped:
            message = ChunkDropped(stamp=stamp, service="ingest", reason="similar", skipped=True)
        else:
            totals, audio = self._intake.totals(), self._audio is not None
            message = ChunkCaptured(stamp=stamp, pixels=ref, rmse=rmse, totals=totals, audio=audio, flow=flow)
        await self._bus.publish(subjects.stream(self.stream, "frames" if skipped else "chunk"), message)
        await self._tell_applied(resumed)
        record_ingest(self._tracer, stamp)

    def _chunk_stamp(self, chunk: Chunk[np.ndarray], began: int) -> ChunkStamp:
        return ChunkStamp(
            stream=self.stream,
            epoch=self.epochs.of(chunk.number),
            chunk=chunk.number,
            frames=tuple(self._stamp(frame) for frame in chunk.frames),
            padding=chunk.padding,
            live=self._live,
            published_ns=time.time_ns(),
            trace=start_chunk_trace(self._tracer, self._settings.trace_ratio),
            time_base=(self._time_base.numerator, self._time_base.denominator),
            begun_ns=began,
        )

    def _stamp(self, frame: Captured[np.ndarray]) -> FrameStamp:
        return FrameStamp(
            index=frame.index,
            pts=frame.pts,
            captured_ns=frame.captured_ns,
            deadline_ns=frame.captured_ns + self._deadline_ns if self._live else 0,
            duration=frame.duration,
        )

    async def _find_audio(self) -> None:
        """A publisher's sound is known when they come, any other from the beginning."""
        track = self._source.audio if self._source is not None else None
        if track is not None:
            self._audio = AudioBatcher(self.stream, track, seq=self._sound_from[0], after_dts=self._sound_from[1])
            await self._bus.publish(subjects.stream(self.stream, "audio"), self._audio.announce(self.epoch))

    async def _send_audio(self, until_s: Fraction | None) -> None:
        if self._audio is not None:
            for part in self._audio.take(self.epoch, until_s):
                await self._bus.publish(subjects.stream(self.stream, "audio"), part)

    # --- the end -----------------------------------------------------------------------------------------------------

    async def _tell_end(self) -> None:
        """SourceEnded, again and again: it may be lost."""
        if not self._flushed:
            self._flushed = True
            if not self._leaving:
                await self._send_audio(None)
            await self._tell_applied(self._pauses.finish())
            await self._mirror.write(self._intake.totals(), self._audio)
        ended = SourceEnded(
            stream=self.stream,
            epoch=self.epoch,
            totals=self._intake.totals(),
            error=self._error,
            audio_parts=self._audio.parts if self._audio is not None else 0,
        )
        await self._bus.publish(subjects.stream(self.stream, "chunk"), ended)
        self._left_tells += self._leaving
        self._closed_tells += self._intake.all_closed

    async def _watch(self, now: float) -> None:
        intake = self._intake
        if self._live:
            # After the end nothing newer comes: what waits for a credit has its own deadline.
            waiting = intake.ended and intake.waiting
            if waiting and time.time_ns() > intake.newest_captured_ns + self._deadline_ns:
                intake.drop_pending(DropReason.NO_CREDIT)
                self._wake.set()
        if self._error is None and not self._leaving and intake.stalled_s(now) > self._settings.stall_s:
            waited = f"no verdict for chunk {intake.oldest_open} in {self._settings.stall_s:.0f} s"
            self._error = line = f"{waited}: the pipeline stands still"
            intake.stop()
            self._feed.stop()
            await self._fail(line)

    async def _tell_applied(self, answers: list[Answer]) -> None:
        for answer in answers:
            event = self._event(EventKind.APPLIED, answer.reason)
            event = event.model_copy(update={"command": answer.command, "chunk": answer.chunk, "pts": answer.pts})
            try:
                await self._bus.publish(subjects.stream(self.stream, "event"), event)
            except (BusError, OSError) as error:  # the picture goes on all the same
                log.warning("stream %s: %s was not told: %s", self.stream, answer.reason, error)

    async def _fail(self, reason: str) -> None:
        event = self._event(EventKind.FAILED, reason)
        for _ in range(FAIL_TELLS):
            try:
                await self._bus.publish(subjects.stream(self.stream, "event"), event)
            except (BusError, OSError) as error:
                log.warning("stream %s: its failure was not told: %s", self.stream, error)
                await asyncio.sleep(self._settings.repeat_s)
            else:
                return

    def _event(self, kind: EventKind, reason: str) -> StreamEvent:
        return StreamEvent(
            stream=self.stream, event=kind, service="ingest", at_ns=time.time_ns(), reason=reason, epoch=self.epoch
        )
