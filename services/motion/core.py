"""What motion decides: which chunks get an estimate, and from which state. Pure; time is passed in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, cast

from shared.contracts.events import ChunkStamp, LatentsEncoded
from shared.contracts.order import Arrival, OrderGate
from shared.engine.plan.noise_controller import NoiseController, NoiseEstimate, NoiseForm, first_timestep
from shared.engine.plan.spec import NoiseSpec

MAX_LEFT = 4096


class Refusal(StrEnum):
    """Why a chunk or an assignment is not used."""

    UNKNOWN_STREAM = "unknown_stream"
    OLD_EPOCH = "old_epoch"
    DUPLICATE = "duplicate"
    LEFT = "left"
    FULL = "full"


@dataclass(slots=True)
class MotionStream:
    """One stream: its controller, and which chunks have passed in this epoch."""

    stream: str
    epoch: int
    controller: NoiseController
    gate: OrderGate = field(default_factory=OrderGate)
    motion: float = 0.0
    used: float = 0.0  # when it was taken, or its newest chunk came
    draining: bool = False
    noise_version: int = 0  # the newest s₀ that it was given
    pure_noise: int = 0  # without a source: the first timestep of text to video; 0: there is one

    def mirror(self) -> dict[str, Any]:
        """What another instance needs to go on here."""
        return {
            "epoch": self.epoch,
            "chunk": self.gate.newest,
            "motion": self.motion,
            "noise_version": self.noise_version,
            "state": self.controller.state(),
        }


class MotionCore:
    """All streams of one motion service. ``counts`` tells what was refused, by reason."""

    def __init__(self, form: NoiseForm = NoiseForm.PIXEL, max_streams: int = 1024) -> None:
        self.streams: dict[str, MotionStream] = {}
        self.counts: dict[str, int] = {}
        self._form = form
        self._max_streams = max_streams
        self._left: OrderedDict[str, int] = OrderedDict()

    def count(self, reason: Refusal | str) -> None:
        """One more of these."""
        self.counts[str(reason)] = self.counts.get(str(reason), 0) + 1

    # --- assignments -------------------------------------------------------------------------------------------------

    def knows(self, stream: str, epoch: int) -> bool:
        """Whether this epoch of the stream is here."""
        known = self.streams.get(stream)
        return known is not None and known.epoch == epoch

    def take(
        self,
        stream: str,
        epoch: int,
        noise: float,
        spec: NoiseSpec,
        mirror: object = None,
        now: float = 0.0,
        noise_version: int = 0,
        pure_noise: int = 0,
    ) -> Refusal | None:
        """Take a stream, or a new s₀ for one that is here. None when it is taken.

        ``pure_noise`` is the first timestep of a stream without a source, 0 for any other. ``mirror`` is what an earlier
        life left in the session store. A new epoch keeps the controller, since the picture goes on, and counts its chunks
        anew.
        """
        known = self.streams.get(stream)
        if epoch < max(known.epoch if known is not None else 0, self._left.get(stream, 0)):
            self.count(Refusal.OLD_EPOCH)
            return Refusal.OLD_EPOCH
        if known is not None:
            if noise_version >= known.noise_version or epoch > known.epoch:
                known.controller.set_s0(noise)
                known.noise_version = noise_version
            else:
                self.count("old_noise")  # an assignment that was delivered once more, after a newer one
            if known.epoch != epoch:
                known.epoch, known.gate, known.draining = epoch, OrderGate(), False
            known.used = now
            return None
        if len(self.streams) >= self._max_streams:
            self.count(Refusal.FULL)
            return Refusal.FULL
        # Assignments come in order, so a stream that is taken after it was let go is really back.
        self._left.pop(stream, None)
        taken = self._resumed(stream, epoch, noise, spec, mirror, noise_version)
        taken = taken or MotionStream(stream, epoch, NoiseController(spec, noise, self._form))
        taken.used, taken.pure_noise = now, pure_noise
        taken.noise_version = max(taken.noise_version, noise_version)  # its s₀ goes with it, see _resumed
        self.streams[stream] = taken
        return None

    def _resumed(
        self, stream: str, epoch: int, noise: float, spec: NoiseSpec, mirror: object, noise_version: int
    ) -> MotionStream | None:
        if not isinstance(mirror, Mapping):
            return None
        kept = cast("Mapping[str, Any]", mirror)
        try:
            controller = NoiseController.from_state(kept["state"], spec)
            same = int(kept["epoch"]) == epoch
            newest = int(kept["chunk"]) if same else -1
            motion = float(kept.get("motion", 0.0))
            version = int(kept.get("noise_version", 0)) if same else 0
            if noise_version >= version:
                controller.set_s0(noise)
        except (KeyError, TypeError, ValueError):
            self.count("bad_mirror")
            return None
        self.count("resumed")
        return MotionStream(stream, epoch, controller, OrderGate(newest), motion, noise_version=version)

    def leave(self, stream: str, epoch: int, *, drain: bool, now: float) -> None:
        """Let a stream go: at once, or with ``drain`` once its chunks have ceased (see ``forget_idle``)."""
        known = self.streams.get(stream)
        if known is not None and epoch < known.epoch:
            self.count(Refusal.OLD_EPOCH)
            return
        if known is not None and drain:
            known.draining, known.used = True, now
            return
        self.streams.pop(stream, None)
        self._left[stream] = max(epoch, self._left.get(stream, 0))
        self._left.move_to_end(stream)
        while len(self._left) > MAX_LEFT:
            self._left.popitem(last=False)

    def has_left(self, stream: str, epoch: int) -> bool:
        """Whether this epoch (or a later one) of the stream was let go."""
        return stream not in self.streams and epoch <= self._left.get(stream, -1)

    def forget_idle(self, now: float, drained_s: float, idle_s: float) -> list[str]:
        """Let go the draining streams that had no chunk for ``drained_s``, and forget any other after ``idle_s``.

        The latter may come back: its next chunk finds it in the session store.
        """
        gone: list[str] = []
        for known in list(self.streams.values()):
            if known.draining and now - known.used >= drained_s:
                self.leave(known.stream, known.epoch, drain=False, now=now)
                gone.append(known.stream)
            elif now - known.used >= idle_s:
                del self.streams[known.stream]
                gone.append(known.stream)
        return gone

    # --- chunks ------------------------------------------------------------------------------------------------------

    def estimate(self, chunk: LatentsEncoded, now: float) -> NoiseEstimate | Refusal:
        """The chunk's noise, once per chunk. One that was overtaken gets the newest chunk's and changes no state."""
        stamp: ChunkStamp = chunk.stamp
        known = self.streams.get(stamp.stream)
        if known is None or stamp.epoch > known.epoch:
            return self._refused(Refusal.LEFT if self.has_left(stamp.stream, stamp.epoch) else Refusal.UNKNOWN_STREAM)
        if stamp.epoch < known.epoch:
            return self._refused(Refusal.OLD_EPOCH)
        arrival = known.gate.arrive(stamp.chunk)
        if arrival is Arrival.DUPLICATE:
            return self._refused(Refusal.DUPLICATE)
        known.used = now
        if known.pure_noise:
            return NoiseEstimate(0.0, 1.0, known.pure_noise)
        if arrival is Arrival.OVERTAKEN:
            self.count("overtaken")
            controller = known.controller
            scale = controller.noise_scale
            return NoiseEstimate(known.motion, scale, first_timestep(scale, controller.spec.first_step_margin))
        estimate = known.controller.update(chunk.rmse, chunk.signature)
        known.motion = estimate.motion
        return estimate

    def _refused(self, reason: Refusal) -> Refusal:
        self.count(reason)
        return reason
