"""``/v1/streams``: create, list, get, patch, pause, resume, reset, migrate, delete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, Field

from services.gateway.access import Admin, Operator, Seen, StreamId, Tenant, Viewer
from services.gateway.core import StreamCreate, new_stream_id, spec_of_request
from services.gateway.handlers import Desk
from services.gateway.idempotency import Idempotency, IdempotencyKey
from services.gateway.problems import PROBLEM_RESPONSES
from services.gateway.settings import Settings
from shared.contracts.commands import StreamPatch
from shared.contracts.events import StreamEvent
from shared.contracts.views import Receipt, StreamView
from shared.session.state import StreamState

EXAMPLE_CREATE = {
    "pencil": {
        "summary": "A test pattern as a pencil drawing",
        "value": {"source": {"kind": "pattern"}, "prompt": "a pencil drawing", "width": 320, "height": 192, "fps": 12},
    },
    "camera": {
        "summary": "A browser's camera by WHIP, seen by WHEP",
        "value": {"source": {"kind": "whip"}, "sinks": [{"kind": "whep"}], "prompt": "neon lights", "steps": 1},
    },
}
EXAMPLE_PATCH = {
    "prompt": {
        "summary": "A prompt that fades in",
        "value": {"prompt": "neon lights, glowing lines", "blend_chunks": 6},
    },
    "steps": {"summary": "Finer", "value": {"steps": 3}},
}


def receipt(event: StreamEvent) -> Receipt:
    """What a client gets for an accepted command."""
    return Receipt(stream=event.stream, command=event.command, version=event.version)


class Move(BaseModel):
    """Body of ``POST /v1/streams/{id}/migrate``: where to; without ``pipeline`` the one with the least load is taken."""

    pipeline: str = Field(default="", max_length=64)


class StreamList(BaseModel):
    """Streams by id. ``next`` is what ``after`` is for the next page; null on the last one."""

    streams: list[StreamView]
    next: str | None = None


def router(desk: Desk, settings: Settings, seen: Seen, once: Idempotency) -> APIRouter:
    """The routes, bound to a desk."""
    api = APIRouter(prefix="/v1/streams", tags=["streams"], responses=PROBLEM_RESPONSES)
    found, changing = Depends(seen), Depends(seen.change)

    @api.post("", status_code=201, operation_id="createStream", openapi_extra=_examples(EXAMPLE_CREATE))
    async def create(
        body: StreamCreate, response: Response, tenant: Tenant, caller: Operator, key: IdempotencyKey = None
    ) -> StreamView:
        """Start a stream. Paths of file sources and MP4 sinks are relative to the media folder.

        201 comes with what it may count on; 429 and 503 with Retry-After and, if there is one, the tier that would fit.
        """

        async def make() -> dict[str, object]:
            stream = body.id or new_stream_id()
            spec = spec_of_request(body, settings.media_dir, tenant, anywhere=caller.open, rules=settings.address_rules)
            await desk.create(stream, spec)
            return (await desk.view(stream)).model_dump(mode="json")

        view = StreamView.model_validate(await once.once(tenant, key, body.model_dump(mode="json"), make))
        response.headers["Location"] = f"/v1/streams/{view.id}"
        return view

    @api.get("", operation_id="listStreams")
    async def list_streams(
        caller: Viewer,
        state: Annotated[
            list[StreamState] | None, Query(max_length=7, description="Only streams in these states.")
        ] = None,
        after: Annotated[str, Query(max_length=64, description="Only streams whose id comes after this one.")] = "",
        limit: Annotated[int, Query(ge=1, le=500)] = 100,
    ) -> StreamList:
        """Streams by id, a page at a time; those that ended are listed for another hour, then they expire."""
        views = await desk.views(lambda view: caller.may_see(view.id, view.tenant), state, after, limit + 1)
        return StreamList(streams=views[:limit], next=views[limit - 1].id if len(views) > limit else None)

    @api.get("/{stream}", operation_id="getStream")
    async def get(view: StreamView = found) -> StreamView:
        """One stream with its ledger."""
        return view

    @api.patch("/{stream}", status_code=202, operation_id="patchStream", openapi_extra=_examples(EXAMPLE_PATCH))
    async def patch(stream: StreamId, body: StreamPatch, tenant: Tenant, _: StreamView = changing) -> Receipt:
        """Change prompt, steps, noise, seed, T, rate, size, pause at the next chunk boundary; an applied event names it."""
        return receipt(await desk.patch(stream, body, tenant))

    @api.post("/{stream}/pause", status_code=202, operation_id="pauseStream")
    async def pause(stream: StreamId, tenant: Tenant, _: StreamView = changing) -> Receipt:
        """Take no further chunk; the picture stands. An applied event names the last one before the pause."""
        return receipt(await desk.patch(stream, StreamPatch(paused=True), tenant))

    @api.post("/{stream}/resume", status_code=202, operation_id="resumeStream")
    async def resume(stream: StreamId, tenant: Tenant, _: StreamView = changing) -> Receipt:
        """Go on; an applied event names the first chunk."""
        return receipt(await desk.patch(stream, StreamPatch(paused=False), tenant))

    @api.post("/{stream}/reset", status_code=202, operation_id="resetStream")
    async def reset(stream: StreamId, tenant: Tenant, _: StreamView = changing) -> Receipt:
        """Forget what is cached: the next block is a first block again. An applied event names its first chunk."""
        return receipt(await desk.patch(stream, StreamPatch(reset=True), tenant))

    @api.post("/{stream}/migrate", status_code=202, operation_id="migrateStream")
    async def migrate(stream: StreamId, caller: Admin, body: Move | None = None) -> Receipt:
        """Go on on another pipeline, pixel for pixel. A migrated event names the first chunk made there, a warning says why
        the stream stayed."""
        return receipt(await desk.migrate(stream, body.pipeline if body is not None else ""))

    @api.delete("/{stream}", status_code=202, operation_id="deleteStream")
    async def delete(
        stream: StreamId, tenant: Tenant, _: StreamView = changing, drain: bool = Query(default=True)
    ) -> Receipt:
        """Stop a stream; ``drain`` finishes the chunks under way first."""
        return receipt(await desk.stop(stream, drain, tenant))

    return api


def _examples(examples: Mapping[str, object]) -> dict[str, object]:
    return {"requestBody": {"content": {"application/json": {"examples": examples}}}}
