"""``/v1/streams``: create, list, get, patch, delete."""

from __future__ import annotations

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from services.gateway.core import StreamCreate, StreamView, new_stream_id, spec_of_request
from services.gateway.handlers import Desk
from services.gateway.problems import PROBLEM_RESPONSES
from services.gateway.settings import Settings
from services.gateway.tenancy import Tenant
from shared.contracts.commands import StreamPatch
from shared.contracts.tiers import DEFAULT_TENANT


class Receipt(BaseModel):
    """A command was accepted; ``version`` is the prompt version that will apply."""

    stream: str
    command: str
    version: int


class Move(BaseModel):
    """Body of ``POST /v1/streams/{id}/migrate``: where to; without ``pipeline`` the one with the least load is taken."""

    pipeline: str = Field(default="", max_length=64)


class StreamList(BaseModel):
    """All streams."""

    streams: list[StreamView]


def router(desk: Desk, settings: Settings) -> APIRouter:
    """The routes, bound to a desk."""
    api = APIRouter(prefix="/v1/streams", tags=["streams"], responses=PROBLEM_RESPONSES)

    @api.post("", status_code=201, operation_id="createStream")
    async def create(body: StreamCreate, response: Response, tenant: Tenant = DEFAULT_TENANT) -> StreamView:
        """Start a stream. Paths of file sources and MP4 sinks are relative to the media folder.

        201 comes with what it may count on; 429 and 503 with Retry-After and, if there is one, the tier that would fit.
        """
        stream = body.id or new_stream_id()
        await desk.create(stream, spec_of_request(body, settings.media_dir, tenant))
        response.headers["Location"] = f"/v1/streams/{stream}"
        return await desk.view(stream)

    @api.get("", operation_id="listStreams")
    async def list_streams() -> StreamList:
        """All streams; those that ended are listed for another hour, then they expire."""
        return StreamList(streams=await desk.views())

    @api.get("/{stream}", operation_id="getStream")
    async def get(stream: str) -> StreamView:
        """One stream with its ledger."""
        return await desk.view(stream)

    @api.patch("/{stream}", status_code=202, operation_id="patchStream")
    async def patch(stream: str, body: StreamPatch, tenant: Tenant = DEFAULT_TENANT) -> Receipt:
        """Change prompt, steps, noise, seed, T or pause at the next chunk boundary; an applied event names the chunk."""
        event = await desk.patch(stream, body, tenant)
        return Receipt(stream=stream, command=event.command, version=event.version)

    @api.post("/{stream}/pause", status_code=202, operation_id="pauseStream")
    async def pause(stream: str, tenant: Tenant = DEFAULT_TENANT) -> Receipt:
        """Take no further chunk; the picture stands. An applied event names the last one before the pause."""
        event = await desk.patch(stream, StreamPatch(paused=True), tenant)
        return Receipt(stream=stream, command=event.command, version=event.version)

    @api.post("/{stream}/resume", status_code=202, operation_id="resumeStream")
    async def resume(stream: str, tenant: Tenant = DEFAULT_TENANT) -> Receipt:
        """Go on; an applied event names the first chunk."""
        event = await desk.patch(stream, StreamPatch(paused=False), tenant)
        return Receipt(stream=stream, command=event.command, version=event.version)

    @api.post("/{stream}/migrate", status_code=202, operation_id="migrateStream")
    async def migrate(stream: str, body: Move | None = None) -> Receipt:
        """Go on on another pipeline, pixel for pixel. A migrated event names the first chunk made there, a warning says why
        the stream stayed."""
        event = await desk.migrate(stream, body.pipeline if body is not None else "")
        return Receipt(stream=stream, command=event.command, version=event.version)

    @api.delete("/{stream}", status_code=202, operation_id="deleteStream")
    async def delete(stream: str, drain: bool = Query(default=True), tenant: Tenant = DEFAULT_TENANT) -> Receipt:
        """Stop a stream; ``drain`` finishes the chunks under way first."""
        event = await desk.stop(stream, drain, tenant)
        return Receipt(stream=stream, command=event.command, version=event.version)

    return api
