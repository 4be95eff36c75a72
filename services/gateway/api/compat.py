"""The public StreamDiffusionV2 demo's protocol, for its clients: ``/api/settings``, ``queue``, ``ws`` and ``stream``."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ValidationError

from services.gateway.access import Seen, Viewer, Who, caller_of
from services.gateway.auth import Caller
from services.gateway.demo import FRAME_S, ProtocolError, Talk, Turn, settings_page, spec_of, stream_of
from services.gateway.errors import ForbiddenError, UnknownStreamError
from services.gateway.handlers import Desk
from services.gateway.problems import GatewayError, problem, responses
from services.gateway.settings import Settings
from services.gateway.viewing import Viewing
from shared.access import Role
from shared.bus.port import BusError
from shared.contracts.commands import StreamPatch
from shared.contracts.sources import PushedFrame
from shared.engine.plan.registry import EMBEDDED_MODEL
from shared.session.port import StoreError

log = logging.getLogger(__name__)

APPEARS_S = 20.0  # a client may ask for pictures before its first frame began the stream
MJPEG_TYPE = "multipart/x-mixed-replace; boundary=frame"


class QueueView(BaseModel):
    """How many clients are here."""

    queue_size: int


class DemoClients:
    """The clients that are connected. Each has one stream, which ends with it."""

    def __init__(self, desk: Desk, settings: Settings) -> None:
        self.desk, self.settings = desk, settings
        self.open: dict[str, str] = {}  # stream → its tenant

    async def serve(self, websocket: WebSocket, user: uuid.UUID, caller: Caller) -> None:
        """Talk to one client until it leaves."""
        stream, tenant = stream_of(user), caller.tenant
        await websocket.accept()
        full = len(self.open) >= self.settings.demo_max_clients
        if full or stream in self.open:
            message = "Server is full" if full else "this id is in use"
            await websocket.send_json({"status": "error", "message": message})
            await websocket.close()
            return
        self.open[stream] = tenant
        talk = Talk()
        try:
            for said in talk.hello():
                await websocket.send_json(said)
            while True:
                await self._turn(websocket, talk, stream, tenant)
        except (ProtocolError, ValidationError, GatewayError) as error:
            text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            with suppress(RuntimeError):
                await websocket.send_json({"status": "error", "message": text})
                await websocket.close(1008)
        except (BusError, StoreError) as error:
            log.warning("a client of the demo's protocol is let go: %s", error)
            with suppress(RuntimeError):
                await websocket.close(1013)
        except (WebSocketDisconnect, RuntimeError):
            pass  # it left
        finally:
            del self.open[stream]
            if talk.prompt is not None:
                with suppress(GatewayError, BusError, StoreError):
                    await asyncio.shield(self.desk.stop(stream, False, tenant))

    async def _turn(self, websocket: WebSocket, talk: Talk, stream: str, tenant: str) -> None:
        message = await asyncio.wait_for(websocket.receive(), self.settings.demo_idle_s)
        began = time.monotonic()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect
        turn = talk.on_bytes(data) if (data := message.get("bytes")) is not None else talk.on_json(_json(message))
        await self._carry_out(turn, stream, tenant)
        for said in turn.say:
            await websocket.send_json(said)
        if turn.ask_again:
            await asyncio.sleep(max(0.0, FRAME_S - (time.monotonic() - began)))
            await websocket.send_json({"status": "send_frame"})

    async def _carry_out(self, turn: Turn, stream: str, tenant: str) -> None:
        if turn.begin is not None:
            await self.desk.create(stream, spec_of(turn.begin, self.settings.demo_model or EMBEDDED_MODEL, tenant))
            if turn.begin.restart:
                return  # it has just begun
        if turn.patch is not None:
            await self._patch(stream, turn.patch, tenant)
        if turn.frame is not None:
            await self.desk.push(PushedFrame(stream=stream, data=turn.frame, captured_ns=time.time_ns()))

    async def _patch(self, stream: str, patch: StreamPatch, tenant: str) -> None:
        """The demo has no way to tell that a change was refused: it goes on as it was."""
        try:
            await self.desk.patch(stream, patch, tenant)
        except GatewayError as error:
            log.info("stream %s: a change is refused: %s", stream, error)


def router(desk: Desk, viewing: Viewing, settings: Settings, seen: Seen) -> APIRouter:
    """The routes; clients are counted here."""
    api = APIRouter(prefix="/api", tags=["demo"], responses=responses(404))
    clients = DemoClients(desk, settings)

    @api.get("/settings", operation_id="demoSettings")
    async def settings_of(_: Viewer) -> dict[str, Any]:
        """Which settings a client may send."""
        return settings_page(settings.demo_model or EMBEDDED_MODEL, settings.demo_max_clients)

    @api.get("/queue", operation_id="demoQueue")
    async def queue(_: Viewer) -> QueueView:
        """How many clients are connected."""
        return QueueView(queue_size=len(clients.open))

    @api.get(
        "/stream/{user}",
        operation_id="demoStream",
        response_class=Response,
        responses={
            200: {
                "description": "Pictures as they come.",
                "content": {MJPEG_TYPE: {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    async def stream(user: uuid.UUID, caller: Who) -> StreamingResponse:
        """The result as motion JPEG; 404 when no client of this id is connected."""
        name = stream_of(user)
        await _appears(clients, seen, name, caller)
        pictures = viewing.pictures(name)
        return StreamingResponse(_parts(pictures), media_type=MJPEG_TYPE, headers={"cache-control": "no-cache"})

    @api.websocket("/ws/{user}")
    async def socket(websocket: WebSocket, user: uuid.UUID) -> None:
        """One client; see ``services/gateway/demo.py`` for the protocol."""
        try:
            caller = caller_of(websocket)
            if not caller.role.covers(Role.OPERATOR):
                raise ForbiddenError(f"this takes the role operator; yours is {caller.role}")
        except GatewayError as error:
            await websocket.send_denial_response(problem(error.status, error.title, str(error)))
            return
        try:
            await clients.serve(websocket, user, caller)
        except TimeoutError:
            with suppress(RuntimeError):
                await websocket.send_json({"status": "timeout", "message": "Your session has ended"})
                await websocket.close()

    return api


async def _appears(clients: DemoClients, seen: Seen, stream: str, caller: Caller) -> None:
    """Wait until a connected client's stream is there. Raises UnknownStreamError."""
    until = time.monotonic() + APPEARS_S
    while True:
        try:
            await seen(stream, caller)
            return
        except UnknownStreamError:
            if stream not in clients.open or time.monotonic() > until:
                raise
        await asyncio.sleep(0.1)


async def _parts(pictures: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    async for picture in pictures:
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture.data)}\r\n\r\n"
        yield head.encode() + picture.data + b"\r\n"


def _json(message: Any) -> Any:
    try:
        return json.loads(message.get("text") or "")
    except (json.JSONDecodeError, RecursionError):
        raise ProtocolError("a text message is JSON") from None
