"""``/v1/streams/{id}/sinks`` and ``…/record``: where the result goes, changed while it runs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Path
from fastapi.openapi.models import Example
from pydantic import BaseModel, Field

from services.gateway.access import Operator, Seen, StreamId, Tenant
from services.gateway.api.streams import receipt
from services.gateway.core import sink_of_request
from services.gateway.errors import UnknownPartError
from services.gateway.files import Folder
from services.gateway.problems import PROBLEM_RESPONSES
from services.gateway.recording import Recording, is_of
from services.gateway.settings import Settings
from services.gateway.sink_book import SinkBook
from shared.contracts.sinks import SINK_ID_PATTERN, Sink, SinkFigures
from shared.contracts.views import FileView, Receipt, RecordingView, StreamView

EXAMPLES: dict[str, Example] = {
    "hls": {"summary": "HLS for many viewers", "value": {"kind": "hls", "segment_s": 1.0}},
    "rtmp": {"summary": "A push to a platform", "value": {"kind": "rtmp", "url": "rtmp://live.example.com/app/key"}},
    "whep": {"summary": "WebRTC viewers", "value": {"kind": "whep"}},
}


class StreamRecording(FileView):
    """A recording of a stream; ``recording``: it is not finished."""

    recording: bool


class StreamRecordings(BaseModel):
    """The oldest first."""

    recordings: list[StreamRecording]


class SinkList(BaseModel):
    """A stream's sinks. ``figures``: how each fares, as told a second ago. ``recording``: the one that ``…/record`` added."""

    sinks: list[Sink]
    figures: list[SinkFigures] = Field(default_factory=list[SinkFigures])
    recording: RecordingView | None = None


def router(book: SinkBook, recording: Recording, recorded: Folder, settings: Settings, seen: Seen) -> APIRouter:
    """The routes, bound to a desk."""
    api = APIRouter(prefix="/v1/streams/{stream}", tags=["sinks"], responses=PROBLEM_RESPONSES)
    found, changing = Depends(seen), Depends(seen.change)

    @api.get("/sinks", operation_id="listSinks")
    async def list_sinks(view: StreamView = found) -> SinkList:
        """Where the result goes now."""
        return SinkList(
            sinks=await book.of(view.id), figures=await book.figures(view.id), recording=await recording.now(view)
        )

    @api.post("/sinks", status_code=202, operation_id="addSink")
    async def add(
        stream: StreamId,
        tenant: Tenant,
        caller: Operator,
        body: Annotated[Sink, Body(openapi_examples=EXAMPLES)],
        _: StreamView = changing,
    ) -> Receipt:
        """One more sink; an applied event names the first chunk that it gets, a warning says why it could not be opened."""
        sink = sink_of_request(body, settings.media_dir, tenant, caller.open, settings.address_rules)
        return receipt(await book.add(stream, sink, tenant))

    @api.delete("/sinks/{sink}", status_code=202, operation_id="removeSink")
    async def remove(
        stream: StreamId,
        tenant: Tenant,
        sink: Annotated[str, Path(pattern=SINK_ID_PATTERN, min_length=1, examples=["hls-1"])],
        _: StreamView = changing,
    ) -> Receipt:
        """Finish and close one sink."""
        return receipt(await book.remove(stream, sink, tenant))

    @api.get("/record", operation_id="getRecordingNow")
    async def recorded_now(view: StreamView = found) -> RecordingView:
        """What is being recorded; 404 when nothing is."""
        now = await recording.now(view)
        if now is None:
            raise UnknownPartError(f"stream {view.id} is not being recorded")
        return now

    @api.get("/recordings", operation_id="listStreamRecordings")
    async def recordings(view: StreamView = found) -> StreamRecordings:
        """What was recorded of this stream by ``…/record``; download it at ``/v1/recordings/{name}``."""
        now = await recording.now(view)
        files = (await recorded.list(view.tenant)).files
        return StreamRecordings(
            recordings=[
                StreamRecording(**file.model_dump(), recording=now is not None and now.name == file.name)
                for file in reversed(files)
                if is_of(file.name, view.id)
            ]
        )

    @api.post("/record", status_code=202, operation_id="startRecording")
    async def start(tenant: Tenant, view: StreamView = changing) -> RecordingView:
        """Record to an MP4 in ``recordings/<tenant>/``; it plays even after a crash."""
        return await recording.start(view, tenant)

    @api.delete("/record", status_code=202, operation_id="stopRecording")
    async def stop(tenant: Tenant, view: StreamView = changing) -> RecordingView:
        """Finish the recording; the file is whole once the receipt of ``command`` says applied."""
        return await recording.stop(view, tenant)

    return api
