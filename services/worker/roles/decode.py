"""decode: clean latents to pixels in host memory, with the stream's own causal cache."""

from __future__ import annotations

import numpy as np
import torch

from shared.engine.model.autoencoder import Autoencoder, DecoderState


class DecodeRole:
    """Holds every stream's decoder cache."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self._states: dict[str, DecoderState] = {}

    def open(self, stream: str) -> None:
        """A new stream, or the same one anew: its cache starts empty."""
        self._states[stream] = self._autoencoder.decoder_state()

    def close(self, stream: str) -> None:
        """Forget a stream."""
        self._states.pop(stream, None)

    def run(self, stream: str, latents: torch.Tensor) -> np.ndarray:
        """Decode consecutive latent frames [n, C, h, w] to uint8 [frames, height, width, 3].

        On a GPU the result is filled when the device has reached the job's end, which is when it is handed on.
        """
        return self._autoencoder.decode(self._states[stream], latents, wait=False).numpy()
