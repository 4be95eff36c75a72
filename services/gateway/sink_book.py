"""Which sinks a stream has: those it was started with, and what was added and removed through this API since."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from services.gateway.errors import ConflictError, UnknownPartError
from services.gateway.handlers import Desk
from services.gateway.watching import Watch
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.sinks import Mp4Sink, RtmpSink, Sink, named
from shared.session.port import SessionStore

KEPT_S = 30 * 86_400.0
MAX_SINKS = 16
_SINK: TypeAdapter[Sink] = TypeAdapter(Sink)


class SinkBook:
    """Adds and removes sinks, and remembers it in the session store, so that any gateway can tell."""

    def __init__(self, desk: Desk, store: SessionStore, watch: Watch, media_dir: Path) -> None:
        self._desk, self._store, self._watch, self._media_dir = desk, store, watch, media_dir

    async def of(self, stream: str) -> list[Sink]:
        """The stream's sinks, each with its id, as they may be shown."""
        return [shown(sink, self._media_dir) for sink in await self._all(stream)]

    async def add(self, stream: str, sink: Sink, tenant: str) -> StreamEvent:
        """One more. Raises ConflictError for an id that is taken or too many sinks, RefusedError, NoAnswerError."""
        held = await self._all(stream)
        named = sink if sink.id else sink.model_copy(update={"id": f"{sink.kind}-{secrets.token_hex(3)}"})
        if any(other.id == named.id for other in held):
            raise ConflictError(f"stream {stream} has a sink {named.id} already: give another id, or none")
        if len(held) >= MAX_SINKS:
            raise ConflictError(f"stream {stream} has {MAX_SINKS} sinks: remove one first")
        event = await self._desk.add_sink(stream, named, tenant)
        changes = await self._changes(stream)
        changes["added"].append({"sink": named.model_dump(), "command": event.command})
        changes["removed"] = [name for name in changes["removed"] if name != named.id]
        await self._store.put_note(_place(stream), changes, KEPT_S)
        return event

    async def remove(self, stream: str, name: str, tenant: str) -> StreamEvent:
        """Finish and close one. Raises UnknownPartError, RefusedError, NoAnswerError."""
        if all(sink.id != name for sink in await self._all(stream)):
            raise UnknownPartError(f"stream {stream} has no sink {name[:40]!r}")
        event = await self._desk.remove_sink(stream, name, tenant)
        changes = await self._changes(stream)
        changes["added"] = [each for each in changes["added"] if each["sink"]["id"] != name]
        changes["removed"] = sorted({*changes["removed"], name})
        await self._store.put_note(_place(stream), changes, KEPT_S)
        return event

    async def forget(self, stream: str) -> None:
        """A new stream of this id begins."""
        await self._store.drop_note(_place(stream))

    async def _all(self, stream: str) -> list[Sink]:
        session = await self._store.get(stream)
        changes = await self._changes(stream)
        begun = named(session["spec"].sinks) if session is not None else []
        added = [each["sink"] for each in changes["added"] if not self._failed(stream, each["command"])]
        return [sink for sink in begun if sink.id not in changes["removed"]] + [
            sink for each in added if (sink := _read(each)) is not None
        ]

    def _failed(self, stream: str, command: str) -> bool:
        """It could not be opened: egress told a warning."""
        return any(
            told.event.command == command and told.event.event is EventKind.WARNING
            for told in self._watch.history(stream)
        )

    async def _changes(self, stream: str) -> dict[str, Any]:
        return await self._store.get_note(_place(stream)) or {"added": [], "removed": []}


def shown(sink: Sink, media_dir: Path) -> Sink:
    """A sink without what is nobody's business: where folders are, and the keys that stand in addresses."""
    if isinstance(sink, Mp4Sink):
        path = Path(sink.path)
        root = media_dir.resolve()
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        return sink.model_copy(update={"path": name})
    if isinstance(sink, RtmpSink):
        return sink.model_copy(update={"url": re.sub(r"^(\w+://)(?:[^/@]*@)?([^/]*).*$", r"\1\2/…", sink.url)})
    return sink


def _read(stored: Any) -> Sink | None:
    try:
        return _SINK.validate_python(stored)
    except ValidationError:
        return None  # of another release


def _place(stream: str) -> str:
    return f"sinks:{stream}"
