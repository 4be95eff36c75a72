"""Builds, wires and drains ingest."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import cv2

from services.ingest.handlers import Handlers
from services.ingest.settings import Settings
from shared.lifecycle import Context, run_service
from shared.telemetry import names
from shared.telemetry.metrics import Metrics


class Ingest:
    """One ingest process."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._handlers = Handlers(
            context.instance, settings, context.bus, context.store, context.tensors, context.telemetry.tracer
        )

    async def start(self) -> None:
        """Take assignments."""
        await self._handlers.start()

    def declare(self, metrics: Metrics) -> None:
        """Open sources, and what should be rare."""
        metrics.value(names.STREAMS, lambda: len(self._handlers.streams))
        metrics.counts(names.INCIDENTS, "incident", lambda: self._handlers.counters)

    def beat_fields(self) -> dict[str, object]:
        """The streams whose sources are open here."""
        return {"streams": self._handlers.streams}

    async def drain(self, deadline_s: float) -> None:
        """Take nothing new, end every source and tell so; wait until what is numbered is closed."""
        self._handlers.refuse()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._handlers.idle.wait(), deadline_s)

    async def close(self) -> None:
        """Close every source."""
        await self._handlers.close()


def main() -> None:
    """Run the service until it is told to stop."""
    cv2.setNumThreads(1)  # a source's frames are small, and its neighbours need the cores
    settings = Settings()
    run_service("ingest", settings, lambda context: Ingest(context, settings))
