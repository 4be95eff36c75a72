"""Scope's API, for its clients: ``/api/v1/webrtc/…``, and what they ask before: ``/health``, ``/api/v1/pipeline/…``.

The gateway only carries SDP and candidates; media and the data channel end in egress (``services/egress/rtc/peer.py``).
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Response
from pydantic import BaseModel, ValidationError

from services.gateway import scope
from services.gateway.access import Operator, Seen, Tenant, Viewer, Who
from services.gateway.auth import Caller
from services.gateway.errors import NoAnswerError, RefusedError
from services.gateway.handlers import Desk
from services.gateway.ice import IceServers, ice_servers
from services.gateway.problems import responses
from services.gateway.rtc import RtcDesk
from services.gateway.scope import Answer, Candidates, Load, Loaded, Offer
from services.gateway.settings import Settings
from shared.contracts.operating import FleetAsked
from shared.engine.plan.registry import EMBEDDED_MODEL, known_models
from shared.session.port import SessionStore

LOADED_S = 86_400.0  # how long a load is remembered
SessionId = Annotated[str, Path(min_length=1, max_length=129, description="The offer's sessionId.")]
PipelineId = Annotated[str, Query(min_length=1, max_length=128)]


class Health(BaseModel):
    """The gateway answers."""

    status: str = "healthy"
    timestamp: str
    server_start_time: float
    version: str
    git_commit: str = ""


class Told(BaseModel):
    """A message to be shown."""

    message: str


class ModelStatus(BaseModel):
    """Nothing is ever downloaded by a client's wish."""

    downloaded: bool = True
    progress: None = None


def router(desk: Desk, rtc: RtcDesk, store: SessionStore, settings: Settings, seen: Seen) -> APIRouter:
    """The routes, bound to a desk."""
    api = APIRouter(tags=["scope"], responses=responses(404, 406, 409))
    started, version = time.time(), _version()

    async def loaded_of(caller: Caller, tenant: str) -> Loaded:
        """What this caller has asked to be loaded."""
        kept = await store.get_note(_place(caller, tenant))
        with suppress(ValidationError):
            return Loaded.model_validate(kept or {})
        return Loaded()

    async def served() -> frozenset[str] | None:
        """The models of which a pipeline runs; None when nobody says."""
        try:
            told = await asyncio.wait_for(desk.fleet(FleetAsked()), settings.capacity_timeout_s)
        except (NoAnswerError, RefusedError, TimeoutError):
            return None
        return frozenset(pipeline.model for pipeline in told.pipelines)

    async def choice_now() -> scope.Choice:
        return scope.Choice(settings.demo_model or EMBEDDED_MODEL, await served(), settings.scope_grace_s)

    @api.get("/health", operation_id="scopeHealth")
    async def health() -> Health:
        """The gateway answers."""
        return Health(timestamp=datetime.now(UTC).isoformat(), server_start_time=started, version=version)

    @api.get("/api/v1/webrtc/ice-servers", operation_id="scopeIceServers")
    async def servers(caller: Who) -> IceServers:
        """As ``/v1/ice-servers``."""
        return IceServers(iceServers=ice_servers(settings, caller.name, time.time()))

    @api.post("/api/v1/webrtc/offer", operation_id="scopeOffer")
    async def offer(body: Offer, tenant: Tenant, caller: Operator) -> Answer:
        """Start a stream with one offer for both ways. It ends a few seconds after its client has left."""
        choice = await choice_now()
        stream, spec = scope.stream_of(body, await loaded_of(caller, tenant), choice, tenant)
        patches = scope.patches_of(body)
        async with desk.beginning(stream, spec):
            for patch in patches:
                await desk.patch(stream, patch, tenant)
            answer = await rtc.offer(stream, "peer", body.sdp)
        return Answer(sdp=answer.sdp, sessionId=scope.session_id(stream, answer.session))

    @api.patch("/api/v1/webrtc/offer/{session}", status_code=204, operation_id="scopeTrickle")
    async def trickle(session: SessionId, body: Candidates, caller: Operator) -> Response:
        """Candidates as they are found."""
        stream, peer = scope.session_of(session)
        await seen.change(stream, caller)
        if fragment := scope.fragment_of(body):
            await rtc.trickle(stream, "peer", peer, fragment, "")
        return Response(status_code=204)

    @api.delete("/api/v1/webrtc/offer/{session}", status_code=204, operation_id="scopeClose")
    async def close(session: SessionId, tenant: Tenant, caller: Operator) -> Response:
        """Leave; the stream ends now."""
        stream, peer = scope.session_of(session)
        await seen.change(stream, caller)
        await rtc.close(stream, "peer", peer)
        await desk.stop(stream, False, tenant)
        return Response(status_code=204)

    @api.post("/api/v1/pipeline/load", operation_id="scopeLoad")
    async def load(body: Load, tenant: Tenant, caller: Operator) -> Told:
        """Remember model, size and seed for the streams that this client starts: models stay loaded by themselves."""
        asked = scope.loaded_by(body)
        await store.put_note(_place(caller, tenant), asked.model_dump(mode="json"), LOADED_S)
        return Told(message="it holds for the streams that you start; models are loaded already")

    @api.get("/api/v1/pipeline/status", operation_id="scopeStatus")
    async def status(tenant: Tenant, caller: Viewer) -> dict[str, Any]:
        """``loaded`` once a worker has the model."""
        loaded = await loaded_of(caller, tenant)
        choice = await choice_now()
        return scope.status_page(loaded, choice)

    @api.get("/api/v1/pipelines/schemas", operation_id="scopeSchemas")
    async def schemas(_: Viewer) -> dict[str, dict[str, Any]]:
        """The models that are known here, as pipelines."""
        names = await asyncio.to_thread(known_models, settings.models_dir)
        return {"pipelines": {name: scope.schema_of(name, version) for name in names}}

    @api.get("/api/v1/models/status", operation_id="scopeModelStatus")
    async def model_status(pipeline_id: PipelineId, _: Viewer) -> ModelStatus:
        """Weights are the server's affair: there is nothing to be downloaded."""
        return ModelStatus()

    return api


def _version() -> str:
    """Ours, where the package is installed; a checkout has none."""
    try:
        return importlib.metadata.version("rheocast")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _place(caller: Caller, tenant: str) -> str:
    return f"scope:{tenant}:{caller.name}"
