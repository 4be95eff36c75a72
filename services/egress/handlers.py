"""Messages to streams. No decisions about frames are made here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from services.egress.figures import SinkReport
from services.egress.ledger import StreamLedger, verdicts_of
from services.egress.live.desk import LiveDesk
from services.egress.rtc.peer import PeerDesk
from services.egress.rtc.viewers import WhepDesk
from services.egress.settings import Settings
from services.egress.sinks.opening import destinations, open_sinks, rate_of
from services.egress.sinks.port import SinkError
from services.egress.stream import EgressStream
from shared.bus.port import Bus, BusError, Received, Subscription
from shared.clock import Clock
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream, StreamSpec, TakeStream
from shared.contracts.events import ChunkCaptured, FramesDecoded, LedgerTotals, SourceEnded, SourceTotals, StreamTaken
from shared.contracts.sinks import ChangeSinks, kept_sinks, named
from shared.media.addresses import AddressRules
from shared.session.port import SessionStore, StoreError
from shared.session.state import TERMINAL_STATES
from shared.telemetry import names
from shared.telemetry.metrics import Metrics, Timing
from shared.tensors.port import TensorReader

log = logging.getLogger(__name__)

# A repeated assignment that comes just after its stream ended must not open the sinks again.
REMEMBER_S = 10.0


class Handlers:
    """The assignments of this instance and the streams it has taken."""

    def __init__(
        self,
        instance: str,
        settings: Settings,
        bus: Bus,
        store: SessionStore,
        tensors: TensorReader,
        tracer: Any,
        clock: Clock,
        latency: Timing | None = None,
    ) -> None:
        self._instance, self._settings = instance, settings
        self._bus, self._store, self._tensors, self._tracer, self._clock = bus, store, tensors, tracer, clock
        self._latency = latency
        self._ended_totals = LedgerTotals()
        self._streams: dict[str, EgressStream] = {}
        self._ledgers: dict[str, StreamLedger] = {}
        self._files: dict[str, list[Path]] = {}
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._viewers: dict[str, WhepDesk] = {}
        self._peers: dict[str, PeerDesk] = {}
        self._live: dict[str, LiveDesk] = {}
        self._ended: dict[str, tuple[int, float]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._assign: Subscription | None = None
        self._refusing = ""
        self.idle = asyncio.Event()  # set while no stream is open, once nothing new is taken
        self.counters: dict[str, int] = {"ledger_mismatch": 0}  # told from the start: an alert looks for its increase

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams whose sinks are open."""
        return tuple(self._streams)

    async def start(self) -> None:
        """Listen for assignments."""
        self._assign = await self._bus.subscribe(subjects.assign("egress"), self.on_assign)

    def refuse(self) -> None:
        """Take no stream any more, and finish those that are open."""
        self._refusing = "this egress is shutting down"
        for stream in self._streams.values():
            stream.shut_down()
        self._note_idle()

    async def close(self) -> None:
        """Let everything go."""
        self._refusing = "this egress is shutting down"
        if self._assign is not None:
            await self._assign.unsubscribe()
        await asyncio.gather(*(stream.close() for stream in list(self._streams.values())), return_exceptions=True)
        for stream in list(self._subscriptions):
            await self._unsubscribe(stream)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def declare(self, metrics: Metrics) -> None:
        """The frames' verdicts, of the streams playing here and of those that ended; and what should be rare."""
        metrics.read(names.FRAMES_CLOSED, lambda: verdicts_of(self._totals()))
        metrics.value(
            names.FRAMES_OPEN, lambda: sum(s.totals.frames_in - s.totals.closed for s in self._streams.values())
        )
        metrics.read(
            names.STREAM_RATE, lambda: [({"stream": s.stream}, s.stats().fps) for s in list(self._streams.values())]
        )
        metrics.value(names.STREAMS, lambda: len(self._streams))
        metrics.counts(names.INCIDENTS, "incident", self._all_counters)

    def _totals(self) -> LedgerTotals:
        """What was counted here: of a stream that another egress has played, only what came after it."""
        total = self._ended_totals
        for ledger in self._ledgers.values():
            total = total.plus(ledger.totals_here())
        return total

    def _all_counters(self) -> dict[str, int]:
        counters = dict(self.counters)
        for part in (*self._streams.values(), *self._peers.values()):
            for name, count in part.counters.items():
                counters[name] = counters.get(name, 0) + count
        return counters

    # --- assignments -------------------------------------------------------------------------------------------------

    async def on_assign(self, received: Received) -> None:
        """Take or leave a stream, if this instance is meant."""
        message = received.message
        if message.instance != self._instance:
            return
        if isinstance(message, TakeStream):
            await self._on_take(message)
        elif isinstance(message, LeaveStream):
            await self._on_leave(message)
        elif isinstance(message, ChangeSinks) and (live := self._live.get(message.stream)) is not None:
            await live.change(message)

    async def _on_take(self, take: TakeStream) -> None:
        self._forget_ended()
        running = self._streams.get(take.stream)
        if running is not None:
            if take.epoch < running.epoch:
                self._count("take_old_epoch")
                return
            if take.epoch > running.epoch:
                running.adopt(take)
                await self._resize(take)
            await self._answer(take, None)
        elif take.epoch <= self._ended.get(take.stream, (-1, 0.0))[0]:
            self._count("take_repeated")
        elif self._refusing:
            await self._answer(take, self._refusing)
        elif len(self._streams) >= self._settings.max_streams:
            await self._answer(take, f"this egress has its {self._settings.max_streams} streams open; stop one first")
        else:
            try:
                await self._open(take)
            except SinkError as error:
                await self._answer(take, str(error))
                return
            await self._answer(take, None)

    async def _resize(self, take: TakeStream) -> None:
        live, size = self._live.get(take.stream), (take.width, take.height)
        if (peer := self._peers.get(take.stream)) is not None:
            peer.resize(size)
        if live is not None and size != live.size:
            live.size = size
            await live.resize(*size)

    async def _on_leave(self, leave: LeaveStream) -> None:
        stream = self._streams.get(leave.stream)
        if stream is not None and leave.epoch >= stream.epoch:
            stream.leave(leave)
        elif stream is None and leave.stream not in self._ended and (leave.failure is not None or not leave.drain):
            await self._close_unseen(leave)
        else:
            self._count("leave_ignored")

    async def _close_unseen(self, leave: LeaveStream) -> None:
        """A stream that a dead predecessor was playing: save its recording and close its ledger."""
        try:
            session = await self._store.get(leave.stream)
        except StoreError as error:
            log.warning("stream %s cannot be closed: %s", leave.stream, error)
            return
        if session is None or session["state"] in TERMINAL_STATES:
            self._count("leave_ignored")
            return
        begun: StreamSpec = session["spec"]
        spec = begun.model_copy(update={"sinks": kept_sinks(begun.sinks, session.get("destinations"))})
        assignment = session.get("assignment")
        size = assignment if isinstance(assignment, dict) else {}
        take = TakeStream(
            instance=self._instance,
            stream=leave.stream,
            epoch=leave.epoch,
            spec=spec,
            width=int(size.get("width") or spec.width or 16),
            height=int(size.get("height") or spec.height or 16),
            noise=0.0,
            credits=1,
        )
        try:
            stream = await self._open(take)
        except SinkError as error:
            log.warning("stream %s cannot be closed: %s", leave.stream, error)
            return
        stream.leave(leave)

    async def _open(self, take: TakeStream) -> EgressStream:
        """Listen and open the sinks. Raises SinkError, BusError."""
        ledger = await self._ledger(take.stream)
        roots, taken = self._settings.roots, self._taken()
        begun = take.spec.model_copy(
            update={"sinks": tuple(sink for sink in named(take.spec.sinks) if sink.id not in take.added_sinks)}
        )
        # Listening may fail, and opening may: what was begun is undone, so that a repeated assignment finds nothing.
        subscriptions: list[Subscription] = []
        try:
            for leaf, handler in (("chunk", self.on_chunk), ("audio", self.on_audio), ("frames", self.on_frames)):
                subscriptions.append(await self._bus.subscribe(subjects.stream(take.stream, leaf), handler))
            sinks = await asyncio.to_thread(
                open_sinks, begun, take.width, take.height, roots, taken, resume=ledger.closed_chunks > 0
            )
        except BaseException:
            for subscription in subscriptions:
                with suppress(BusError):
                    await subscription.unsubscribe()
            raise
        viewers = WhepDesk(take.stream, take.width, take.height, self._settings.whep_viewers, self._settings)
        peer = None
        if take.spec.peer_grace_s is not None:
            peer = PeerDesk(take, viewers, self._settings, self._bus, self._clock)
        live = LiveDesk(
            take.stream,
            (take.width, take.height),
            rate_of(take.spec),
            roots,
            self._settings.h264_encoder,
            AddressRules.of(self._settings.allow_private, self._settings.allowed_hosts),
            self._bus,
            self._clock,
            self._taken,
        )
        live.epoch = take.epoch
        stream = EgressStream(
            take,
            self._settings,
            self._bus,
            self._store,
            self._tensors,
            self._tracer,
            self._clock,
            {**sinks, "(live)": live.sink, "(webrtc)": viewers.sink, **({"(peer)": peer.sink} if peer else {})},
            ledger,
            self._on_done,
            self._latency,
        )
        self._streams[take.stream], self._ledgers[take.stream] = stream, ledger
        self._files[take.stream] = destinations(begun, roots)
        self._subscriptions[take.stream] = subscriptions
        self._live[take.stream] = live
        live.remove_other = stream.remove_sink
        stream.figures = SinkReport(live, viewers, lambda: stream.stats().frames_out).due
        self._viewers[take.stream] = viewers
        stream.start()
        await viewers.start(self._bus)
        await live.start(named(take.spec.sinks), take.added_sinks)
        if peer is not None:
            self._peers[take.stream] = peer
            await peer.start()
        if take.given_up:
            stream.adopt(take)  # what a predecessor had under way will not come
        return stream

    def _taken(self) -> set[Path]:
        """Files that are being written."""
        files = {file for files in self._files.values() for file in files}
        return files | {file for live in self._live.values() for file in live.files.values()}

    async def _ledger(self, stream: str) -> StreamLedger:
        """What a predecessor of this process had closed."""
        try:
            totals, closed, through = await self._store.ledger(stream)
            ledger = StreamLedger(totals, closed, through)
            session = await self._store.get(stream)
            mirror = (session or {}).get("source")
            if isinstance(mirror, dict):
                ledger.observe(SourceTotals.model_validate(mirror["totals"]), ended=False)
            return ledger
        except StoreError as error:
            log.warning("stream %s starts without its stored ledger: %s", stream, error)
            return StreamLedger()

    # --- the way of a chunk ------------------------------------------------------------------------------------------

    async def on_chunk(self, received: Received) -> None:
        """ChunkCaptured and SourceEnded."""
        message = received.message
        if isinstance(message, ChunkCaptured):
            stream = self._streams.get(message.stamp.stream)
            if stream is not None:
                stream.on_captured(message)
        elif isinstance(message, SourceEnded) and (stream := self._streams.get(message.stream)) is not None:
            stream.on_ended(message)

    async def on_audio(self, received: Received) -> None:
        """AudioCaptured."""
        stream = self._streams.get(received.message.stream)
        if stream is not None:
            stream.on_audio(received.message)

    async def on_frames(self, received: Received) -> None:
        """FramesDecoded and ChunkDropped."""
        message = received.message
        stream = self._streams.get(message.stamp.stream)
        if stream is None:
            self._count("frames_unknown_stream")
        elif isinstance(message, FramesDecoded):
            await stream.on_frames(message)
        else:
            stream.on_dropped(message)

    # --- the end -----------------------------------------------------------------------------------------------------

    def _on_done(self, stream: EgressStream) -> None:
        if self._streams.get(stream.stream) is not stream:
            return
        del self._streams[stream.stream]
        self._files.pop(stream.stream, None)
        self._ended[stream.stream] = (stream.epoch, time.monotonic())
        self._ended_totals = self._ended_totals.plus(self._ledgers.pop(stream.stream).totals_here())
        self._keep(stream.counters)
        task = asyncio.create_task(self._unsubscribe(stream.stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._note_idle()

    def _keep(self, counters: Mapping[str, int]) -> None:
        """What a part that is gone has counted: a metric's count never goes back."""
        for name, count in counters.items():
            self.counters[name] = self.counters.get(name, 0) + count

    async def _unsubscribe(self, stream: str) -> None:
        peer = self._peers.pop(stream, None)
        if peer is not None:
            self._keep(peer.counters)
        for desk in (peer, self._viewers.pop(stream, None), self._live.pop(stream, None)):
            if desk is not None:
                await desk.close()
        for subscription in self._subscriptions.pop(stream, []):
            await subscription.unsubscribe()

    async def _answer(self, take: TakeStream, error: str | None) -> None:
        if error is not None:
            log.info("stream %s refused: %s", take.stream, error)
        answer = StreamTaken(
            service="egress", instance=self._instance, stream=take.stream, epoch=take.epoch, error=error
        )
        await self._bus.publish(subjects.TAKEN, answer)

    def _forget_ended(self) -> None:
        now = time.monotonic()
        for stream, (_, at) in list(self._ended.items()):
            if now - at > REMEMBER_S:
                del self._ended[stream]

    def _note_idle(self) -> None:
        if self._refusing and not self._streams:
            self.idle.set()

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1
