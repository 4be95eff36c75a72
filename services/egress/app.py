"""Builds, wires and drains egress."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import cv2

from services.egress.handlers import Handlers
from services.egress.live.desk import encoder_of
from services.egress.settings import Settings
from shared.lifecycle import Context, run_service
from shared.telemetry import names
from shared.telemetry.metrics import Metrics


class Egress:
    """One egress process."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._encoder = settings.h264_encoder
        self._handlers = Handlers(
            context.instance,
            settings,
            context.bus,
            context.store,
            context.tensors,
            context.telemetry.tracer,
            context.clock,
            context.metrics.histogram(names.FRAME_LATENCY),
        )

    async def start(self) -> None:
        """Take assignments. Hardware is tried before: while FFmpeg opens it no thread of the process goes on."""
        await asyncio.to_thread(encoder_of, self._encoder)
        await self._handlers.start()

    def declare(self, metrics: Metrics) -> None:
        """What egress counts and times."""
        self._handlers.declare(metrics)

    def beat_fields(self) -> dict[str, object]:
        """The streams whose sinks are open here."""
        return {"streams": self._handlers.streams}

    async def drain(self, deadline_s: float) -> None:
        """Take nothing new; close every ledger and finish every file."""
        self._handlers.refuse()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._handlers.idle.wait(), deadline_s)

    async def close(self) -> None:
        """Let everything go; files are finished in any case."""
        await self._handlers.close()


def main() -> None:
    """Run the service until it is told to stop."""
    cv2.setNumThreads(1)  # a stream's frames are small, and its neighbours need the cores
    settings = Settings()
    run_service("egress", settings, lambda context: Egress(context, settings))
