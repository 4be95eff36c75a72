"""The embedded model, ready to run clips as they are served: streamed, rolling KV cache, noise controller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from bench.clips import FIRST, chunks_of
from shared.engine.model.autoencoder import Autoencoder
from shared.engine.model.loading import load_text_encoder, load_vae, tiny_decoder_dtype
from shared.engine.plan.noise_controller import NoiseController, step_timesteps
from shared.engine.plan.sigmas import sigma_of
from shared.engine.plan.spec import FRAMES_PER_LATENT, ModelSpec
from shared.engine.random import epsilon
from shared.engine.stage import Stage
from shared.engine.stepper import Stepper
from shared.media.flow import FlowFinder
from shared.media.steadying import Place, Steadier


class Rig:
    """One model with one setting. Clips are uint8 [n, H, W, 3] with n = 4k + 1, and so is what comes back."""

    def __init__(self, spec: ModelSpec, folder: Path, steps: int, seed: int) -> None:
        self.spec, self.steps, self.seed = spec, steps, seed
        cv2.setNumThreads(1)  # as in egress
        device, dtype = torch.device("cpu"), torch.float32
        vae = load_vae(spec, folder, device, dtype, tiny_decoder_dtype(device, dtype))  # as it is served
        self.autoencoder = Autoencoder(vae, spec, device, dtype)
        self.text = load_text_encoder(spec, folder)
        self.stage = Stage.load(spec, folder)
        self.stepper = Stepper(spec, [self.stage], self.autoencoder)

    def reconstruct(self, clip: Tensor) -> Tensor:
        """Encoded and decoded in a stream, without the DiT."""
        encoder, decoder = self.autoencoder.encoder_state(), self.autoencoder.decoder_state()
        parts = [self.autoencoder.decode(decoder, self.autoencoder.encode(encoder, c)) for c, _ in chunks_of(clip)]
        return torch.cat(parts)

    def restyle(
        self,
        clip: Tensor,
        prompt: str,
        changes: Mapping[int, str] | None = None,
        blend_chunks: int = 0,
        steadied: bool = True,
    ) -> Tensor:
        """The clip as a viewer would get it. ``changes``: new prompts by the chunk they come before."""
        height, width = clip.shape[1:3]
        self.stepper.open("clip", width, height, self.text.encode(prompt), steps=self.steps, seed=self.seed)
        parts: list[Tensor] = []
        for number, (pixels, rmse) in enumerate(chunks_of(clip)):
            if changes and number in changes:
                self.stepper.set_prompt("clip", self.text.encode(changes[number]), blend_chunks)
            parts += self.stepper.tick({"clip": pixels}, {"clip": rmse}).values()
        while sum(len(part) for part in parts) < len(clip):
            parts += self.stepper.tick({}).values()
        self.stepper.close("clip")
        made = torch.cat(parts)
        return self.steadied(made, clip) if steadied else made

    def steadied(self, made: Tensor, clip: Tensor) -> Tensor:
        """What was made of the clip, as egress steadies it along the flow that ingest finds."""
        if not self.spec.steadying:
            return made
        finder, steadier = FlowFinder(), Steadier(self.spec.steadying)
        shown: list[np.ndarray] = []
        for chunk, (pixels, _) in enumerate(chunks_of(clip)):
            flow = finder.chunk(list(pixels.numpy()))
            for position in range(len(pixels)):
                place = Place(chunk, position, position == len(pixels) - 1)
                shown.append(steadier.frame(made[len(shown)].numpy(), flow, place))
        return torch.from_numpy(np.stack(shown))

    @torch.inference_mode()
    def restyle_alone(self, clip: Tensor, prompt: str) -> Tensor:
        """Per-frame processing by the same model: every latent frame by itself, without KV cache and steadying."""
        text, noise = self.text.encode(prompt)[None], NoiseController(self.spec.noise)
        encoder, decoder = self.autoencoder.encoder_state(), self.autoencoder.decoder_state()
        parts: list[Tensor] = []
        index = 0
        for pixels, rmse in chunks_of(clip):
            latents = self.autoencoder.encode(encoder, pixels).float()
            estimate = noise.update(rmse)
            times = step_timesteps(estimate.first_timestep, self.spec.steps[: self.steps])
            clean: list[Tensor] = []
            for z in latents:
                frame = 0 if self.spec.noise.still(estimate.motion) else index
                clean.append(self._denoise_alone(z, estimate.noise_scale, times, frame, text))
                index += 1
            parts.append(self.autoencoder.decode(decoder, torch.stack(clean)))
        return torch.cat(parts)

    def _denoise_alone(self, z: Tensor, s: float, times: tuple[int, ...], index: int, text: Tensor) -> Tensor:
        x = z * (1 - s) + epsilon(self.seed, index, 0, tuple(z.shape)) * s
        for step, time in enumerate(times):
            predicted = self.stage.model(x[None, None], torch.tensor([[float(time)]]), text)[0, 0]
            z = self.stage.model.clean(x, sigma_of(time, self.spec.sigma_shift), predicted)
            if step + 1 < len(times):
                sigma = sigma_of(times[step + 1], self.spec.sigma_shift)
                x = (1 - sigma) * z + sigma * epsilon(self.seed, index, step + 1, tuple(z.shape))
        return z


def squared_errors(made: Tensor, truths: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean squared error of every frame to every style's true frame, colours in [0, 1]."""
    picture = made.float() / 255
    return {style: (picture - truth).square().mean((1, 2, 3)) for style, truth in truths.items()}


def nearest(errors: dict[str, Tensor]) -> list[str]:
    """Per frame the style whose true picture is nearest."""
    names = list(errors)
    return [names[i] for i in torch.stack([errors[name] for name in names]).argmin(0).tolist()]


def decibels(error: float) -> float:
    """PSNR of a mean squared error of colours in [0, 1]."""
    return -10 * math.log10(max(error, 1e-10))


def chunk_of(frame: int) -> int:
    """The chunk that a frame of a stream is in."""
    return 0 if frame < FIRST else (frame - FIRST) // FRAMES_PER_LATENT + 1
