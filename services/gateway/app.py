"""Builds, wires and drains the gateway."""

from __future__ import annotations

import asyncio
import logging

import uvicorn
from fastapi import FastAPI
from fastapi.responses import RedirectResponse

from services.gateway.api import capacity, fleet, streams
from services.gateway.body_limit import BodyLimit
from services.gateway.handlers import Desk
from services.gateway.problems import install
from services.gateway.settings import Settings
from shared.lifecycle import Context, run_service

log = logging.getLogger(__name__)


def build_api(desk: Desk, settings: Settings) -> FastAPI:
    """The ASGI application. OpenAPI at ``/openapi.json``, its page at ``/docs``."""
    app = FastAPI(title="Rheocast", version="1", description="Live video in, generated video out.")
    install(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)

    @app.get("/healthz", tags=["health"], operation_id="health")
    async def health() -> dict[str, str]:
        """The gateway answers."""
        return {"status": "ok"}

    @app.get("/", include_in_schema=False)
    async def home() -> RedirectResponse:
        """The API's own page."""
        return RedirectResponse("/docs")

    app.include_router(streams.router(desk, settings))
    app.include_router(fleet.router(desk))
    app.include_router(capacity.router(desk))
    return app


class Gateway:
    """One gateway process: uvicorn inside the service's own event loop."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        self._desk = Desk(context.bus, context.store, settings)
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen once receipts are heard."""
        await self._desk.start()
        config = uvicorn.Config(
            build_api(self._desk, self._settings),
            host=self._settings.gateway_host,
            port=self._settings.gateway_port,
            log_config=None,
            access_log=False,
            lifespan="off",
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

    async def drain(self, deadline_s: float) -> None:
        """Refuse new connections, let requests finish."""
        if self._server is not None:
            self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=deadline_s)

    async def close(self) -> None:
        """Cut what is left."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def main() -> None:
    """Run the service until it is told to stop."""
    settings = Settings()
    run_service("gateway", settings, lambda context: Gateway(context, settings))
