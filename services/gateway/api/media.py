"""``/v1/streams/{id}/…``: pictures for browsers (snapshot, MJPEG, WebSocket) and the HLS files that egress writes."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, Response, StreamingResponse

from services.gateway.access import Seen, caller_of
from services.gateway.core import HLS, inside
from services.gateway.errors import UnknownPartError
from services.gateway.handlers import Desk
from services.gateway.problems import PROBLEM_RESPONSES, GatewayError, problem
from services.gateway.settings import Settings
from services.gateway.viewing import Picture, Viewing, What
from shared.access import Role
from shared.bus.port import BusError
from shared.contracts.sources import MAX_PUSHED_BYTES, PushedFrame
from shared.contracts.views import StreamView
from shared.rates import Rates

log = logging.getLogger(__name__)

BOUNDARY = "rheocast-frame"
JPEG_BEGIN = b"\xff\xd8\xff"
PUSHES_PER_S = 120.0
HLS_TYPES = {
    "m3u8": "application/vnd.apple.mpegurl",
    "m4s": "video/iso.segment",
    "mp4": "video/mp4",
    "ts": "video/mp2t",
}
HLS_NAME = r"^[A-Za-z0-9_-]{1,100}\.(m3u8|m4s|mp4|ts)$"
Responses = dict[int | str, dict[str, Any]]
_BINARY = {"schema": {"type": "string", "format": "binary"}}
MJPEG_TYPE = f"multipart/x-mixed-replace; boundary={BOUNDARY}"
JPEG: Responses = {200: {"description": "One picture.", "content": {"image/jpeg": _BINARY}}}
MJPEG: Responses = {200: {"description": "Pictures as they come.", "content": {MJPEG_TYPE: _BINARY}}}
HLS_FILE: Responses = {200: {"description": "The file.", "content": dict.fromkeys(HLS_TYPES.values(), _BINARY)}}


def part(data: bytes) -> bytes:
    """One picture of an MJPEG answer."""
    head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data + b"\r\n"


async def parts_of(pictures: AsyncIterator[Picture]) -> AsyncIterator[bytes]:
    """An MJPEG answer's body."""
    async for picture in pictures:
        yield part(picture.data)


async def mjpeg_of(viewing: Viewing, stream: str, what: What) -> StreamingResponse:
    """An MJPEG answer that begins with its first picture. Raises NoAnswerError, BusyError: before anything is sent."""
    pictures = viewing.pictures(stream, what)
    first = await viewing.snapshot(stream, what)

    async def all_of() -> AsyncIterator[bytes]:
        yield part(first.data)
        async for data in parts_of(pictures):
            yield data

    return StreamingResponse(all_of(), media_type=MJPEG_TYPE)


def with_token(playlist: str, token: str) -> str:
    """A playlist whose files are asked for with the same token: a video element cannot send a header."""
    query = f"?token={token}"
    marked = re.sub(r'(URI="[^"?]+)"', rf'\1{query}"', playlist)
    return "\n".join(
        line + query if line and not line.startswith("#") and "?" not in line else line for line in marked.split("\n")
    )


