"""Builds, wires and drains the gateway."""

from __future__ import annotations

import asyncio
import logging
import secrets

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from services.gateway import auth
from services.gateway.access import Seen
from services.gateway.api import (
    capacity,
    compat,
    files,
    fleet,
    media,
    models,
    pages,
    prompts,
    reference,
    scope,
    sinks,
    streams,
    watching,
    webrtc,
)
from services.gateway.auth import Tokens
from services.gateway.body_limit import BodyLimit
from services.gateway.chunks import Chunks
from services.gateway.core import RECORDINGS, UPLOADS
from services.gateway.files import Folder, Uploads
from services.gateway.guard import Guard
from services.gateway.handlers import Desk
from services.gateway.hls import drop_hls
from services.gateway.idempotency import Idempotency
from services.gateway.problems import install
from services.gateway.recording import Recording
from services.gateway.rtc import RtcDesk
from services.gateway.settings import Settings
from services.gateway.shares import Shares
from services.gateway.sink_book import SinkBook
from services.gateway.timeline import Timelines
from services.gateway.viewing import Viewing
from services.gateway.watching import Watch
from shared.access import TokensFileError
from shared.bus.port import Bus
from shared.contracts.sources import MAX_PUSHED_BYTES
from shared.contracts.views import Problem
from shared.lifecycle import Context, UnusableError, run_service
from shared.session.port import SessionStore
from shared.telemetry import names
from shared.telemetry.metrics import Metrics

log = logging.getLogger(__name__)


class Parts:
    """What the routes are bound to. One set per gateway."""

    def __init__(self, bus: Bus, store: SessionStore, settings: Settings) -> None:
        self.settings, self.store = settings, store
        self.desk = Desk(bus, store, settings)
        self.seen = Seen(self.desk)
        self.watch = Watch(bus, settings.max_viewers)
        self.chunks = Chunks(bus)
        self.shares = Shares(store)
        self.once = Idempotency(store)
        self.rtc = RtcDesk(bus)
        self.viewing = Viewing(bus, settings.max_viewers)
        self.book = SinkBook(self.desk, store, self.watch, settings.media_dir)
        self.recording = Recording(self.book, store, settings)
        self.timelines = Timelines(self.desk, store, self.watch, settings.instance or secrets.token_hex(4))
        self.taken = Folder(settings.media_dir, UPLOADS)
        self.recorded = Folder(settings.media_dir, RECORDINGS)
        self.uploads = Uploads(self.taken, settings.upload_max_bytes, settings.upload_tenant_bytes)
        self.tokens = Tokens(settings.tokens_file) if settings.tokens_file is not None else None
        self.denied: dict[str, int] = {}
        self.desk.on_begin.append(self.begin)
        self.watch.on_progress.append(self.chunks.on_progress)
        self.watch.on_ends.append(self.chunks.on_ends)
        self.watch.on_end.append(self.viewing.ended)

    async def start(self) -> None:
        """Listen to the bus. Raises UnusableError when the tokens' file will not do."""
        if self.tokens is not None:
            try:
                self.tokens.load()
            except TokensFileError as error:
                raise UnusableError(str(error)) from None
        await self.desk.start()
        await self.watch.start()
        await self.timelines.start()

    async def close(self) -> None:
        """End what runs beside the requests."""
        await self.timelines.close()
        await self.viewing.close()

    def incidents(self) -> dict[str, int]:
        """What was denied, dropped or turned away, since the start."""
        return {**self.denied, **self.watch.counters, **{f"view_{k}": n for k, n in self.viewing.counters.items()}}

    async def begin(self, stream: str) -> None:
        """A new stream of this id is about to be asked for, and one before it has ended: nothing of that one holds for it."""
        self.watch.begin(stream)
        await drop_hls(self.settings.media_dir, stream)
        for part in (self.shares, self.recording, self.timelines):
            await part.forget(stream)


