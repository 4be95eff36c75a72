"""Recordings of running streams: an MP4 sink in the tenant's folder, added and taken away again."""

from __future__ import annotations

import re
import secrets
import time

from services.gateway.core import RECORDINGS, inside
from services.gateway.errors import ConflictError, UnknownPartError
from services.gateway.settings import Settings
from services.gateway.sink_book import SinkBook
from shared.contracts.sinks import Mp4Sink
from shared.contracts.views import RecordingView, StreamView
from shared.session.port import SessionStore

KEPT_S = 30 * 86_400.0


class Recording:
    """One recording of a stream at a time; which one, knows the session store."""

    def __init__(self, sinks: SinkBook, store: SessionStore, settings: Settings) -> None:
        self._sinks, self._store, self._settings = sinks, store, settings

    async def forget(self, stream: str) -> None:
        """A new stream of this id begins."""
        await self._store.drop_note(_place(stream))

    async def now(self, view: StreamView) -> RecordingView | None:
        """What is being recorded."""
        kept = await self._store.get_note(_place(view.id))
        if kept is None:
            return None
        begun = RecordingView.model_validate(kept)
        # Until it has its command it is being added. One that could not be opened, or broke, is not under way any more.
        if begun.command and all(sink.id != begun.sink for sink in await self._sinks.all(view.id)):
            await self._store.drop_note(_place(view.id))
            return None
        return begun

    async def start(self, view: StreamView, tenant: str) -> RecordingView:
        """Begin. Raises ConflictError when one is under way, RefusedError, NoAnswerError."""
        await self.now(view)  # one that broke must not stand in the way
        mark = secrets.token_hex(3)
        name = f"{view.id}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{mark}.mp4"
        path = inside(self._settings.media_dir, f"{RECORDINGS}/{view.tenant}/{name}")
        sink = Mp4Sink(id=f"rec-{mark}", path=str(path))
        begun = RecordingView(stream=view.id, sink=sink.id, name=name, command="", began_ns=time.time_ns())
        if not await self._store.put_note(_place(view.id), begun.model_dump(), KEPT_S, if_absent=True):
            raise ConflictError(f"stream {view.id} is being recorded already: stop that first")
        try:
            event = await self._sinks.add(view.id, sink, tenant)
        except BaseException:
            await self._store.drop_note(_place(view.id))
            raise
        begun = begun.model_copy(update={"command": event.command})
        await self._store.put_note(_place(view.id), begun.model_dump(), KEPT_S)
        return begun

    async def stop(self, view: StreamView, tenant: str) -> RecordingView:
        """End it; the file is whole once the receipt says applied. Raises UnknownPartError when nothing is recorded."""
        begun = await self.now(view)
        if begun is None:
            raise UnknownPartError(f"stream {view.id} is not being recorded")
        event = await self._sinks.remove(view.id, begun.sink, tenant)
        await self._store.drop_note(_place(view.id))
        return begun.model_copy(update={"command": event.command})


def is_of(name: str, stream: str) -> bool:
    """Whether a recording is of this stream, by its name."""
    return re.fullmatch(re.escape(stream) + r"-\d{8}-\d{6}-[0-9a-f]{6}\.mp4", name) is not None


def _place(stream: str) -> str:
    return f"recording:{stream}"
