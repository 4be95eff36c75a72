"""Builds, wires and drains motion."""

from __future__ import annotations

import asyncio
import logging

from services.motion.core import MotionCore
from services.motion.handlers import Handlers
from services.motion.settings import Settings
from shared.bus.port import Subscription
from shared.contracts import subjects
from shared.lifecycle import Context, run_service
from shared.session.port import StoreUnavailableError
from shared.telemetry import names
from shared.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

LATENTS_MAILBOX = 1024
HOUSEKEEPING_S = 1.0


class Motion:
    """One motion process."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self._context = context
        self._settings = settings
        self._core = MotionCore(settings.noise_form, settings.max_streams)
        self._handlers = Handlers(settings, context, self._core)
        self._subscriptions: list[Subscription] = []
        self._mirror: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Assignments are heard before chunks, so that a stream is known by its first one."""
        bus = self._context.bus
        self._subscriptions.append(await bus.subscribe(subjects.assign("motion"), self._handlers.on_assign))
        pattern = subjects.stream(subjects.ANY, "latents")
        self._subscriptions.append(await bus.subscribe(pattern, self._handlers.on_latents, size=LATENTS_MAILBOX))
        self._mirror = asyncio.create_task(self._keep_mirror(), name="mirror")

    def declare(self, metrics: Metrics) -> None:
        """Streams, and what should be rare."""
        metrics.value(names.STREAMS, lambda: len(self._core.streams))
        metrics.counts(names.INCIDENTS, "incident", lambda: self._core.counts)

    def beat_fields(self) -> dict[str, object]:
        """What the scheduler places by."""
        return {
            "roles": (names.MOTION,),
            "streams": tuple(self._core.streams),
            "role_ms": {names.MOTION: self._handlers.compute_ms},
        }

    async def _keep_mirror(self) -> None:
        settings, clock = self._settings, self._context.clock
        tidied, broken = clock.monotonic(), False
        while True:
            await clock.sleep(HOUSEKEEPING_S if broken else settings.mirror_s)
            try:
                await self._handlers.mirror()
                broken = False
            except StoreUnavailableError as error:
                if not broken:
                    log.warning("the mirror waits: %s", error)
                broken = True
            except Exception:
                log.exception("mirroring failed")
                broken = True
            if clock.monotonic() - tidied >= HOUSEKEEPING_S:
                tidied = clock.monotonic()
                for stream in self._core.forget_idle(tidied, settings.drained_s, settings.idle_s):
                    log.info("stream %s has had no chunk for long: forgotten", stream)

    async def drain(self, deadline_s: float) -> None:
        """Take nothing new; the last estimates and their mirror go out."""
        try:
            async with asyncio.timeout(deadline_s):
                for subscription in self._subscriptions:
                    await subscription.drain()
                await self._handlers.mirror()
        except (StoreUnavailableError, TimeoutError) as error:
            log.warning("the last controllers were not mirrored: %s", error)

    async def close(self) -> None:
        """Stop acting."""
        if self._mirror is not None:
            self._mirror.cancel()
            await asyncio.gather(self._mirror, return_exceptions=True)
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        if self._core.counts:
            log.info(
                "refused: %s", ", ".join(f"{reason} {count}" for reason, count in sorted(self._core.counts.items()))
            )


def main() -> None:
    """Run the service until it is told to stop."""
    settings = Settings()
    run_service("motion", settings, lambda context: Motion(context, settings))
