"""``/v1/uploads`` and ``/v1/recordings``: a tenant's files."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Request
from fastapi.responses import FileResponse, Response

from services.gateway.access import Operator, Tenant, Viewer
from services.gateway.files import NAME, FileList, FileView, Folder, Uploads
from services.gateway.problems import responses

FileName = Annotated[str, Path(pattern=NAME, examples=["walk-3f9a.mp4"])]
_BINARY = {"schema": {"type": "string", "format": "binary"}}
DOWNLOAD = {
    200: {"description": "The file.", "content": {"video/mp4": _BINARY}},
    206: {"description": "The part that Range asked for.", "content": {"video/mp4": _BINARY}},
}


def router(uploads: Uploads, taken: Folder, recorded: Folder) -> APIRouter:
    """The routes, bound to the folders."""
    api = APIRouter(prefix="/v1", tags=["files"], responses=responses(404))

    @api.post(
        "/uploads",
        status_code=201,
        operation_id="upload",
        responses=responses(404, 408),
        openapi_extra={"requestBody": {"required": True, "content": {"application/octet-stream": _BINARY}}},
    )
    async def upload(
        request: Request,
        tenant: Tenant,
        _: Operator,
        name: Annotated[str, Query(max_length=255, examples=["walk.mp4"])] = "",
        named: Annotated[str, Header(alias="X-Upload-Name", max_length=255, examples=["walk.mp4"])] = "",
        announced: Annotated[int | None, Header(alias="Content-Length", ge=0, include_in_schema=False)] = None,
    ) -> FileView:
        """Send a video or a picture as the body; its ``path`` is what a file source names.

        413: too large. 408: nothing came for half a minute. 429: you send several already.
        """
        return await uploads.take(tenant, name or named, announced, request.stream())

    @api.get("/uploads", operation_id="listUploads")
    async def list_uploads(tenant: Tenant, _: Viewer) -> FileList:
        """Your uploads, the newest first."""
        return await uploads.list(tenant)

    @api.delete("/uploads/{name}", status_code=204, operation_id="deleteUpload")
    async def delete_upload(name: FileName, tenant: Tenant, _: Operator) -> None:
        """Forget an upload. A stream that reads it goes on."""
        await taken.delete(tenant, name)

    @api.get("/recordings", operation_id="listRecordings")
    async def list_recordings(tenant: Tenant, _: Viewer) -> FileList:
        """Your recordings, the newest first; one under way grows."""
        return await recorded.list(tenant)

    @api.get(
        "/recordings/{name}",
        operation_id="getRecording",
        response_class=Response,
        responses={**DOWNLOAD, **responses(404, 416)},
    )
    async def recording(name: FileName, tenant: Tenant, _: Viewer) -> FileResponse:
        """Download, or play: ``Range`` is understood."""
        return FileResponse(await recorded.find(tenant, name), media_type="video/mp4", filename=name)

    @api.delete("/recordings/{name}", status_code=204, operation_id="deleteRecording")
    async def delete_recording(name: FileName, tenant: Tenant, _: Operator) -> None:
        """Forget a recording."""
        await recorded.delete(tenant, name)

    return api
