"""Weights for measuring: a model's own where they are, else random ones, made where they are used.

The time of a forward does not depend on the weights. Stages are kept from one setting to the next while the model, the
split, the dtype and the device stay: a large model is filled once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bench.setting import Setting
from shared.engine.compile import Speed
from shared.engine.model.dit import Dit
from shared.engine.model.loading import load_vae, random_vae_weights, tiny_decoder_dtype
from shared.engine.plan.registry import model_folder
from shared.engine.plan.spec import ModelSpec
from shared.engine.plan.split import split_blocks
from shared.engine.stage import Stage


class RandomTensors(Mapping[str, Tensor]):
    """Random tensors of given shapes, each made on the device when it is asked for."""

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device, dtype: torch.dtype) -> None:
        self._shapes, self._device, self._dtype = shapes, device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def __getitem__(self, name: str) -> Tensor:
        """Standard normal over the root of the fan-in."""
        shape = self._shapes[name]
        made = torch.randn(shape, device=self._device, dtype=self._dtype, generator=self._generator)
        return made.div_(max(shape.numel() // max(shape[0], 1), 1) ** 0.5) if len(shape) > 1 else made.mul_(0.02)

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """How many."""
        return len(self._shapes)


class Models:
    """Makes what a setting measures."""

    def __init__(self, random_weights: bool) -> None:
        self._random = random_weights
        self._stages: tuple[object, list[Stage]] | None = None

    def spec_and_source(self, setting: Setting, spec: ModelSpec) -> tuple[ModelSpec, Path | None]:
        """The spec measured, and the folder of trained weights (None: random ones)."""
        folder = model_folder(setting.model)
        trained = not self._random and setting.vae == "own" and (folder / "dit.safetensors").exists()
        return (ModelSpec.from_json(folder / "spec.json"), folder) if trained else (spec, None)

    def stages(self, setting: Setting, spec: ModelSpec, folder: Path | None) -> list[Stage]:
        """The model over the setting's stages, without streams."""
        # The autoencoder is no part of a stage.
        key = (setting.model, setting.stages, setting.dtype, setting.device, setting.compiled, folder)
        if self._stages is None or self._stages[0] != key:
            self._stages = None
            device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
            fast = Speed.GRAPHS if device.type == "cuda" else Speed.COMPILED
            speed = fast if setting.compiled else Speed.EAGER
            made: list[Stage] = []
            for blocks in split_blocks(spec.layers, setting.stages):
                source = folder or RandomTensors(_shapes(spec, blocks), device, dtype)
                stage = Stage.load(spec, source, blocks, device, dtype, speed=speed)
                stage.tune(*spec.latent_size(setting.width, setting.height), setting.steps)
                made.append(stage)
            self._stages = (key, made)
        return self._stages[1]

    def autoencoder(self, setting: Setting, spec: ModelSpec, folder: Path | None) -> object:
        """The autoencoder for serving."""
        device, dtype = torch.device(setting.device), getattr(torch, setting.dtype)
        if folder is not None:
            return load_vae(spec, folder, device, dtype, tiny_decoder_dtype(device, dtype))
        if spec.vae != "wan":
            return load_vae(spec, random_vae_weights(spec), device, dtype, tiny_decoder_dtype(device, dtype))
        # The published size: only weights know it, no spec does.
        from shared.engine.model.wan_vae import AutoencoderKLWan

        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in AutoencoderKLWan().state_dict().items()}
        return load_vae(spec, RandomTensors(shapes, device, dtype), device, dtype)


def _shapes(spec: ModelSpec, blocks: range) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Dit(spec, blocks).state_dict().items()}
