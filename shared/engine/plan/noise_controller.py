"""How much noise a chunk gets: the more moves, the less of the source is replaced.

Two forms, both smoothed per stream. With d̂ the motion, scaled and clamped to 0…1:

* pixel form:  s = λ·(s₀ − gain·d̂) + (1−λ)·s_prev, d = the largest frame-to-frame RMSE of the chunk;
* latent form: s = λ·(s_max − (s_max − s_min)·d̂) + (1−λ)·s_prev, d = the mean RMSE of the last ``window`` latent steps.

The chunk's first denoising timestep follows: int(1000·s) − 100.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from shared.engine.plan.spec import NoiseSpec

MAX_TIMESTEP = 1000
MIN_TIMESTEP = 10
MIN_GAP = 10
"""At the low end one entry of the shifted sigma table spans 8 timesteps: closer steps could share one sigma."""


class NoiseForm(StrEnum):
    """What motion is measured on."""

    PIXEL = "pixel"
    LATENT = "latent"


@dataclass(frozen=True, slots=True)
class NoiseEstimate:
    """One chunk's result: ``motion`` is d̂ in 0…1, ``noise_scale`` is s in 0…1, ``first_timestep`` in 0…1000."""

    motion: float
    noise_scale: float
    first_timestep: int


def first_timestep(noise_scale: float, margin: int = 100) -> int:
    """int(1000·s) − margin, kept within what :func:`step_timesteps` can use.

    A hair is added before rounding down, so that s₀ = 0.8 smoothed with itself gives 700 and not 699.
    """
    return min(max(int(MAX_TIMESTEP * noise_scale + 1e-6) - margin, MIN_TIMESTEP), MAX_TIMESTEP)


def step_timesteps(first_timestep: int, steps: Sequence[int]) -> tuple[int, ...]:
    """The timesteps of one block's K steps: ``steps`` (the first K of the model's list), the first one replaced.

    Later steps keep the model's values while they lie at least ``MIN_GAP`` below the one before. If the replaced first
    step does not (a small s₀), the later ones shrink in proportion to it, so that each step still does a share of the
    work. The result is strictly decreasing and never below ``MIN_TIMESTEP``; where K steps do not fit between that and
    ``first_timestep``, the first one is raised.
    """
    count = len(steps)
    if count == 0:
        raise ValueError("a block needs at least one denoising step")
    first = min(max(first_timestep, MIN_TIMESTEP + (count - 1) * MIN_GAP), MAX_TIMESTEP)
    fits = count == 1 or first - steps[1] >= MIN_GAP
    scale = 1.0 if fits else min(1.0, first / steps[0])
    result = [first]
    for index in range(1, count):
        lowest = MIN_TIMESTEP + (count - 1 - index) * MIN_GAP
        result.append(max(lowest, min(int(steps[index] * scale), result[-1] - MIN_GAP)))
    return tuple(result)


class NoiseController:
    """The noise of one stream, chunk by chunk. Feed it every chunk once, in order."""

    def __init__(
        self, spec: NoiseSpec | None = None, s0: float | None = None, form: NoiseForm = NoiseForm.PIXEL
    ) -> None:
        """``s0`` is the stream's own noise scale of a still picture; None takes the model's."""
        self.spec = spec if spec is not None else NoiseSpec()
        self.form = form
        self._s0 = _checked(self.spec.s0 if s0 is None else s0)
        self._previous = self._s0
        self._signature: tuple[float, ...] | None = None
        self._differences: deque[float] = deque(maxlen=max(1, self.spec.latent_window))

    @property
    def s0(self) -> float:
        """The noise scale of a still picture, as last set."""
        return self._s0

    @property
    def noise_scale(self) -> float:
        """s of the newest chunk; s₀ before the first one."""
        return self._previous

    def set_s0(self, s0: float) -> None:
        """Change s₀ from the next chunk on. Smoothing carries over: nine tenths of the change show in that chunk."""
        self._s0 = _checked(s0)

    def update(self, rmse: Sequence[float], signature: Sequence[float] = ()) -> NoiseEstimate:
        """Take the next chunk, by the controller's form.

        ``rmse`` holds one value per frame: RMSE(f_t − f_{t−1}), pixels in [−1, 1]; the first frame of a stream has 0.
        ``signature`` is the newest latent frame, average-pooled. Without one the latent form falls back to the pixels.
        """
        if self.form is NoiseForm.LATENT and signature:
            return self.update_latents(signature)
        return self.update_pixels(rmse)

    def update_pixels(self, rmse: Sequence[float]) -> NoiseEstimate:
        """The pixel form. No frames at all count as no motion."""
        motion = _unit(max((_number(value) for value in rmse), default=0.0) / self.spec.pixel_full)
        return self._smooth(motion, self._s0 - self.spec.gain * motion)

    def update_latents(self, signature: Sequence[float]) -> NoiseEstimate:
        """The latent form. A signature of another length starts the window anew (the stream's size changed).

        A stream's own s₀ moves both ends of the model's range by as much as it differs from the model's s₀.
        """
        newest = tuple(_number(value) for value in signature)
        before, self._signature = self._signature, newest
        if before is not None and newest and len(before) == len(newest):
            square = sum((a - b) ** 2 for a, b in zip(newest, before, strict=True)) / len(newest)
            self._differences.append(math.sqrt(square))
        else:
            self._differences.clear()
        mean = sum(self._differences) / len(self._differences) if self._differences else 0.0
        motion = _unit(mean / self.spec.latent_full)
        own = self._s0 - self.spec.s0
        return self._smooth(motion, self.spec.s_max + own - (self.spec.s_max - self.spec.s_min) * motion)

    def _smooth(self, motion: float, target: float) -> NoiseEstimate:
        weight = self.spec.smoothing
        self._previous = _unit(weight * target + (1.0 - weight) * self._previous)
        return NoiseEstimate(motion, self._previous, first_timestep(self._previous, self.spec.first_step_margin))

    def state(self) -> dict[str, Any]:
        """What another instance needs to go on exactly here: plain numbers, strings and lists."""
        return {
            "form": self.form.value,
            "s0": self._s0,
            "previous": self._previous,
            "signature": None if self._signature is None else list(self._signature),
            "differences": list(self._differences),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], spec: NoiseSpec | None = None) -> NoiseController:
        """The controller whose :meth:`state` this is. Raises ValueError when it is not one."""
        try:
            controller = cls(spec, float(state["s0"]), NoiseForm(state["form"]))
            controller._previous = _checked(float(state["previous"]))
            signature = state["signature"]
            controller._signature = None if signature is None else tuple(float(value) for value in signature)
            controller._differences.extend(float(value) for value in state["differences"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of a noise controller: {error!r}") from error
        return controller


def _checked(scale: float) -> float:
    if not 0.0 <= scale <= 1.0:
        raise ValueError(f"noise scale {scale} will not do: a number from 0 to 1 is needed")
    return scale


def _number(value: float) -> float:
    """What is not a number counts as no motion, so that one bad frame cannot poison the smoothing."""
    return value if math.isfinite(value) else 0.0


def _unit(value: float) -> float:
    return min(max(value, 0.0), 1.0)
