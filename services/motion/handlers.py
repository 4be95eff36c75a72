"""Motion's handlers: decode → core → publish, and the mirror in the session store."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from services.motion.core import MotionCore, Refusal
from services.motion.settings import Settings
from shared.bus.port import BusError, Received
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream, NoSource, StreamSpec, TakeStream
from shared.contracts.events import ChunkStamp, LatentsEncoded, MotionEstimated
from shared.contracts.timing import ended_ns, timing_of
from shared.engine.plan.noise_controller import MAX_TIMESTEP
from shared.engine.plan.registry import model_spec
from shared.engine.plan.spec import NoiseSpec, SpecError
from shared.lifecycle import Context
from shared.session.port import NoSuchStreamError, StoreUnavailableError
from shared.session.state import TERMINAL_STATES, Owner
from shared.telemetry import names
from shared.telemetry.hops import record_hop

log = logging.getLogger(__name__)

NOT_OURS_S = 1.0  # how long the store is not asked again about a stream that is not ours
MAX_NOT_OURS = 1024


class Handlers:
    """Wires subjects to the core."""

    def __init__(self, settings: Settings, context: Context, core: MotionCore) -> None:
        self._settings = settings
        self._context = context
        self._core = core
        self._dirty: dict[str, None] = {}
        self._not_ours: dict[str, float] = {}
        self._queue_histogram = context.telemetry.meter.create_histogram(names.HOP_QUEUE, unit="ms")
        self._compute_histogram = context.telemetry.meter.create_histogram(names.HOP_COMPUTE, unit="ms")
        self._compute = context.metrics.histogram(names.ROLE_COMPUTE)
        self.compute_ms = 0.0

    # --- assignments -------------------------------------------------------------------------------------------------

    async def on_assign(self, received: Received) -> None:
        """TakeStream, LeaveStream. Others' assignments are not ours."""
        message = received.message
        if message.instance != self._context.instance:
            return
        if isinstance(message, TakeStream):
            self._not_ours.pop(message.stream, None)
            await self._take(message)
        elif isinstance(message, LeaveStream):
            self._core.leave(message.stream, message.epoch, drain=message.drain, now=self._context.clock.monotonic())
            if message.stream not in self._core.streams:
                self._dirty.pop(message.stream, None)

    async def _take(self, message: TakeStream) -> None:
        mirror: object = None
        if message.stream not in self._core.streams:
            session = await self._session(message.stream)
            mirror = session.get("controller") if session is not None else None
        models, now = self._settings.models_dir, self._context.clock.monotonic()
        refusal = self._core.take(
            message.stream,
            message.epoch,
            message.noise,
            noise_spec(message.spec.model, models),
            mirror,
            now,
            message.noise_version,
            pure_noise(message.spec, models),
        )
        if refusal is not None:
            log.info("stream %s in epoch %d is not taken: %s", message.stream, message.epoch, refusal)
        else:
            self._dirty[message.stream] = None

    async def _session(self, stream: str) -> dict[str, object] | None:
        try:
            return await self._context.store.get(stream)
        except StoreUnavailableError as error:
            log.warning("stream %s starts without its mirror: %s", stream, error)
            return None

    async def _adopt(self, stamp: ChunkStamp) -> None:
        """A chunk of a stream nobody told us of: this process was restarted. The session store knows."""
        now = self._context.clock.monotonic()
        if now < self._not_ours.get(stamp.stream, 0.0):
            return
        session = await self._session(stamp.stream)
        assignment = session.get("assignment") if session is not None else None
        if (
            session is None
            or not isinstance(assignment, dict)
            or session["state"] in TERMINAL_STATES
            or assignment.get("motion") not in (None, "", self._context.instance)
            or assignment.get("epoch") != stamp.epoch
        ):
            while len(self._not_ours) >= MAX_NOT_OURS:
                self._not_ours.pop(next(iter(self._not_ours)))
            self._not_ours[stamp.stream] = now + NOT_OURS_S
            return
        wanted, models = StreamSpec.model_validate(session["spec"]), self._settings.models_dir
        spec = noise_spec(wanted.model, models)
        noise, version = float(assignment.get("noise", spec.s0)), int(assignment.get("noise_version", 0))
        mirror, pure = session.get("controller"), pure_noise(wanted, models)
        if self._core.take(stamp.stream, stamp.epoch, noise, spec, mirror, now, version, pure) is None:
            log.info("stream %s goes on from the session store at chunk %d", stamp.stream, stamp.chunk)

    # --- chunks ------------------------------------------------------------------------------------------------------

    async def on_latents(self, received: Received) -> None:
        """LatentsEncoded → MotionEstimated."""
        chunk: LatentsEncoded = received.message
        stamp, core = chunk.stamp, self._core
        if not core.knows(stamp.stream, stamp.epoch) and not core.has_left(stamp.stream, stamp.epoch):
            known = core.streams.get(stamp.stream)
            if known is None or stamp.epoch > known.epoch:
                await self._adopt(stamp)
        begin_ns, began = time.time_ns(), time.perf_counter()
        estimate = core.estimate(chunk, self._context.clock.monotonic())
        if isinstance(estimate, Refusal):
            return
        compute_ms, after_ns = (time.perf_counter() - began) * 1e3, ended_ns(stamp, chunk.timings)
        timing = timing_of(
            names.MOTION, after_ns, received.received_ns, begin_ns, compute_ms, instance=self._context.instance
        )
        message = MotionEstimated(
            stamp=stamp,
            latents=chunk.latents,
            latent_frames=chunk.latent_frames,
            motion=estimate.motion,
            noise_scale=estimate.noise_scale,
            first_timestep=estimate.first_timestep,
            noise_version=core.streams[stamp.stream].noise_version,
            timings=(*chunk.timings, timing),
        )
        try:
            await self._context.bus.publish(subjects.stream(stamp.stream, "motion"), message)
        except BusError as error:
            core.count("unsent")
            log.warning("chunk %d of stream %s was not sent on: %s", stamp.chunk, stamp.stream, error)
        record_hop(self._context.telemetry.tracer, stamp, timing)
        self._dirty[stamp.stream] = None
        self.compute_ms += 0.1 * (compute_ms - self.compute_ms)
        self._queue_histogram.record(timing.queue_ms, {names.HOP: names.MOTION})
        self._compute_histogram.record(compute_ms, {names.HOP: names.MOTION})
        self._compute.record(compute_ms / 1e3, stamp.trace, hop=names.MOTION)

    # --- the mirror --------------------------------------------------------------------------------------------------

    async def mirror(self) -> None:
        """Copy the controllers that have changed to the session store. Raises StoreUnavailableError; what was not
        copied stays to be."""
        while self._dirty:
            stream = next(iter(self._dirty))
            known = self._core.streams.get(stream)
            if known is not None:
                try:
                    await self._context.store.put(stream, Owner.MOTION, {"controller": known.mirror()})
                except NoSuchStreamError:
                    log.debug("stream %s is gone from the session store", stream)
            self._dirty.pop(stream, None)


def pure_noise(spec: StreamSpec, models_dir: Path | None = None) -> int:
    """The first timestep of a stream without a source; 0 for one that has a source."""
    if not isinstance(spec.source, NoSource):
        return 0
    try:
        return model_spec(spec.model, models_dir).steps_from_text[0]
    except SpecError:
        return MAX_TIMESTEP


def noise_spec(model: str, models_dir: Path | None = None) -> NoiseSpec:
    """The noise constants of a model; the defaults for one that only the workers know."""
    try:
        return model_spec(model, models_dir).noise
    except SpecError:
        return NoiseSpec()
