"""Timelines: prompts that come one after the other by themselves. Kept in the session store, played by one gateway.

A gateway that plays one holds its lease; when it dies another goes on within seconds, from the entry that is due then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.gateway.errors import ConflictError, NoAnswerError, RefusedError, UnknownPartError, UnknownStreamError
from services.gateway.handlers import Desk
from services.gateway.watching import Watch
from shared.bus.port import BusError
from shared.contracts.commands import MAX_PROMPT_CHARS, MAX_PROMPT_PARTS, PromptPart, StreamPatch
from shared.contracts.views import StreamView
from shared.session.port import SessionStore, StoreError
from shared.session.state import TERMINAL_STATES

log = logging.getLogger(__name__)

MAX_ENTRIES = 64
KEPT_S = 30 * 86_400.0
LEASE_S = 5.0
LOOK_S = 2.0  # how often timelines are looked for that nobody plays any more
TICK_S = 0.05


class Entry(BaseModel):
    """One prompt, ``at_s`` seconds after the beginning or once the stream's chunk ``at_chunk`` is shown."""

    model_config = ConfigDict(extra="forbid")

    at_s: float | None = Field(default=None, ge=0.0, le=86_400.0)
    at_chunk: int | None = Field(default=None, ge=0, le=2**40)
    prompt: str | None = Field(default=None, max_length=MAX_PROMPT_CHARS)
    prompts: tuple[PromptPart, ...] = Field(default=(), max_length=MAX_PROMPT_PARTS)
    blend_chunks: int = Field(default=0, ge=0, le=64)
    recache: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Entry:
        if (self.at_s is None) == (self.at_chunk is None):
            raise ValueError("give at_s or at_chunk, one of them")
        if self.prompt is None and not self.prompts:
            raise ValueError("give a prompt, or prompts with weights")
        self.patch()
        return self

    def patch(self) -> StreamPatch:
        """The change that it is."""
        return StreamPatch(
            prompt=self.prompt, prompts=self.prompts, blend_chunks=self.blend_chunks, recache=self.recache
        )


class Timeline(BaseModel):
    """Up to 64 entries in their order. ``loop_s``: begun again so many seconds after its beginning."""

    model_config = ConfigDict(extra="forbid")

    entries: tuple[Entry, ...] = Field(min_length=1, max_length=MAX_ENTRIES)
    loop_s: float | None = Field(default=None, ge=0.5, le=86_400.0)

    @model_validator(mode="after")
    def _in_order(self) -> Timeline:
        for name in ("at_s", "at_chunk"):
            times = [at for entry in self.entries if (at := getattr(entry, name)) is not None]
            if times != sorted(times):
                raise ValueError(f"the entries must be in the order of their {name}")
        if self.loop_s is not None and any(entry.at_s is None or entry.at_s >= self.loop_s for entry in self.entries):
            raise ValueError("a loop takes entries with at_s below loop_s only")
        return self


class TimelineView(Timeline):
    """A timeline and how it stands: ``next`` is the entry that comes; ``error`` why one was not taken."""

    entries: tuple[Entry, ...] = ()
    playing: bool = False
    next: int = 0
    began_ns: int = 0
    error: str = ""


class Play(BaseModel):
    """From which entry to begin: at once."""

    entry: int = Field(default=0, ge=0, lt=MAX_ENTRIES)


