"""What lives on the device: weights and per-stream state. Built and used by the device thread alone."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch

from services.worker.core import Role, choose_text_device
from services.worker.roles.decode import DecodeRole
from services.worker.roles.encode import EncodeRole
from services.worker.roles.stage import StageRole
from services.worker.roles.text import TextRole
from services.worker.settings import Settings
from shared.engine.model.autoencoder import Autoencoder
from shared.engine.model.loading import load_text_encoder, load_vae, text_encoder_bytes
from shared.engine.model.lora import LoraSet
from shared.engine.plan.items import Item, SlotOp, SlotOpKind
from shared.engine.plan.model_parts import ModelParts, find_parts
from shared.engine.plan.noise_controller import step_timesteps
from shared.engine.plan.registry import model_spec
from shared.engine.plan.spec import ModelSpec
from shared.engine.plan.split import split_blocks
from shared.engine.stage import Stage

log = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """``auto`` takes the first GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


class Runtime:
    """The roles of one worker, loaded and warm."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = choose_device(settings.device)
        self.dtype = choose_dtype(settings.dtype, self.device)
        self.spec: ModelSpec = model_spec(settings.model, settings.models_dir).with_vae(settings.vae)
        self.encode: EncodeRole | None = None
        self.decode: DecodeRole | None = None
        self.stage: StageRole | None = None
        self.text: TextRole | None = None

    def load(self) -> None:
        """Read the weights this worker's roles need, and nothing else."""
        settings, spec = self.settings, self.spec
        begin = time.perf_counter()
        parts = find_parts(settings.model, settings.models_dir, settings.part_paths)
        if Role.ENCODE in settings.roles or Role.DECODE in settings.roles:
            autoencoder = Autoencoder(load_vae(spec, parts, self.device, self.dtype), spec, self.device, self.dtype)
            self.encode = EncodeRole(autoencoder) if Role.ENCODE in settings.roles else None
            self.decode = DecodeRole(autoencoder) if Role.DECODE in settings.roles else None
        if Role.STAGE in settings.roles:
            blocks = split_blocks(spec.layers, settings.stages)[settings.stage]
            stage = Stage.load(spec, parts, blocks, str(self.device), self.dtype)
            if settings.loras:
                paths, scales = zip(*settings.loras, strict=True)
                LoraSet.open(spec, paths, keep_base=False).apply(stage.model, scales)
            self.stage = StageRole(stage)
        if Role.TEXT in settings.roles:
            self.text = self._load_text(parts)
        log.info("loaded %s on %s in %.1f s", ", ".join(settings.roles), self.device, time.perf_counter() - begin)

    def _load_text(self, parts: ModelParts) -> TextRole:
        """Last, when it is known what the other weights leave free."""
        dtype, device = self.dtype, str(self.device)
        needed = text_encoder_bytes(parts, dtype)
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0
        chosen = choose_text_device(self.settings.text_device, device, free, needed)
        if chosen != device:
            log.info("the text encoder (%.1f GiB) goes to %s", needed / 2**30, chosen)
        return TextRole(load_text_encoder(self.spec, parts, chosen, dtype), beside=chosen != device)

    def open(self, stream: str, height: int, width: int) -> None:
        """Give a stream its state in every role; anew if it was here."""
        if self.encode is not None:
            self.encode.open(stream)
        if self.decode is not None:
            self.decode.open(stream)
        if self.stage is not None:
            self.stage.open(stream, height, width)

    def close(self, stream: str) -> None:
        """Free a stream's state in every role."""
        for role in (self.encode, self.decode, self.stage):
            if role is not None:
                role.close(stream)

    def warm_up(self) -> None:
        """Run every role once or twice at the model's default size, so that the first real chunk is not the slow one."""
        height, width, stream = self.spec.default_height, self.spec.default_width, "warm-up"
        self.open(stream, height, width)
        try:
            for chunk, frames in enumerate((5, 4)):
                latents = 2 if chunk == 0 else 1
                shape = (latents, self.spec.latent_channels, height // 8, width // 8)
                if self.encode is not None:
                    self.encode.run(stream, np.zeros((frames, height, width, 3), dtype=np.uint8))
                if self.stage is not None:
                    self._warm_stage(stream, chunk, latents, shape)
                if self.decode is not None:
                    self.decode.run(stream, torch.zeros(shape, device=self.device, dtype=self.dtype))
            if self.text is not None:
                self.text.run("warm up")
        finally:
            self.close(stream)

    def _warm_stage(self, stream: str, chunk: int, latents: int, shape: tuple[int, ...]) -> None:
        if self.stage is None:
            return
        stage = self.stage.stage
        if chunk == 0:
            empty = torch.zeros(self.spec.text_len, self.spec.text_dim)
            self.stage.set_prompt(stream, 1, empty)
        item = Item(
            stream=stream,
            epoch=1,
            block=chunk,
            step=0,
            slot=0,
            frames=latents,
            first_latent=2 * chunk,
            start_frame=2 * chunk,
            noise_scale=0.5,
            timesteps=step_timesteps(400, self.spec.steps[:1]),
            seed=0,
            prompt_version=1,
            ops=(SlotOp(SlotOpKind.RESET, 0),) if chunk == 0 else (),
        )
        if stage.is_first:
            self.stage.run([item], [torch.zeros(shape, device=self.device, dtype=self.dtype)])
        else:
            tokens = latents * self.spec.tokens(self.spec.default_width, self.spec.default_height)
            self.stage.run([item], torch.zeros(1, tokens, stage.wire_width, device=self.device, dtype=self.dtype))
