"""One worker's DiT blocks: a batch of items of several streams and steps in one forward.

The first stage takes latents and noises them, every stage carries out the items' slot operations and runs its blocks, the
last one returns x0 and re-noises what has steps left. A single stage does all of it. This file prepares a forward on the
host; what then runs on the device is :mod:`shared.engine.forward`.

Between stages a batch travels as one tensor [B, F·tokens, width]: the activations, and behind them the noisy latents x_t of the
same tokens as the raw bytes of float32, because the last stage needs x_t exactly (x0 = x_t − σ·v). F is T, or more where
an item runs its window along (a re-cache).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shared.engine.compile import Speed
from shared.engine.forward import StepInputs
from shared.engine.model.cache_run import CacheRun
from shared.engine.model.checkpoints import Source
from shared.engine.model.dit import Dit, patchify, unpatchify
from shared.engine.model.kernels import fastest_kernel, kernel_of
from shared.engine.model.kv_cache import KvPool
from shared.engine.model.loading import load_dit, random_dit_weights
from shared.engine.model.lora import LoraSet
from shared.engine.model.transfers import to_device, used_here
from shared.engine.plan.items import Item, SlotOp, SlotOpKind
from shared.engine.plan.sigmas import sigma_of
from shared.engine.plan.spec import PATCH, ModelSpec
from shared.engine.random import NoiseSource
from shared.engine.stage_held import HeldStage, StageMemory
from shared.engine.stream_state import StageError, check_forward

__all__ = ["Stage", "StageError", "StageMemory"]


class Stage(HeldStage):
    """The blocks of one worker with the slots and prompts of its streams. Not thread-safe: one thread runs it."""

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        source: Source,
        blocks: range | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        noise: NoiseSource | None = None,
        max_slots: int = 4096,
        public_rule: bool = False,
        speed: Speed = Speed.EAGER,
        fp8: bool = False,
        loras: Sequence[tuple[Path, float]] = (),
    ) -> Stage:
        """A stage of these blocks (default: all), from a model folder, its parts, a file or a state dict.

        ``public_rule`` reproduces the public code's choice of ring places, faults included, to replay its recordings.
        ``speed`` says how forwards run, ``fp8`` turns the blocks' products into 8-bit ones; both raise ValueError where the
        device cannot. ``loras`` (file, scale) are merged. Raises WeightsError, FileNotFoundError.
        """

        def load(run: range) -> Dit:
            return load_dit(spec, source, run, device, dtype)

        model, scales = load(range(spec.layers) if blocks is None else blocks), [scale for _, scale in loras]
        merged = LoraSet.open(spec, [path for path, _ in loras], keep_base=not fp8) if loras else None
        if merged is not None:
            merged.apply(model, scales)
        return cls(
            model,
            noise=noise,
            max_slots=max_slots,
            public_rule=public_rule,
            speed=speed,
            fp8=fp8,
            loras=merged,
            scales=scales,
            loader=load,
        )

    @classmethod
    def random(
        cls,
        spec: ModelSpec,
        blocks: range | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        speed: Speed = Speed.EAGER,
    ) -> Stage:
        """A stage with random weights that depend on the seed only: any split of the blocks computes the same."""

        def load(run: range) -> Dit:
            return load_dit(spec, random_dit_weights(spec, run, seed), run, device, dtype)

        return cls(load(range(spec.layers) if blocks is None else blocks), speed=speed, loader=load)

    # --- forwards ----------------------------------------------------------------------------------------------------

    def tune(self, latent_height: int, latent_width: int, items: int = 1) -> str:
        """Measure which attention kernel is fastest at this size and use it; returns its name. Waits for the device."""
        tokens = latent_height * latent_width // PATCH**2
        name = fastest_kernel(
            self.device,
            self.dtype,
            batch=items,
            length=tokens,
            keys=tokens * self.spec.ring,
            heads=self.spec.heads,
            head_dim=self.spec.head_dim,
        )
        self._use(kernel_of(name))
        return name.value

    @torch.inference_mode()
    def run(self, items: Sequence[Item], x: Tensor) -> Tensor:
        """One forward of all items, in order, after their slot operations.

        x: on the first stage latents [B, T, C, h, w]: of step 0 clean source latents, which are noised here with
        ε·s + x·(1−s), of later steps what :meth:`renoise` returned; on others the previous stage's result.
        Returns the wire tensor [B, F·tokens, wire_width], or on the last stage x0 [B, T, C, h, w] float32.
        Raises StageError before anything was changed.
        """
        for name in {item.stream for item in items} & self.suspended.keys():
            self.resume(name)
        stream = check_forward(items, x, self._streams, self.spec, None if self.is_first else self.wire_width)
        pool = self._streams.pool(*stream.size)
        context, frames = items[0].context, items[0].forward_frames
        rows, columns = stream.height // PATCH, stream.width // PATCH
        slots = [self._prepare(item, pool) for item in items]
        starts = [item.start_frame - context for item in items]
        if self.is_first:
            hidden, noisy = None, self._noised(items, x)
            pool.keep(slots, noisy)
            if context:
                noisy = pool.kept(slots, frames)
        else:
            hidden, noisy = self._unpack(to_device(used_here(x), self.device), rows, columns)
        entries = [self._streams.prompt_of(item) for item in items]
        step = StepInputs(
            noisy=noisy,
            hidden=hidden,
            waves=self.model.waves([[float(item.timestep)] for item in items]),
            turn=self.model.rope.turn(starts, frames).to(self.device, non_blocking=True),
            sigma=self._per_item([self._sigma(item.timestep) for item in items]),
            prompts=entries[0] if len(set(entries)) == 1 else torch.tensor(entries).to(self.device, non_blocking=True),
            cache=CacheRun(pool, slots, frames, [item.first_latent - context for item in items], starts, self._kernel),
            frames=items[0].frames,
        )
        y = self._forward(step)
        return y if self.is_last else self._pack(y, noisy)

    @torch.inference_mode()
    def renoise(self, items: Sequence[Item], x0: Tensor) -> Tensor:
        """x0 [B, T, C, h, w] of items with steps left → the next steps' input (1−σ)·x0 + σ·ε, float32."""
        later = [item.next_timestep for item in items]
        if any(t is None for t in later):
            raise StageError("renoise: an item has no step left")
        sigma = self._per_item([self._sigma(t) for t in later if t is not None])
        noise = to_device(self._noise.draw(items, 1, _frame_shape(x0)), self.device)
        return (1 - sigma) * x0.to(self.device, torch.float32) + sigma * noise

    # --- inside ------------------------------------------------------------------------------------------------------

    def _prepare(self, item: Item, pool: KvPool) -> int:
        """Carry out the item's operations; returns its pool slot."""
        for op in item.ops:
            self._operate(item.stream, op, pool)
        return self._streams.slot(item.stream, item.slot)

    def _operate(self, stream: str, op: SlotOp, pool: KvPool) -> None:
        slot = self._streams.slot(stream, op.slot)
        if op.kind is SlotOpKind.RESET:
            pool.reset(slot)
        elif op.kind is SlotOpKind.FORK:
            pool.fork(self._streams.slot(stream, op.source), slot)
        else:
            pool.rerotate(slot, self.model.rope.shift(op.frames, self.device))

    def _noised(self, items: Sequence[Item], x: Tensor) -> Tensor:
        """Step 0's items noised by their s; later steps' as they are. float32."""
        x = to_device(used_here(x), self.device).float()
        entering = [i for i, item in enumerate(items) if item.step == 0]
        if not entering:
            return x
        drawn = to_device(self._noise.draw([items[i] for i in entering], 0, _frame_shape(x)), self.device)
        if len(entering) == len(items):
            noise = drawn
        else:
            rows = torch.tensor(entering).to(self.device, non_blocking=True)
            noise = torch.zeros_like(x).index_copy_(0, rows, drawn)
        s = self._per_item([item.noise_scale if item.step == 0 else 0.0 for item in items])
        return noise * s + x * (1 - s)

    def _sigma(self, timestep: int) -> float:
        return sigma_of(timestep, self.spec.sigma_shift)

    def _per_item(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32).to(self.device, non_blocking=True)[
            :, None, None, None, None
        ]

    def _pack(self, hidden: Tensor, noisy: Tensor) -> Tensor:
        return torch.cat([hidden, patchify(noisy).contiguous().view(self.dtype)], -1)

    def _unpack(self, x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        hidden, raw = x.to(self.dtype).split([self.spec.dim, self._latent_channels], -1)
        tokens = raw.contiguous().view(torch.float32)
        tokens = tokens.unflatten(-1, (self.spec.latent_channels, PATCH * PATCH)).transpose(-1, -2).flatten(-2)
        return hidden.contiguous(), unpatchify(tokens, rows, columns)


def _frame_shape(x: Tensor) -> tuple[int, int, int]:
    return x.shape[2], x.shape[3], x.shape[4]
