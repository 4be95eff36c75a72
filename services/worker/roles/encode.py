"""encode: pixels to latents, with the stream's own causal cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from services.worker.roles.caches import Caches
from shared.engine.model.autoencoder import Autoencoder
from shared.engine.model.transfers import to_host
from shared.engine.plan.spec import FRAMES_PER_LATENT

SIGNATURE_SIDE = 4


@dataclass(frozen=True, slots=True)
class Encoded:
    """``latents`` [latent frames, C, h, w] on the device; ``pooled`` a 4×4 mean of the newest frame's channels.

    On a GPU ``pooled`` is filled when the device has reached the job's end.
    """

    latents: torch.Tensor
    pooled: torch.Tensor

    @property
    def signature(self) -> tuple[float, ...]:
        """The 16 numbers of ``pooled``, for the motion estimator."""
        return tuple(float(value) for value in self.pooled.flatten().tolist())


class EncodeRole:
    """Holds every stream's encoder cache."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self.caches = Caches("encode", autoencoder.encoder_state, autoencoder.device)

    def run(self, stream: str, pixels: np.ndarray) -> Encoded:
        """Encode one chunk. ``pixels``: uint8 [frames, height, width, 3]. Raises KeyError for an unknown stream.

        A cache that starts empty in the middle of a stream starts from a standing picture: a causal autoencoder's first
        latent frame holds one pixel frame, and this chunk has four for each.
        """
        state, frames = self.caches.of(stream), torch.from_numpy(pixels)
        starts_late = not state.started and len(pixels) % FRAMES_PER_LATENT == 0
        if starts_late:
            frames = torch.cat([frames[:1], frames])
        latents = self._autoencoder.encode(state, frames)
        if starts_late:
            latents = latents[1:]
        pooled = torch.nn.functional.adaptive_avg_pool2d(latents[-1].float(), SIGNATURE_SIDE).mean(0)
        return Encoded(latents, to_host(pooled, wait=False))
