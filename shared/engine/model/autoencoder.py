"""An autoencoder as a worker uses it: pictures in, the DiT's latents out, and back. One for any architecture.

The autoencoder is shared; what a stream has seen lives in the memory object that the stream owns.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from shared.engine.model.transfers import to_device, to_host, used_here
from shared.engine.plan.spec import ModelSpec


class StreamingVae(Protocol):
    """What ``TinyVae`` and the Wan VAE offer: causal, with the memory held outside."""

    def encode(self, memory: Any, frames: Tensor) -> Tensor:
        """frames [n, 3, H, W] → latents [m, C, h, w]."""
        ...

    def decode(self, memory: Any, latents: Tensor) -> Tensor:
        """latents [m, C, h, w] → frames [n, 3, H, W] in [0, 1]."""
        ...

    def new_memory(self) -> Any:
        """The memory of one direction of one stream, empty."""
        ...


EncoderState = Any
DecoderState = Any


class Autoencoder:
    """Pixels as they travel (uint8 [n, H, W, 3]) and latents as the DiT takes them (shifted and scaled by the spec)."""

    def __init__(self, vae: StreamingVae, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self._vae = vae
        self._device = self.device = device
        self._dtype = dtype
        self._scale = _per_channel(spec.latent_scale, spec.latent_channels, 1.0, device)
        self._shift = _per_channel(spec.latent_shift, spec.latent_channels, 0.0, device)
        self._encoder_scale = _per_channel(spec.encoder_scale, spec.latent_channels, 1.0, device)
        self._encoder_shift = _per_channel(spec.encoder_shift, spec.latent_channels, 0.0, device)
        self._rescale = bool(spec.encoder_scale or spec.encoder_shift)
        self._normalise = spec.encoder_normalised and bool(spec.latent_scale or spec.latent_shift)
        self._denormalise = bool(spec.latent_scale or spec.latent_shift)

    def encoder_state(self) -> EncoderState:
        """A stream's encoder memory, empty."""
        return self._vae.new_memory()

    def decoder_state(self) -> DecoderState:
        """A stream's decoder memory, empty."""
        return self._vae.new_memory()

    @torch.inference_mode()
    def encode(self, state: EncoderState, pixels: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] → [m, C, h, w]: a stream's first 5 frames make 2 latents, each later 4 make 1."""
        frames = to_device(pixels, self._device).permute(0, 3, 1, 2).to(self._dtype).div_(255)
        latents = self._vae.encode(state, frames)
        if self._normalise:
            latents = ((latents.float() - self._shift) / self._scale).to(latents.dtype)
        if self._rescale:
            latents = (latents.float() * self._encoder_scale + self._encoder_shift).to(latents.dtype)
        return latents

    @torch.inference_mode()
    def decode(self, state: DecoderState, latents: Tensor, *, wait: bool = True) -> Tensor:
        """[m, C, h, w] → uint8 [n, H, W, 3] on the CPU.

        Without ``wait`` the copy from a GPU may still be under way: it is done when the current CUDA stream gets there.
        """
        used_here(latents)
        if self._denormalise:
            latents = (latents.float() * self._scale + self._shift).to(self._dtype)
        frames = self._vae.decode(state, latents.to(self._dtype))
        pixels = frames.float().mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return to_host(pixels, wait=wait)


def _per_channel(values: tuple[float, ...], channels: int, default: float, device: torch.device) -> Tensor:
    """One value per latent channel, [C, 1, 1] float32."""
    return torch.tensor(values or (default,) * channels, device=device, dtype=torch.float32)[:, None, None]
