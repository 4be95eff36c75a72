"""The life of a service process: connect, start, beat, and on SIGTERM refuse → drain with a deadline → close."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Protocol

from pydantic import ValidationError

from shared import logs
from shared.bus.lossy import LossyBus
from shared.bus.port import Bus, BusError, BusUnavailableError
from shared.clock import Clock, SystemClock
from shared.config import ServiceSettings
from shared.connecting import connect
from shared.contracts import subjects
from shared.contracts.events import Beat
from shared.health import HealthServer
from shared.session.port import SessionStore, StoreUnavailableError
from shared.telemetry import names
from shared.telemetry.metrics import Metrics
from shared.telemetry.setup import Telemetry, setup
from shared.tensors.store import HostTensorStore

log = logging.getLogger(__name__)

BEAT_S = 0.25  # a pause of a second must not look like three missed beats of half a second
SWEEP_S = 1.0
CLOSE_S = 5.0
FLUSH_S = 3.0
LINGER_S = 0.5


class ExitCode(IntEnum):
    """What a service's process ends with."""

    OK = 0
    FAILED = 1
    BAD_SETTINGS = 2
    UNAVAILABLE = 3  # NATS or Redis cannot be reached


class UnusableError(RuntimeError):
    """What a service was told to use will not do (a model's files, say): starting it again would not help."""


