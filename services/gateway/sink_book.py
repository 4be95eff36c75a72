"""Which sinks a stream has: as the scheduler keeps them in the session, whoever added and removed them."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from services.gateway.errors import ConflictError, UnknownPartError
from services.gateway.handlers import Desk
from services.gateway.watching import Watch
from shared.contracts.events import StreamEvent
from shared.contracts.sinks import Mp4Sink, RtmpSink, Sink, SinkFigures, kept_sinks
from shared.session.port import SessionStore

MAX_SINKS = 16


class SinkBook:
    """Adds and removes sinks, and tells which there are and how they fare."""

    def __init__(self, desk: Desk, store: SessionStore, watch: Watch, media_dir: Path) -> None:
        self._desk, self._store, self._watch, self._media_dir = desk, store, watch, media_dir

    async def of(self, stream: str) -> list[Sink]:
        """The stream's sinks, each with its id, as they may be shown."""
        return [shown(sink, self._media_dir) for sink in await self.all(stream)]

    async def add(self, stream: str, sink: Sink, tenant: str) -> StreamEvent:
        """One more. Raises ConflictError for an id that is taken or too many sinks, RefusedError, NoAnswerError."""
        held = await self.all(stream)
        named = sink if sink.id else sink.model_copy(update={"id": f"{sink.kind}-{secrets.token_hex(3)}"})
        if any(other.id == named.id for other in held):
            raise ConflictError(f"stream {stream} has a sink {named.id} already: give another id, or none")
        if len(held) >= MAX_SINKS:
            raise ConflictError(f"stream {stream} has {MAX_SINKS} sinks: remove one first")
        return await self._desk.add_sink(stream, named, tenant)

    async def remove(self, stream: str, name: str, tenant: str) -> StreamEvent:
        """Finish and close one. Raises UnknownPartError, RefusedError, NoAnswerError."""
        if all(sink.id != name for sink in await self.all(stream)):
            raise UnknownPartError(f"stream {stream} has no sink {name[:40]!r}")
        return await self._desk.remove_sink(stream, name, tenant)

    async def figures(self, stream: str) -> list[SinkFigures]:
        """How the sinks that it has fare; of one that was just added nothing may have been told yet."""
        there = {sink.id for sink in await self.all(stream)}
        return [told for told in self._watch.sinks(stream) if told.id in there]

    async def all(self, stream: str) -> tuple[Sink, ...]:
        """The stream's sinks, each with its id, as they are."""
        session = await self._store.get(stream)
        return () if session is None else kept_sinks(session["spec"].sinks, session.get("destinations"))


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