class Timelines:
    """All streams' timelines, and those that this gateway plays."""

    def __init__(self, desk: Desk, store: SessionStore, watch: Watch, holder: str) -> None:
        self._desk, self._store, self._watch, self._holder = desk, store, watch, holder
        self._players: dict[str, asyncio.Task[None]] = {}
        self._finder: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look for timelines that nobody plays any more."""
        self._finder = asyncio.create_task(self._find(), name="timelines")

    async def close(self) -> None:
        """Stop playing; another gateway goes on."""
        tasks = [*self._players.values(), *([self._finder] if self._finder is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what is asked -----------------------------------------------------------------------------------------------

    async def get(self, stream: str) -> TimelineView:
        """The stream's timeline. Raises UnknownPartError when it has none."""
        kept = await self._store.get_note(_place(stream))
        if kept is None:
            raise UnknownPartError(f"stream {stream} has no timeline")
        return TimelineView.model_validate(kept)

    async def put(self, stream: str, timeline: Timeline) -> TimelineView:
        """In place of the one before, which stops."""
        view = TimelineView(entries=timeline.entries, loop_s=timeline.loop_s)
        await self._keep(stream, view)
        return view

    async def forget(self, stream: str) -> bool:
        """Without one, from now on; whether there was one."""
        return await self._store.drop_note(_place(stream))

    async def play(self, view: StreamView, entry: int) -> TimelineView:
        """Begin at an entry. Raises ConflictError when the stream has ended, UnknownPartError."""
        timeline = await self.get(view.id)
        if view.state in TERMINAL_STATES:
            raise ConflictError(f"stream {view.id} has ended")
        if entry >= len(timeline.entries):
            raise UnknownPartError(f"the timeline has {len(timeline.entries)} entries, the first is 0")
        offset_ns = int((timeline.entries[entry].at_s or 0.0) * 1e9)
        playing = timeline.model_copy(
            update={"playing": True, "next": entry, "began_ns": time.time_ns() - offset_ns, "error": ""}
        )
        await self._keep(view.id, playing)
        await self._take(view.id)
        return playing

    async def stop(self, stream: str) -> TimelineView:
        """Play no further; what is shown stays."""
        stopped = (await self.get(stream)).model_copy(update={"playing": False})
        await self._keep(stream, stopped)
        return stopped

    async def _keep(self, stream: str, view: TimelineView) -> None:
        await self._store.put_note(_place(stream), view.model_dump(), KEPT_S)

    # --- playing -----------------------------------------------------------------------------------------------------

    async def _find(self) -> None:
        while True:
            try:
                for place in await self._store.notes(_place("")):
                    stream = place.partition(":")[2]
                    if stream not in self._players and (await self._now(stream)).playing:
                        await self._take(stream)
            except StoreError as error:
                log.warning("timelines are not looked for: %s", error)
            await asyncio.sleep(LOOK_S)

    async def _take(self, stream: str) -> None:
        """Play it here, unless somebody does."""
        if stream in self._players:
            return
        term = await self._store.acquire(f"timeline:{stream}", self._holder, LEASE_S)
        if term is None or stream in self._players:
            return
        task = asyncio.create_task(self._play(stream, term), name=f"timeline-{stream}")
        self._players[stream] = task
        task.add_done_callback(lambda _: self._players.pop(stream, None))

    async def _play(self, stream: str, term: int) -> None:
        lease, renewed = f"timeline:{stream}", time.monotonic()
        try:
            while (view := await self._now(stream)).playing:
                if time.monotonic() - renewed > LEASE_S / 3:
                    if not await self._store.renew(lease, self._holder, term, LEASE_S):
                        return  # another gateway plays it
                    renewed = time.monotonic()
                await self._step(stream, view)
                await asyncio.sleep(TICK_S)
        except UnknownStreamError:
            await self._end(stream)
        except (StoreError, BusError) as error:
            log.warning("the timeline of stream %s pauses: %s", stream, error)
        finally:
            await asyncio.shield(self._store.release(lease, self._holder, term))

    async def _step(self, stream: str, view: TimelineView) -> None:
        """Send what is due: of several that are overdue the newest."""
        now_ns, chunk = time.time_ns(), self._watch.chunk(stream)
        due = due_entry(view, now_ns, chunk)
        if due < 0:
            if view.next >= len(view.entries) and view.loop_s is None:
                await self._end(stream)
            elif view.next >= len(view.entries) and now_ns - view.began_ns >= (view.loop_s or 0.0) * 1e9:
                again = {"next": 0, "began_ns": view.began_ns + int((view.loop_s or 0.0) * 1e9)}
                await self._keep_playing(stream, view, again)
            return
        shown = await self._desk.view(stream)
        if shown.state in TERMINAL_STATES:
            await self._end(stream)
            return
        error = ""
        try:
            await self._desk.patch(stream, view.entries[due].patch(), shown.tenant)
        except (RefusedError, NoAnswerError) as refused:
            if isinstance(refused, RefusedError) and refused.retry_after_s > 0:
                return  # at the next tick
            error = f"entry {due}: {refused}"
        await self._keep_playing(stream, view, {"next": due + 1, "error": error})

    async def _keep_playing(self, stream: str, view: TimelineView, changes: dict[str, Any]) -> None:
        """Unless it was stopped, replaced or begun anew meanwhile."""
        now = await self._now(stream)
        if now.playing and (now.began_ns, now.entries) == (view.began_ns, view.entries):
            await self._keep(stream, now.model_copy(update=changes))

    async def _end(self, stream: str) -> None:
        now = await self._now(stream)
        if now.playing:
            await self._keep(stream, now.model_copy(update={"playing": False}))

    async def _now(self, stream: str) -> TimelineView:
        kept = await self._store.get_note(_place(stream))
        try:
            return TimelineView() if kept is None else TimelineView.model_validate(kept)
        except ValidationError:
            return TimelineView()  # of another release


def due_entry(view: TimelineView, now_ns: int, chunk: int) -> int:
    """The newest entry that is due, of those from ``next`` on; −1 when none is."""
    due = -1
    for index in range(view.next, len(view.entries)):
        entry = view.entries[index]
        if entry.at_s is not None:
            reached = now_ns - view.began_ns >= entry.at_s * 1e9
        else:
            reached = entry.at_chunk is not None and chunk >= entry.at_chunk
        if not reached:
            break
        due = index
    return due


def _place(stream: str) -> str:
    return f"timeline:{stream}"
