"""The full Wan encoder in front, the tiny decoder behind: what the public code does when TAEHV is asked for.

The published checkpoints were trained on what the full encoder makes; the decoder is where most of the time goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shared.engine.model.tiny_vae import VaeMemory
from shared.engine.model.tiny_vae_serving import ServingTinyVae

if TYPE_CHECKING:
    from shared.engine.model.wan_vae import WanVae


@dataclass(slots=True)
class MixedMemory:
    """One direction's memory of one stream: either half is empty until its direction is used."""

    encoder: Any
    decoder: VaeMemory = field(default_factory=VaeMemory)

    @property
    def started(self) -> bool:
        """Whether the direction that this memory is of has begun."""
        return self.encoder.started or self.decoder.started

    def clone(self) -> MixedMemory:
        """A copy that no later call changes."""
        return MixedMemory(self.encoder.clone(), self.decoder.clone())

    def values(self) -> list[Tensor | str | bool | int | None]:
        """All of it, for :meth:`restore`: how many are the encoder's, then those, then the decoder's."""
        encoder = self.encoder.values()
        return [len(encoder), *encoder, *self.decoder.values()]

    def restore(self, values: Sequence[Tensor | str | bool | int | None]) -> None:
        """Become what gave these values. Raises ValueError for those of another kind of memory."""
        count = values[0]
        if not isinstance(count, int) or isinstance(count, bool) or not 0 < count < len(values):
            raise ValueError("these are no values of a memory of two autoencoders")
        self.encoder.restore(values[1 : count + 1])
        self.decoder.restore(values[count + 1 :])

    def nbytes(self) -> int:
        """Bytes held."""
        return self.encoder.nbytes() + self.decoder.nbytes()


class MixedVae:
    """Encodes with one autoencoder and decodes with another of the same latent space. Holds no state."""

    def __init__(self, encoder: WanVae, decoder: ServingTinyVae) -> None:
        self.encoder, self.decoder = encoder, decoder
        self.dtype = decoder.dtype

    def new_memory(self) -> MixedMemory:
        """One direction's memory of one stream, empty."""
        return MixedMemory(self.encoder.new_memory())

    def encode(self, memory: MixedMemory, frames: Tensor) -> Tensor:
        """frames [n, 3, H, W] (uint8, or float in [0, 1]) → latents [m, C, H/8, W/8]: first 5 → 2, then 4 → 1."""
        return self.encoder.encode(memory.encoder, frames)

    def decode(self, memory: MixedMemory, latents: Tensor) -> Tensor:
        """latents [m, C, h, w] → frames [n, 3, 8h, 8w] in [0, 1]: first 2 → 5, then 1 → 4."""
        return self.decoder.decode(memory.decoder, latents)
