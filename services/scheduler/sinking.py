"""Sinks of running streams, added and removed: checked here, carried out by egress, which answers with the chunk."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from services.scheduler.messenger import Messenger
from services.scheduler.records import Phase, StreamRecord
from shared.bus.port import Bus, BusError
from shared.contracts import subjects
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.sinks import AddSink, ChangeSinks, RemoveSink, Sink, named
from shared.session.port import NoSuchStreamError, SessionStore, StoreError
from shared.session.state import Owner

log = logging.getLogger(__name__)

MAX_SINKS = 16


class Sinking:
    """The sinks a stream has now stand in its record's spec and in its session: an egress that takes it anew opens those."""

    def __init__(
        self, bus: Bus, store: SessionStore, messenger: Messenger, records: Mapping[str, StreamRecord]
    ) -> None:
        self._bus, self._store, self._messenger, self._records = bus, store, messenger, records

    async def change(self, command: AddSink | RemoveSink) -> None:
        """Answers accepted or refused; egress then tells applied, or a warning with this command."""
        record = self._records.get(command.stream)
        if record is None or record.phase not in (Phase.RUNNING, Phase.RECOVERING):
            await self._refuse(command, f"stream {command.stream} is not running")
            return
        if command.tenant and command.tenant != record.spec.tenant:
            await self._refuse(command, f"stream {command.stream} is another tenant's")
            return
        sinks = named(record.spec.sinks)
        if isinstance(command, AddSink):
            refused = cannot_add(command.sink, sinks)
            sinks = (*sinks, command.sink)
        else:
            known = any(sink.id == command.sink for sink in sinks)
            refused = "" if known else f"stream {command.stream} has no sink {command.sink!r}"
            sinks = tuple(sink for sink in sinks if sink.id != command.sink)
        if refused:
            await self._refuse(command, refused)
            return
        added = {command.sink.id} if isinstance(command, AddSink) else set[str]()
        await self._has(record, sinks, record.added_sinks | added)  # who is told "accepted" may look at once
        await self._messenger.tell(command.stream, EventKind.ACCEPTED, command=command.command)
        message = ChangeSinks(
            instance=record.egress,
            stream=command.stream,
            epoch=record.epoch,
            command=command.command,
            add=command.sink if isinstance(command, AddSink) else None,
            remove="" if isinstance(command, AddSink) else command.sink,
        )
        try:
            await self._bus.publish(subjects.assign("egress"), message)
        except BusError as error:
            await self._messenger.tell(
                command.stream, EventKind.WARNING, reason=f"egress was not told: {error}", command=command.command
            )

    async def on_gone(self, event: StreamEvent) -> None:
        """Egress could not open it, or it broke for good: its place is free."""
        record = self._records.get(event.stream)
        if record is None or not record.tells(event.epoch):
            return
        sinks = named(record.spec.sinks)
        left = tuple(sink for sink in sinks if sink.id != event.sink)
        if len(left) < len(sinks):
            await self._has(record, left, record.added_sinks)

    async def _has(self, record: StreamRecord, sinks: tuple[Sink, ...], added: set[str]) -> None:
        record.spec = record.spec.model_copy(update={"sinks": sinks})
        record.added_sinks = added & {sink.id for sink in sinks}
        try:
            kept = [sink.model_dump() for sink in sinks]
            await self._store.put(record.stream, Owner.SCHEDULER, {"destinations": kept})
        except (NoSuchStreamError, StoreError) as error:
            log.warning("stream %s: where it goes was not kept: %s", record.stream, error)

    async def _refuse(self, command: AddSink | RemoveSink, reason: str) -> None:
        await self._messenger.tell(command.stream, EventKind.REFUSED, reason=reason, command=command.command)


def cannot_add(sink: Sink, sinks: tuple[Sink, ...]) -> str:
    """Why not, "" when nothing speaks against it."""
    if not sink.id:
        return "a sink that is added needs an id"
    if any(other.id == sink.id for other in sinks):
        return f"there is a sink {sink.id} already: give another id"
    if len(sinks) >= MAX_SINKS:
        return f"a stream has at most {MAX_SINKS} sinks: remove one first"
    if sink.kind in ("hls", "whep") and any(other.kind == sink.kind for other in sinks):
        return f"the stream has a sink of kind {sink.kind} already"
    return ""
