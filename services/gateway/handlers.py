"""Commands out, answers back: the gateway's side of the bus."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress

from services.gateway.core import sum_of, view_of
from services.gateway.errors import (
    GatewayError,
    InvalidError,
    NoAnswerError,
    RefusedError,
    UnknownPartError,
    UnknownStreamError,
)
from services.gateway.settings import Settings
from shared.bus.port import Bus, BusError, Received
from shared.contracts import subjects
from shared.contracts.commands import StartStream, StopStream, StreamPatch, StreamSpec, UpdateStream
from shared.contracts.events import EventKind, LedgerTotals, StreamEvent
from shared.contracts.operating import CutPipeline, DrainWorker, FleetAsked, FleetTold, MigrateStream, Refused
from shared.contracts.sinks import AddSink, RemoveSink, Sink
from shared.contracts.sources import PushedFrame
from shared.contracts.tiers import CapacityAsked, CapacityTold, Refusal
from shared.contracts.views import StreamView, TotalLedger
from shared.rates import Rates
from shared.session.port import SessionStore
from shared.session.state import TERMINAL_STATES, StreamState

Command = StartStream | UpdateStream | StopStream | MigrateStream | AddSink | RemoveSink


class Desk:
    """Sends commands and waits for their receipts; reads sessions. ``on_begin`` is awaited before a free id is started."""

    def __init__(self, bus: Bus, store: SessionStore, settings: Settings) -> None:
        self._bus = bus
        self._store = store
        self._settings = settings
        self._waiting: dict[str, asyncio.Future[StreamEvent]] = {}
        self._rates = Rates(settings.tenant_commands_per_s, settings.tenant_burst)
        self.on_begin: list[Callable[[str], Awaitable[None]]] = []

    async def start(self) -> None:
        """Listen for receipts."""
        await self._bus.subscribe(subjects.stream(subjects.ANY, "event"), self._on_event)

    async def _on_event(self, received: Received) -> None:
        event: StreamEvent = received.message
        if event.event in (EventKind.ACCEPTED, EventKind.REFUSED):
            future = self._waiting.pop(event.command, None)
            if future is not None and not future.done():
                future.set_result(event)

    async def create(self, stream: str, spec: StreamSpec) -> StreamEvent:
        """Start a stream; returns its accepted event. Raises RefusedError, NoAnswerError."""
        self.admit(spec.tenant)
        await self._begin(stream)
        command = secrets.token_hex(8)
        return await self._ask(stream, StartStream(command=command, stream=stream, spec=spec))

    async def _begin(self, stream: str) -> None:
        """Before the command: its events, and its files, come as soon as it is sent. An id under way will be refused."""
        former = await self._store.get(stream)
        if former is None or former["state"] in TERMINAL_STATES:
            for begin in self.on_begin:
                await begin(stream)

    @asynccontextmanager
    async def beginning(self, stream: str, spec: StreamSpec) -> AsyncIterator[None]:
        """As ``create``; whatever goes wrong in the block, a caller who hangs up too, stops it: nobody would come."""
        await self.create(stream, spec)
        try:
            yield
        except BaseException:
            with suppress(GatewayError, BusError):
                await self.stop(stream, False, spec.tenant)
            raise

    async def patch(self, stream: str, patch: StreamPatch, tenant: str) -> StreamEvent:
        """Change a stream. Raises UnknownStreamError, RefusedError, NoAnswerError."""
        self.admit(tenant)
        await self.view(stream)
        command = UpdateStream(command=secrets.token_hex(8), stream=stream, patch=patch, tenant=tenant)
        return await self._ask(stream, command)

    async def stop(self, stream: str, drain: bool, tenant: str) -> StreamEvent:
        """Stop a stream. Raises UnknownStreamError, RefusedError, NoAnswerError."""
        await self.view(stream)
        return await self._ask(
            stream, StopStream(command=secrets.token_hex(8), stream=stream, drain=drain, tenant=tenant)
        )

    def admit(self, tenant: str) -> None:
        """Count one command of a tenant. Raises RefusedError when it asks too often; stopping is never too often."""
        wait_s = self._rates.take(tenant, time.monotonic())
        if wait_s > 0:
            rate = self._settings.tenant_commands_per_s
            raise RefusedError(
                f"tenant {tenant} sends more than {rate:g} commands a second: slow down", wait_s, Refusal.QUOTA
            )

    async def capacity(self, asked: CapacityAsked) -> CapacityTold:
        """How many more streams fit, as the scheduler would decide. Raises NoAnswerError."""
        try:
            told: CapacityTold = await self._bus.request(subjects.CAPACITY, asked, self._settings.capacity_timeout_s)
        except BusError as error:
            raise NoAnswerError(f"no scheduler is leading yet: {error}") from None
        return told

    async def migrate(self, stream: str, pipeline: str) -> StreamEvent:
        """Move a stream to another pipeline. Raises UnknownStreamError, UnknownPartError, RefusedError, NoAnswerError."""
        await self.view(stream)
        command = secrets.token_hex(8)
        return await self._ask(stream, MigrateStream(command=command, stream=stream, pipeline=pipeline))

    async def fleet(self, request: FleetAsked | DrainWorker | CutPipeline) -> FleetTold:
        """Ask the scheduler about workers and pipelines. Raises UnknownPartError, InvalidError, RefusedError, NoAnswerError."""
        try:
            told: FleetTold = await self._bus.request(subjects.FLEET, request, self._settings.fleet_timeout_s)
        except BusError as error:
            raise NoAnswerError(f"the scheduler did not answer; is it running? ({error})") from None
        if told.error is None:
            return told
        if told.refused is Refused.UNKNOWN:
            raise UnknownPartError(told.error)
        if told.refused is Refused.INVALID:
            raise InvalidError(told.error)
        raise RefusedError(told.error, told.retry_after_s)

    async def add_sink(self, stream: str, sink: Sink, tenant: str) -> StreamEvent:
        """One more sink. Raises RefusedError, NoAnswerError."""
        self.admit(tenant)
        return await self._ask(stream, AddSink(command=secrets.token_hex(8), stream=stream, sink=sink, tenant=tenant))

    async def remove_sink(self, stream: str, sink: str, tenant: str) -> StreamEvent:
        """Finish and close a sink. Raises RefusedError, NoAnswerError."""
        self.admit(tenant)
        return await self._ask(
            stream, RemoveSink(command=secrets.token_hex(8), stream=stream, sink=sink, tenant=tenant)
        )

    async def push(self, frame: PushedFrame) -> None:
        """Pass a client's frame on to ingest. Raises BusError."""
        await self._bus.publish(subjects.stream(frame.stream, "push"), frame)

    async def _ask(self, stream: str, command: Command) -> StreamEvent:
        future: asyncio.Future[StreamEvent] = asyncio.get_running_loop().create_future()
        self._waiting[command.command] = future
        try:
            await self._bus.publish(subjects.stream(stream, "control"), command)
            event = await asyncio.wait_for(future, self._settings.answer_timeout_s)
        except TimeoutError:
            raise NoAnswerError("the scheduler did not answer in time; is it running?") from None
        finally:
            self._waiting.pop(command.command, None)
        if event.event is EventKind.REFUSED:
            if event.refusal is Refusal.UNKNOWN:
                raise UnknownPartError(event.reason)
            raise RefusedError(event.reason, event.retry_after_s, event.refusal, event.tier)
        return event

    async def view(self, stream: str) -> StreamView:
        """One stream. Raises UnknownStreamError."""
        session = await self._store.get(stream)
        if session is None:
            raise UnknownStreamError(f"there is no stream {stream}")
        totals, _, _ = await self._store.ledger(stream)
        return view_of(stream, session, totals)

    async def ledger(self, may_see: Callable[[str, str], bool] = lambda _, __: True) -> TotalLedger:
        """What became of every frame of every stream that is known: those under way, and those that ended lately."""
        total, streams = LedgerTotals(), 0
        for stream in await self._store.streams():
            try:
                view = await self.view(stream)
            except UnknownStreamError:
                continue
            if may_see(stream, view.tenant):
                streams += 1
                total = sum_of(total, view.ledger)
        return TotalLedger(streams=streams, closed=total.closed, open=total.frames_in - total.closed, ledger=total)

    async def views(
        self,
        may_see: Callable[[StreamView], bool] = lambda _: True,
        states: Collection[StreamState] | None = None,
        after: str = "",
        limit: int = 1_000_000,
    ) -> list[StreamView]:
        """At most ``limit`` streams, by id, whose id comes after ``after``."""
        found: list[StreamView] = []
        for stream in sorted(await self._store.streams()):
            if stream <= after:
                continue
            try:
                view = await self.view(stream)
            except UnknownStreamError:
                continue  # deleted meanwhile
            if may_see(view) and (not states or view.state in states):
                found.append(view)
                if len(found) >= limit:
                    break
        return found
