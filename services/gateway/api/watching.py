"""``/v1/streams/{id}/…``: events, receipts, stats, ledger, chunks, traces, share links."""

from __future__ import annotations

from collections.abc import AsyncIterable

from fastapi import APIRouter, Depends, Header
from fastapi.exceptions import HTTPException
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field

from services.gateway.access import Seen, StreamId, Who
from services.gateway.chunks import ChunkList, Chunks
from services.gateway.errors import InvalidError, UnknownPartError
from services.gateway.problems import PROBLEM_RESPONSES
from services.gateway.settings import Settings
from services.gateway.shares import Shares, ShareView
from services.gateway.watching import ENDS, Watch, since
from shared.contracts.events import LedgerTotals
from shared.contracts.views import LiveStats, ReceiptView, StatsView, StreamView, TraceList
from shared.session.state import TERMINAL_STATES, StreamState


class LedgerView(BaseModel):
    """What became of every frame. ``open`` are under way; ``balanced``: every frame has exactly one verdict."""

    stream: str
    ledger: LedgerTotals
    open: int
    balanced: bool


class ShareAsked(BaseModel):
    """How long a link lasts, in seconds."""

    lasts_s: float = Field(default=86_400.0, ge=10.0, le=365 * 86_400.0, allow_inf_nan=False)


class ShareList(BaseModel):
    """A stream's links; their tokens were told when they were made."""

    shares: list[ShareView]


def router(watch: Watch, chunks: Chunks, shares: Shares, settings: Settings, seen: Seen) -> APIRouter:
    """The routes, bound to who knows."""
    api = APIRouter(prefix="/v1/streams/{stream}", tags=["watching"], responses=PROBLEM_RESPONSES)
    found, changing = Depends(seen), Depends(seen.change)
    last_id = Header(
        default=None, alias="Last-Event-ID", max_length=128, description="The last event that was seen: go on after it."
    )

    async def to_follow(view: StreamView = found, after: str | None = last_id) -> StreamView:
        """204 tells a browser not to come back: nothing follows any more."""
        history = watch.history(view.id)
        ended = StreamState(view.state) in TERMINAL_STATES
        if ended and (after is None or not since(history, after)):
            raise HTTPException(204)
        return view

    @api.get(
        "/events",
        operation_id="streamEvents",
        response_class=EventSourceResponse,
        responses={204: {"description": "The stream has ended and everything was told."}},
    )
    async def events(
        stream: StreamId, _: StreamView = Depends(to_follow), after: str | None = last_id
    ) -> AsyncIterable[ServerSentEvent]:
        """What happens to the stream, as server-sent events named by their kind, and once a second ``stats``.

        ``Last-Event-ID`` resumes from a bounded history. A client that takes them too slowly is let go and may resume.
        """
        async for told in watch.follow(stream, after):
            if isinstance(told, LiveStats):
                yield ServerSentEvent(event="stats", data=told)
            else:
                yield ServerSentEvent(event=told.event.event.value, id=told.id, data=told.event)
                if told.event.event in ENDS:
                    return

    @api.get("/receipts/{command}", operation_id="getReceipt")
    async def receipt(stream: StreamId, command: str, _: StreamView = found) -> ReceiptView:
        """What became of a command: accepted, then applied with the chunk and pts from which it is in force."""
        return watch.receipt(stream, command)

    @api.get("/stats", operation_id="getStats")
    async def stats(view: StreamView = found) -> StatsView:
        """How it runs now: frames a second, latency, the share that is on time; and how its sinks fare."""
        return StatsView(
            stream=view.id, state=view.state, live=watch.stats(view.id), total=view.stats, sinks=watch.sinks(view.id)
        )

    @api.get("/ledger", operation_id="getStreamLedger")
    async def ledger(view: StreamView = found) -> LedgerView:
        """What became of every frame of the stream."""
        under_way = view.ledger.frames_in - view.ledger.closed
        return LedgerView(stream=view.id, ledger=view.ledger, open=max(0, under_way), balanced=under_way == 0)

    @api.get("/chunks", operation_id="listChunks")
    async def list_chunks(view: StreamView = found) -> ChunkList:
        """Where each millisecond of the last 50 chunks went. They are heard from the first question on."""
        return await chunks.of(view.id)

    @api.get("/trace", operation_id="getTrace")
    async def trace(caller: Who, view: StreamView = found) -> TraceList:
        """The way of the last 50 chunks, hop by hop, from capture to verdict. They are heard from the first question on.

        The figures are those of their spans. ``jaeger_url`` is for who is not here by a share link: Jaeger shows every stream.
        """
        return await chunks.traces(view.id, "" if caller.stream else settings.jaeger_url)

    @api.post("/shares", status_code=201, operation_id="createShare")
    async def share(view: StreamView = changing, body: ShareAsked | None = None) -> ShareView:
        """A link that shows this stream and nothing else, for a time. Its token is told here and never again."""
        lasts_s = (body or ShareAsked()).lasts_s
        if lasts_s > settings.share_max_s:
            raise InvalidError(f"lasts_s: a link lasts at most {settings.share_max_s:g} s here")
        return await shares.make(view.id, view.tenant, lasts_s)

    @api.get("/shares", operation_id="listShares")
    async def list_shares(view: StreamView = changing) -> ShareList:
        """The links that are in force."""
        return ShareList(shares=await shares.of(view.id))

    @api.delete("/shares/{share}", status_code=204, operation_id="revokeShare")
    async def revoke(share: str, view: StreamView = changing) -> None:
        """Take a link back: within a second or two it is worth nothing."""
        if not await shares.revoke(view.id, share):
            raise UnknownPartError(f"stream {view.id} has no share link {share[:64]!r}")

    return api