def router(viewing: Viewing, desk: Desk, settings: Settings, seen: Seen) -> APIRouter:
    """The routes, bound to who has the pictures."""
    api = APIRouter(prefix="/v1/streams/{stream}", tags=["media"], responses=PROBLEM_RESPONSES)
    found = Depends(seen)

    def jpeg(picture: Picture) -> Response:
        return Response(picture.data, media_type="image/jpeg", headers={"X-Captured-Ns": str(picture.captured_ns)})

    @api.get("/snapshot.jpg", operation_id="getSnapshot", response_class=Response, responses=JPEG)
    async def snapshot(view: StreamView = found) -> Response:
        """The result's next frame. 503 when none comes within 8 s."""
        return jpeg(await viewing.snapshot(view.id))

    @api.get("/source.jpg", operation_id="getSourceSnapshot", response_class=Response, responses=JPEG)
    async def source_snapshot(view: StreamView = found) -> Response:
        """The source's next frame, as fitted to the stream's size."""
        return jpeg(await viewing.snapshot(view.id, "source"))

    @api.get("/mjpeg", operation_id="getMjpeg", response_class=Response, responses=MJPEG)
    async def mjpeg(view: StreamView = found) -> StreamingResponse:
        """The result as motion JPEG: ``<img src=…/mjpeg>``. A slow viewer misses pictures; nobody waits for it."""
        return await mjpeg_of(viewing, view.id, "result")

    @api.get("/source/mjpeg", operation_id="getSourceMjpeg", response_class=Response, responses=MJPEG)
    async def source_mjpeg(view: StreamView = found) -> StreamingResponse:
        """The source as motion JPEG."""
        return await mjpeg_of(viewing, view.id, "source")

    @api.get("/hls/{name}", operation_id="getHls", response_class=Response, responses=HLS_FILE)
    async def hls(
        name: Annotated[str, Path(pattern=HLS_NAME, examples=["index.m3u8"])],
        token: Annotated[str, Query(max_length=512)] = "",
        view: StreamView = found,
    ) -> Response:
        """A file of the stream's HLS sink: ``index.m3u8`` and what it names."""
        path = inside(settings.media_dir, f"{HLS}/{view.id}/{name}")
        kind = HLS_TYPES[name.rpartition(".")[2]]
        if not await asyncio.to_thread(path.is_file):
            raise UnknownPartError(f"stream {view.id} has no {name}: add an HLS sink, and give it a few seconds")
        if name.endswith(".m3u8"):
            text = await asyncio.to_thread(path.read_text, "utf-8")
            return Response(with_token(text, token) if token else text, media_type=kind)
        return FileResponse(path, media_type=kind, headers={"cache-control": "private, max-age=60"})

    @api.websocket("/ws")
    async def socket(websocket: WebSocket, stream: str) -> None:
        """Binary messages: JPEGs of the result, to the client; of the source from it, if the stream's source is push."""
        try:
            caller = caller_of(websocket)
            view = await seen(stream, caller)
        except GatewayError as error:
            await websocket.send_denial_response(problem(error.status, error.title, str(error), **error.more()))
            return
        pushes = view.source_kind == "push" and caller.role.covers(Role.OPERATOR)
        await websocket.accept()
        show = asyncio.create_task(_show(websocket, viewing, stream))
        try:
            await _take(websocket, desk, stream, pushes)
        except BusError as error:
            log.warning("frames for stream %s cannot be passed on: %s", stream, error)
        except (WebSocketDisconnect, RuntimeError):
            pass  # the client left
        finally:
            show.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await show
            with suppress(RuntimeError):
                await websocket.close()

    return api


async def _show(websocket: WebSocket, viewing: Viewing, stream: str) -> None:
    """Pictures to the client, as fast as it takes them; the socket is closed when the stream ends."""
    try:
        async for picture in viewing.pictures(stream, quiet_s=3600.0):
            await websocket.send_bytes(picture.data)
    except (WebSocketDisconnect, RuntimeError):
        return
    except GatewayError as error:
        await websocket.close(1013, str(error)[:120])
        return
    await websocket.close(1000, "the stream has ended")


async def _take(websocket: WebSocket, desk: Desk, stream: str, pushes: bool) -> None:
    """Frames from the client. What is no JPEG, or comes where nobody wants it, closes the socket with the reason."""
    rates = Rates(PUSHES_PER_S, int(PUSHES_PER_S), most=1)
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return
        data = message.get("bytes")
        if not data:
            continue
        if refusal := refusal_of(data, pushes):
            await websocket.close(1008, refusal)
            return
        if rates.take(stream, time.monotonic()) == 0:
            await desk.push(PushedFrame(stream=stream, data=data, captured_ns=time.time_ns()))


def refusal_of(data: bytes, pushes: bool) -> str:
    """Why a client's frame is not passed on; empty when it is."""
    if not pushes:
        return "this stream takes no frames here: its source is not push, or your role is viewer"
    if len(data) > MAX_PUSHED_BYTES:
        return f"a frame may have {MAX_PUSHED_BYTES} bytes"
    if not data.startswith(JPEG_BEGIN):
        return "frames are JPEG files"
    return ""
