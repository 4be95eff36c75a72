"""decode: clean latents to pixels in host memory, with the stream's own causal cache."""

from __future__ import annotations

import numpy as np
import torch

from services.worker.roles.caches import Caches
from shared.engine.model.autoencoder import Autoencoder
from shared.engine.plan.spec import FRAMES_PER_LATENT


class DecodeRole:
    """Holds every stream's decoder cache."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self.caches = Caches("decode", autoencoder.decoder_state, autoencoder.device)

    def run(self, stream: str, latents: torch.Tensor, frames: int | None = None) -> np.ndarray:
        """Decode consecutive latent frames [n, C, h, w] to uint8 [frames, height, width, 3].

        ``frames``: how many are wanted; a cache that starts empty in the middle of a stream gives fewer by itself, because its
        first latent frame holds one pixel frame. It then starts from a standing picture, which is not shown.

        On a GPU the result is filled when the device has reached the job's end, which is when it is handed on.
        """
        state = self.caches.of(stream)
        starts_late = frames is not None and not state.started and frames == len(latents) * FRAMES_PER_LATENT
        if starts_late:
            latents = torch.cat([latents[:1], latents])
        pixels = self._autoencoder.decode(state, latents, wait=False).numpy()
        return pixels[1:] if starts_late else pixels