class Phase(StrEnum):
    """Where a service process is in its life."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    CLOSED = "closed"


@dataclass(slots=True)
class Context:
    """What a service is given. Set ``stop`` to end it; ``fail`` ends it with an exit code that says so."""

    settings: ServiceSettings
    bus: Bus
    store: SessionStore
    tensors: HostTensorStore
    telemetry: Telemetry
    clock: Clock
    instance: str
    incarnation: str
    metrics: Metrics
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    failure: str | None = None

    def fail(self, reason: str) -> None:
        """End the service: it cannot go on. ``reason`` is one line."""
        if self.failure is None:
            self.failure = reason
            log.error("the service ends: %s", reason)
        self.stop.set()


class Service(Protocol):
    """A service may also have ``beat_fields() -> dict``, which extends its beats (and may hold ``ready``), and
    ``declare(metrics)``, which adds its own metrics."""

    async def start(self) -> None:
        """Subscribe and begin to work."""
        ...

    async def drain(self, deadline_s: float) -> None:
        """Take nothing new and finish what is under way, within ``deadline_s``."""
        ...

    async def close(self) -> None:
        """Let everything go. Called always, also after a failed start."""
        ...


Build = Callable[[Context], Service]


class Runner:
    """One service in one process."""

    def __init__(self, name: str, context: Context, service: Service) -> None:
        self.phase = Phase.STARTING
        self.health = HealthServer(self._status, self._exposition)
        self._name = name
        self._context = context
        self._service = service
        self._hurry = asyncio.Event()
        self._beat_now = asyncio.Event()
        self._parent = context.settings.parent_pid
        self._is_child = self._parent == os.getppid()

    def _beat(self) -> Beat:
        fields: dict[str, Any] = {}
        extend: Callable[[], dict[str, Any]] | None = getattr(self._service, "beat_fields", None)
        if extend is not None:
            try:
                fields = dict(extend())
            except Exception:
                log.exception("beat_fields raised")
                fields = {"ready": False}
        fields["ready"] = self.phase is Phase.RUNNING and bool(fields.get("ready", True))
        context = self._context
        return Beat(service=self._name, instance=context.instance, incarnation=context.incarnation, **fields)

    def _status(self) -> tuple[bool, dict[str, Any]]:
        context = self._context
        beat = self._beat()
        connected = bool(getattr(context.bus, "connected", True))
        return beat.ready and connected, {
            "service": self._name,
            "instance": context.instance,
            "incarnation": context.incarnation,
            "pid": os.getpid(),
            "phase": self.phase.value,
            "ready": beat.ready and connected,
            "bus": {"connected": connected, "subjects": context.bus.stats.as_dict()},
            "tensors": {"leased": context.tensors.leased, "bytes": context.tensors.shm_bytes},
            "beat": beat.model_dump(mode="json", exclude={"service", "instance", "incarnation"}),
        }

    def _exposition(self, accept: str) -> tuple[bytes, str]:
        return self._context.metrics.exposition(accept)

    def _declare(self) -> None:
        """The metrics that every service has; the service declares its own."""
        context, metrics = self._context, self._context.metrics
        tensors = context.tensors
        metrics.value(names.SERVICE_READY, lambda: float(self._status()[0]))
        metrics.value(names.BUS_CONNECTED, lambda: float(getattr(context.bus, "connected", True)))
        metrics.read(
            names.BUS_MESSAGES,
            lambda: [
                ({"subject": pattern, "result": result}, count)
                for pattern, counts in context.bus.stats.as_dict().items()
                for result, count in counts.items()
            ],
        )
        metrics.value(names.TENSOR_LEASES, lambda: tensors.leased)
        metrics.value(names.TENSOR_BYTES, lambda: tensors.shm_bytes)
        metrics.value(names.TENSOR_EXPIRED, lambda: tensors.counters.expired)
        declare: Callable[[Metrics], None] | None = getattr(self._service, "declare", None)
        if declare is not None:
            declare(metrics)

    def _parent_is_gone(self) -> bool:
        if not self._parent:
            return False
        if self._is_child:
            return os.getppid() != self._parent
        try:
            os.kill(self._parent, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    async def _beats(self) -> None:
        context = self._context
        subject, swept = subjects.beat(context.instance), context.clock.monotonic()
        while True:
            with contextlib.suppress(BusError):
                await context.bus.publish(subject, self._beat())
            if self._parent_is_gone() and not context.stop.is_set():
                log.warning("the parent process %d is gone: ending", self._parent)
                context.stop.set()
            if context.clock.monotonic() - swept >= SWEEP_S:
                swept = context.clock.monotonic()
                context.tensors.sweep()
            self._beat_now.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._beat_now.wait(), BEAT_S)

    def _enter(self, phase: Phase) -> None:
        """Change the phase, and tell it at once."""
        self.phase = phase
        self._beat_now.set()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._context.stop.is_set():
            log.warning("%s again: not waiting for the drain", number.name)
            self._hurry.set()
            return
        log.info("%s: ending", number.name)
        self._context.stop.set()

    async def run(self) -> ExitCode:
        """Start, beat until told to stop, drain, close. Never raises for a fault of the service."""
        context = self._context
        loop = asyncio.get_running_loop()
        handled = (signal.SIGTERM, signal.SIGINT)
        for number in handled:
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                loop.add_signal_handler(number, self._on_signal, number)
        self._declare()
        beats = asyncio.create_task(self._beats(), name="beats")
        try:
            settings = context.settings
            if settings.health_port >= 0:
                await self.health.start(settings.health_host, settings.health_port)
                log.info("health and metrics: http://%s:%d/readyz and /metrics", settings.health_host, self.health.port)
            if await self._start():
                gc.freeze()  # what the start made stays: a full collection looks at the rest only, not for tens of ms
                self._enter(Phase.RUNNING)
                log.info("%s is up", self._name)
                await context.stop.wait()
            self._enter(Phase.DRAINING)
            await self._drain()
        except (BusUnavailableError, StoreUnavailableError) as error:
            context.failure = str(error)
            log.error("%s", error)
            return ExitCode.UNAVAILABLE
        except UnusableError as error:
            context.failure = str(error)
            log.error("%s", error)
            return ExitCode.BAD_SETTINGS
        except Exception as error:
            context.failure = str(error) or type(error).__name__
            log.exception("%s failed", self._name)
        finally:
            beats.cancel()
            await self._close()
            for number in handled:
                with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                    loop.remove_signal_handler(number)
        return ExitCode.OK if context.failure is None else ExitCode.FAILED

    async def _start(self) -> bool:
        """False when it was told to stop before it had started."""
        start = asyncio.create_task(self._service.start(), name="start")
        stop = asyncio.create_task(self._context.stop.wait())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not start.done():
            start.cancel()
            await asyncio.gather(start, return_exceptions=True)
            return False
        await start
        return True

    async def _drain(self) -> None:
        deadline_s = self._context.settings.drain_s
        if deadline_s <= 0:
            return
        drain = asyncio.create_task(self._service.drain(deadline_s), name="drain")
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({drain, hurry}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not drain.done():
            log.warning("%s was not drained within %g s", self._name, deadline_s)
            drain.cancel()
        failed = (await asyncio.gather(drain, return_exceptions=True))[0]
        if isinstance(failed, Exception):
            log.error("draining %s failed", self._name, exc_info=failed)

    async def _close(self) -> None:
        self.phase = Phase.CLOSED
        for what, close in (("service", self._service.close), ("health", self.health.close)):
            try:
                async with asyncio.timeout(CLOSE_S):
                    await close()
            except Exception:
                log.exception("closing the %s failed", what)


def _observe(context: Context) -> None:
    """Counters that exist anyway, as metrics."""
    if not context.telemetry.enabled:
        return
    from opentelemetry.metrics import CallbackOptions, Observation

    stats, tensors, meter = context.bus.stats, context.tensors, context.telemetry.meter
    for name, counter in (
        (names.BUS_PUBLISHED, "published"),
        (names.BUS_RECEIVED, "received"),
        (names.BUS_DROPPED, "dropped"),
        (names.BUS_BAD, "bad"),
        (names.BUS_HANDLER_ERRORS, "handler_errors"),
    ):

        def read(_: CallbackOptions, counter: str = counter) -> list[Observation]:
            return [
                Observation(getattr(counts, counter), {"subject": pattern})
                for pattern, counts in list(stats.by_pattern.items())
            ]

        meter.create_observable_counter(name, [read])
    meter.create_observable_gauge(names.TENSORS_LEASED, [lambda _: [Observation(tensors.leased)]])
    meter.create_observable_gauge(names.TENSORS_BYTES, [lambda _: [Observation(tensors.shm_bytes)]], unit="By")
    meter.create_observable_counter(names.TENSORS_EXPIRED, [lambda _: [Observation(tensors.counters.expired)]])


async def serve_service(name: str, settings: ServiceSettings, build: Build) -> ExitCode:
    """Run a service in the running event loop until it is told to stop. Closes whatever it opened."""
    settings = settings.named(name)
    async with contextlib.AsyncExitStack() as stack:
        try:
            nats, store = await connect(settings, stack)
            bus: Bus = nats
            if settings.bus_faults:
                bus = LossyBus.of(nats, settings.bus_faults)
                stack.push_async_callback(bus.close)
        except (BusUnavailableError, StoreUnavailableError) as error:
            log.error("%s", error)
            return ExitCode.UNAVAILABLE
        except ValueError as error:
            log.error("%s", error)
            return ExitCode.BAD_SETTINGS
        telemetry = setup(name, settings.instance, settings.otlp_endpoint)
        stack.push_async_callback(_flush, telemetry)
        tensors = HostTensorStore(
            settings.shm_dir, settings.run_id, settings.instance, bus=bus, max_bytes=settings.shm_max_mb << 20
        )
        stack.push_async_callback(bus.drain, 1.0)
        stack.push_async_callback(tensors.aclose)
        stack.push_async_callback(_linger, tensors)
        await tensors.start()
        context = Context(
            settings,
            bus,
            store,
            tensors,
            telemetry,
            SystemClock(),
            settings.instance,
            secrets.token_hex(8),
            Metrics(name, settings.instance),
        )
        _observe(context)
        return await Runner(name, context, build(context)).run()


async def _linger(tensors: HostTensorStore) -> None:
    """What was published last may not have been read yet: give its readers a moment before it is unlinked."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while tensors.sweep() or tensors.shm_leased:
                await asyncio.sleep(0.02)


async def _flush(telemetry: Telemetry) -> None:
    if telemetry.enabled:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(telemetry.shutdown), FLUSH_S)


def run_service(service_name: str, settings: ServiceSettings, build: Build) -> None:
    """Run a service as this process. Returns after an orderly stop; else raises SystemExit with an ``ExitCode``."""
    settings = settings.named(service_name)
    logs.configure(service_name, settings.instance, settings.log_level, settings.log_json)
    try:
        code = asyncio.run(serve_service(service_name, settings, build))
    except Exception:
        log.exception("%s failed", service_name)
        code = ExitCode.FAILED
    if code is not ExitCode.OK:
        raise SystemExit(int(code))


def one_line(error: ValidationError) -> str:
    """A settings error in one line that names the variable."""
    first = error.errors()[0]
    name = "_".join(str(part) for part in first["loc"]).upper()
    return f"RHEOCAST_{name}: {first['msg']}"
