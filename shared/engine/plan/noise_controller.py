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

MAX_TIMESTEP = 1000
MIN_TIMESTEP = 10
MIN_GAP = 10
"""At the low end one entry of the shifted sigma table spans 8 timesteps: closer steps could share one sigma."""


class NoiseForm(StrEnum):
    """What motion is measured on."""

    PIXEL = "pixel"
    LATENT = "latent"


@dataclass(frozen=True, slots=True)
class NoiseSettings:
    """Constants of the controller.

    ``s0`` is the noise scale of a still picture, ``gain`` what full motion takes off it, ``full_motion`` the RMSE that
    counts as full motion (pixels in [−1, 1]), ``smoothing`` is λ. The latent form has its own scale of full motion and
    goes between ``s_max`` and ``s_min``; None means s₀ and s₀ − gain.
    """

    s0: float = 0.8
    gain: float = 0.1
    full_motion: float = 0.2
    smoothing: float = 0.9
    form: NoiseForm = NoiseForm.PIXEL
    window: int = 4
    latent_full_motion: float = 0.2
    s_max: float | None = None
    s_min: float | None = None

    def __post_init__(self) -> None:
        for name in ("s0", "gain", "smoothing", "s_max", "s_min"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} = {value} will not do: a number from 0 to 1 is needed")
        if self.full_motion <= 0.0 or self.latent_full_motion <= 0.0:
            raise ValueError("the RMSE of full motion must be above 0")
        if self.window < 1:
            raise ValueError(f"window = {self.window} will not do: at least one latent difference is needed")


@dataclass(frozen=True, slots=True)
class NoiseEstimate:
    """One chunk's result: ``motion`` is d̂ in 0…1, ``noise_scale`` is s in 0…1, ``first_timestep`` in 0…1000."""

    motion: float
    noise_scale: float
    first_timestep: int


def first_timestep(noise_scale: float) -> int:
    """int(1000·s) − 100, kept within what :func:`step_timesteps` can use.

    A hair is added before rounding down, so that s₀ = 0.8 smoothed with itself gives 700 and not 699.
    """
    return min(max(int(MAX_TIMESTEP * noise_scale + 1e-6) - 100, MIN_TIMESTEP), MAX_TIMESTEP)


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

    def __init__(self, settings: NoiseSettings | None = None) -> None:
        self.settings = settings if settings is not None else NoiseSettings()
        self._s0 = self.settings.s0
        self._previous = self._s0
        self._signature: tuple[float, ...] | None = None
        self._differences: deque[float] = deque(maxlen=self.settings.window)

    @property
    def s0(self) -> float:
        """The noise scale of a still picture, as last set."""
        return self._s0

    @property
    def noise_scale(self) -> float:
        """s of the newest chunk; s₀ before the first one."""
        return self._previous

    def set_s0(self, s0: float) -> None:
        """Change s₀ from the next chunk on; the smoothing carries over, so the change is felt within two chunks."""
        if not 0.0 <= s0 <= 1.0:
            raise ValueError(f"s0 = {s0} will not do: a number from 0 to 1 is needed")
        self._s0 = s0

    def update(self, rmse: Sequence[float], signature: Sequence[float] = ()) -> NoiseEstimate:
        """Take the next chunk and use the settings' form.

        ``rmse`` holds one value per frame: RMSE(f_t − f_{t−1}), pixels in [−1, 1]; the first frame of a stream has 0.
        ``signature`` is the newest latent frame, average-pooled. Without one the latent form falls back to the pixels.
        """
        if self.settings.form is NoiseForm.LATENT and signature:
            return self.update_latents(signature)
        return self.update_pixels(rmse)

    def update_pixels(self, rmse: Sequence[float]) -> NoiseEstimate:
        """The pixel form."""
        motion = _unit(max(rmse, default=0.0) / self.settings.full_motion)
        return self._smooth(motion, self._s0 - self.settings.gain * motion)

    def update_latents(self, signature: Sequence[float]) -> NoiseEstimate:
        """The latent form. A signature of another length starts the differences anew (the stream's size changed)."""
        newest = tuple(signature)
        before = self._signature
        self._signature = newest
        if before is not None and len(before) == len(newest) and newest:
            square = sum((a - b) ** 2 for a, b in zip(newest, before, strict=True)) / len(newest)
            self._differences.append(math.sqrt(square))
        else:
            self._differences.clear()
        mean = sum(self._differences) / len(self._differences) if self._differences else 0.0
        motion = _unit(mean / self.settings.latent_full_motion)
        highest, lowest = self._range()
        return self._smooth(motion, highest - (highest - lowest) * motion)

    def _range(self) -> tuple[float, float]:
        changed = self._s0 != self.settings.s0
        highest = self._s0 if changed or self.settings.s_max is None else self.settings.s_max
        if self.settings.s_min is None or changed:
            return highest, max(0.0, highest - self.settings.gain)
        return highest, min(self.settings.s_min, highest)

    def _smooth(self, motion: float, target: float) -> NoiseEstimate:
        weight = self.settings.smoothing
        self._previous = _unit(weight * target + (1.0 - weight) * self._previous)
        return NoiseEstimate(motion, self._previous, first_timestep(self._previous))

    def state(self) -> dict[str, Any]:
        """What another instance needs to go on exactly here: plain numbers and lists."""
        return {
            "s0": self._s0,
            "previous": self._previous,
            "signature": list(self._signature) if self._signature is not None else None,
            "differences": list(self._differences),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], settings: NoiseSettings | None = None) -> NoiseController:
        """The controller whose :meth:`state` this is. Raises ValueError when it is not one."""
        controller = cls(settings)
        try:
            controller.set_s0(float(state["s0"]))
            controller._previous = _unit(float(state["previous"]))
            signature = state.get("signature")
            controller._signature = None if signature is None else tuple(float(value) for value in signature)
            controller._differences.extend(float(value) for value in state.get("differences", ()))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the state of a noise controller: {error!r}") from error
        return controller


def _unit(value: float) -> float:
    """Clamped to 0…1; what is not a number counts as full motion, so it never raises the noise."""
    return 1.0 if math.isnan(value) else min(max(value, 0.0), 1.0)
