"""What lives on the device: weights and per-stream state. Built and used by the device thread alone."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from services.worker.core import Role, choose_text_device
from services.worker.roles.decode import DecodeRole
from services.worker.roles.encode import EncodeRole
from services.worker.roles.stage import StageRole
from services.worker.roles.text import TextRole
from services.worker.settings import Settings
from shared.engine.compile import EAGER_RUNS, Speed
from shared.engine.model.autoencoder import Autoencoder
from shared.engine.model.kv_cache import room_on
from shared.engine.model.loading import load_text_encoder, load_vae, text_encoder_bytes, tiny_decoder_dtype
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


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device; on a CPU, pages of the host that nobody uses."""
    if device.type == "cuda":
        return int(room_on(device))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 on a GPU, float32 on a CPU (but for the tiny decoder, see :func:`tiny_decoder_dtype`)."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@dataclass(slots=True)
class PipelinePlace:
    """Where in which pipeline a worker is; blocks that change hands may change it."""

    pipeline: str
    stage: int
    stages: int


class Runtime:
    """The roles of one worker, loaded and warm."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = choose_device(settings.device)
        self.dtype = choose_dtype(settings.dtype, self.device)
        self.spec: ModelSpec = model_spec(settings.model, settings.models_dir).with_vae(settings.vae)
        self.place = PipelinePlace(settings.pipeline, settings.stage, settings.stages)
        self.vae_name = f"{self.spec.name}/{self.spec.vae}"
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
            decoder = tiny_decoder_dtype(self.device, self.dtype) if settings.dtype == "auto" else self.dtype
            vae = load_vae(spec, parts, self.device, self.dtype, decoder)
            autoencoder = Autoencoder(vae, spec, self.device, self.dtype)
            self.encode = EncodeRole(autoencoder) if Role.ENCODE in settings.roles else None
            self.decode = DecodeRole(autoencoder) if Role.DECODE in settings.roles else None
        if Role.STAGE in settings.roles:
            blocks = split_blocks(spec.layers, settings.stages)[settings.stage]
            stage = Stage.load(
                spec,
                parts,
                blocks,
                str(self.device),
                self.dtype,
                speed=settings.speed,
                fp8=settings.fp8,
                loras=[(Path(path), scale) for path, scale in settings.loras],
            )
            stage.tune(*spec.latent_size(spec.default_width, spec.default_height))
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

    def open(self, stream: str, height: int, width: int, steps: int = 0) -> None:
        """Give a stream its state in every role, with room for so many steps; anew if it was here."""
        for role in (self.encode, self.decode):
            if role is not None:
                role.caches.open(stream)
        if self.stage is not None:
            self.stage.open(stream, height, width, steps)

    def close(self, stream: str) -> None:
        """Free a stream's state in every role."""
        for role in (self.encode, self.decode):
            if role is not None:
                role.caches.close(stream)
        if self.stage is not None:
            self.stage.close(stream)

    def block_fields(self) -> dict[str, int]:
        """Which DiT blocks it has, as a heartbeat tells it."""
        if self.stage is None:
            return {}
        blocks = self.stage.stage.blocks
        return {"first_block": blocks.start, "last_block": blocks.stop - 1}

    def memory_fields(self) -> dict[str, object]:
        """What a heartbeat tells of memory.

        Each stream's on the device (KV slots, prompts, caches), each one's on the host, and what is free.
        """
        held: Counter[str] = Counter(self.stage.stage.memory().streams if self.stage is not None else {})
        aside: Counter[str] = Counter(self.stage.stage.suspended if self.stage is not None else {})
        for role in (self.encode, self.decode):
            if role is not None:
                held.update(role.caches.nbytes())
                aside.update(role.caches.suspended)
        free = free_bytes(self.device) + (self.stage.stage.free_slot_bytes if self.stage is not None else 0)
        return {"stream_bytes": dict(held), "suspended": dict(aside), "memory_free": free}

    def warm_up(self) -> None:
        """Run every role at the model's default size, so that the first real chunk is not the slow one.

        Where forwards are compiled or recorded, that is done here for every number of steps.
        """
        height, width, stream = self.spec.default_height, self.spec.default_width, "warm-up"
        self.open(stream, height, width)
        try:
            for chunk, frames in enumerate((5, 4)):
                latents = 2 if chunk == 0 else 1
                shape = (latents, self.spec.latent_channels, height // 8, width // 8)
                if self.encode is not None:
                    self.encode.run(stream, np.zeros((frames, height, width, 3), dtype=np.uint8))
                if self.decode is not None:
                    self.decode.run(stream, torch.zeros(shape, device=self.device, dtype=self.dtype))
            if self.stage is not None:
                self._warm_stage(self.stage, stream)
            if self.text is not None:
                self.text.run("warm up")
        finally:
            self.close(stream)

    def _warm_stage(self, role: StageRole, stream: str) -> None:
        role.set_prompt(stream, 1, torch.zeros(self.spec.text_len, self.spec.text_dim))
        plain = self.settings.speed.on(self.device) is Speed.EAGER
        self._warm_batch(role, stream, 0, (SlotOp(SlotOpKind.RESET, 0),), frames=2)
        for block in range(1, 2 if plain else self.spec.ring):
            self._warm_batch(role, stream, block, ())
        if plain:
            return
        # Rings are full: these are the shapes that a stream keeps. Each is met as often as it takes to be recorded.
        block = self.spec.ring
        for items in range(1, self.spec.max_steps + 1):
            fork = (SlotOp(SlotOpKind.FORK, items - 1, source=0),) if items > 1 else ()
            for _ in range(EAGER_RUNS + 1):
                self._warm_batch(role, stream, block, fork, items=items)
                block, fork = block + 1, ()

    def _warm_batch(
        self, role: StageRole, stream: str, block: int, ops: tuple[SlotOp, ...], *, frames: int = 1, items: int = 1
    ) -> None:
        """One forward on made-up input: ``items`` items of one stream, the last of them after ``ops``."""
        at = 0 if block == 0 else block + 1
        batch = [
            Item(
                stream=stream,
                epoch=1,
                block=block,
                step=0,
                slot=slot,
                frames=frames,
                first_latent=at,
                start_frame=at,
                noise_scale=0.5,
                timesteps=step_timesteps(400, self.spec.steps[:1]),
                seed=0,
                prompt_version=1,
                ops=ops if slot == items - 1 else (),
            )
            for slot in range(items)
        ]
        height, width = self.spec.default_height, self.spec.default_width
        if role.stage.is_first:
            rows, columns = self.spec.latent_size(width, height)
            shape = (frames, self.spec.latent_channels, rows, columns)
            role.run(batch, [torch.zeros(shape, device=self.device, dtype=self.dtype)] * items)
        else:
            tokens = frames * self.spec.tokens(width, height)
            role.run(batch, torch.zeros(items, tokens, role.stage.wire_width, device=self.device, dtype=self.dtype))