def build_api(parts: Parts) -> FastAPI:
    """The ASGI application. OpenAPI at ``/openapi.json``, its page at ``/docs``, the page at ``/``."""
    settings, desk, seen = parts.settings, parts.desk, parts.seen
    app = FastAPI(
        title="Rheocast", version="1", description="Live video in, generated video out.", docs_url=None, redoc_url=None
    )
    install(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, streamed=("/v1/uploads",))
    app.add_middleware(Guard, settings=settings, tokens=parts.tokens, shares=parts.shares, denied=parts.denied)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["ETag", "Link", "Location", "Retry-After"],
        )

    @app.get("/healthz", tags=["health"], operation_id="health")
    async def health() -> dict[str, str]:
        """The gateway answers."""
        return {"status": "ok"}

    app.include_router(streams.router(desk, settings, seen, parts.once))
    app.include_router(watching.router(parts.watch, parts.chunks, parts.shares, settings, seen))
    app.include_router(webrtc.router(desk, parts.rtc, settings, seen))
    app.include_router(media.router(parts.viewing, desk, settings, seen))
    app.include_router(sinks.router(parts.book, parts.recording, parts.recorded, settings, seen))
    app.include_router(prompts.router(desk, parts.timelines, seen))
    app.include_router(models.router(desk, settings))
    app.include_router(compat.router(desk, parts.viewing, settings, seen))
    app.include_router(scope.router(desk, parts.rtc, parts.store, settings, seen))
    app.include_router(files.router(parts.uploads, parts.taken, parts.recorded))
    app.include_router(fleet.router(desk))
    app.include_router(capacity.router(desk))
    reference.install_reference(app)
    pages.install_page(app)
    _with_problems(app)
    return app


def _with_problems(app: FastAPI) -> None:
    """The problem's schema stands in the OpenAPI once, where every error points to it."""
    plain = app.openapi

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            schema = plain()
            schema["components"]["schemas"]["Problem"] = Problem.model_json_schema(
                ref_template="#/components/schemas/{model}"
            )
        return plain()

    app.openapi = openapi


class Gateway:
    """One gateway process: uvicorn inside the service's own event loop."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._settings = settings
        self._parts = Parts(context.bus, context.store, settings)
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen once receipts are heard. Raises UnusableError when the settings would let anyone in."""
        auth.check_settings(self._settings)
        await self._parts.start()
        config = uvicorn.Config(
            build_api(self._parts),
            host=self._settings.gateway_host,
            port=self._settings.gateway_port,
            log_config=None,
            access_log=False,  # tokens may stand in a query
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            ws_max_size=MAX_PUSHED_BYTES + 4096,
            timeout_graceful_shutdown=3,  # viewers never end by themselves
        )
        self._server = uvicorn.Server(config)
        self._task = asyncio.create_task(self._serve(self._server), name="http")
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.01)
        if self._task.done():
            self._task.result()
            raise RuntimeError(f"cannot listen on {self._settings.gateway_host}:{self._settings.gateway_port}")

    async def _serve(self, server: uvicorn.Server) -> None:
        try:
            await server._serve()  # serve() would take over the signal handlers that the lifecycle owns
        except SystemExit as error:
            raise RuntimeError(
                f"cannot listen on {self._settings.gateway_host}:{self._settings.gateway_port}: is the port taken?"
            ) from error

    def declare(self, metrics: Metrics) -> None:
        """What the gateway counts."""
        metrics.counts(names.INCIDENTS, "incident", self._parts.incidents)

    async def drain(self, deadline_s: float) -> None:
        """Refuse new connections, let requests finish."""
        if self._server is not None:
            self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=deadline_s)

    async def close(self) -> None:
        """Cut what is left."""
        await self._parts.close()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def main() -> None:
    """Run the service until it is told to stop."""
    settings = Settings()
    run_service("gateway", settings, lambda context: Gateway(context, settings))
