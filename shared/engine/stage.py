"""One worker's DiT blocks: a batch of items of several streams and steps in one forward.

The first stage takes latents and noises them, every stage carries out the items' slot operations and runs its blocks, the
last one returns x0 and re-noises what has steps left. A single stage does all of it. This file prepares a forward on the
host; what then runs on the device is :mod:`shared.engine.forward`.

Between stages a batch travels as one tensor [B, F·tokens, width]: the activations, and behind them the noisy latents x_t of the
same tokens as the raw bytes of float32, because the last stage needs x_t exactly (x0 = x_t − σ·v). F is T, or more where
an item runs its window along (a re-cache).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shared.engine.compile import GraphedForward, Speed, make_forward
from shared.engine.forward import StepForward, StepInputs
from shared.engine.model.attention import Kernel
from shared.engine.model.cache_run import CacheRun
from shared.engine.model.checkpoints import Source
from shared.engine.model.dit import Dit, patchify, unpatchify
from shared.engine.model.fp8 import parameter_bytes, to_fp8
from shared.engine.model.kernels import KernelName, fastest_kernel, kernel_of
from shared.engine.model.kv_cache import KvPool, SlotCopy
from shared.engine.model.loading import load_dit, random_dit_weights
from shared.engine.model.lora import LoraError, LoraSet
from shared.engine.model.packed import can_pack, pack, repack
from shared.engine.model.prompt_pool import PromptPool
from shared.engine.model.transfers import to_device, used_here
from shared.engine.plan.items import Item, SlotOp, SlotOpKind
from shared.engine.plan.sigmas import sigma_of
from shared.engine.plan.spec import PATCH, ModelSpec
from shared.engine.random import KeyedNoise, NoiseSource
from shared.engine.stream_state import StageError, Streams, check_forward

__all__ = ["Stage", "StageError", "StageMemory"]


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes held by a stage, and the KV slots in use. ``streams`` is what each stream holds of kv and prompts."""

    weights: int
    kv: int
    prompts: int
    slots: int
    streams: Mapping[str, int]


class Stage:
    """The blocks of one worker with the slots and prompts of its streams. Not thread-safe: one thread runs it."""

    def __init__(
        self,
        model: Dit,
        *,
        noise: NoiseSource | None = None,
        max_slots: int = 4096,
        public_rule: bool = False,
        speed: Speed = Speed.EAGER,
        fp8: bool = False,
        loras: LoraSet | None = None,
    ) -> None:
        self.model, self.spec, self.blocks = model, model.spec, model.range
        self.layers = model.layers()
        model.fuse()
        if fp8:
            to_fp8(model)
        self.device, self.dtype = model.time_weight.device, model.time_weight.dtype
        if can_pack(self.device, self.dtype):
            pack(model)
        self._noise: NoiseSource = noise or KeyedNoise()
        self._max_slots, self._public_rule = max_slots, public_rule
        prompts = PromptPool(self.spec, len(self.layers), self.device, self.dtype)
        self._streams = Streams(prompts, self._make_pool, self._pool_gone)
        self._loras, self._fp8 = loras, fp8
        self._speed = speed
        self._use(kernel_of(KernelName.FUSED))

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
        model = load_dit(spec, source, range(spec.layers) if blocks is None else blocks, device, dtype)
        merged: LoraSet | None = None
        if loras:
            merged = LoraSet.open(spec, [path for path, _ in loras], keep_base=not fp8)
            merged.apply(model, [scale for _, scale in loras])
        return cls(model, noise=noise, max_slots=max_slots, public_rule=public_rule, speed=speed, fp8=fp8, loras=merged)

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
        blocks = range(spec.layers) if blocks is None else blocks
        return cls.load(spec, random_dit_weights(spec, blocks, seed), blocks, device, dtype, speed=speed)

    @property
    def is_first(self) -> bool:
        """Whether it takes latents and noises them."""
        return self.model.is_first

    @property
    def is_last(self) -> bool:
        """Whether it returns x0."""
        return self.model.is_last

    @property
    def wire_width(self) -> int:
        """Channels of the tensor that travels to the next stage."""
        return self.spec.dim + self._latent_channels

    # --- streams and prompts -----------------------------------------------------------------------------------------

    def open(self, stream: str, latent_height: int, latent_width: int) -> None:
        """Make the stream known, with empty slots. An open stream is reset; its prompts stay."""
        self._streams.open(stream, latent_height, latent_width)

    def close(self, stream: str) -> None:
        """Forget the stream and free its slots. Unknown streams are no error."""
        self._streams.close(stream)

    def reset(self) -> None:
        """Every stream's slots become empty; streams and prompts stay."""
        for stream in self._streams.states:
            self._streams.empty(stream)

    @torch.inference_mode()
    def set_prompt(self, stream: str, version: int, embedding: Tensor) -> None:
        """Make this prompt version usable: text projection and cross-attention K/V are computed here, once.

        embedding [text_len, text_dim], any float dtype, any device.
        """
        if tuple(embedding.shape) != (self.spec.text_len, self.spec.text_dim):
            raise StageError(
                f"prompt {version} of stream {stream} is {list(embedding.shape)}, "
                f"the model needs {[self.spec.text_len, self.spec.text_dim]}"
            )
        self._streams.of(stream)
        there = embedding.ne(0).any(1).nonzero()
        words = int(there.max()) + 1 if len(there) else 0
        self._streams.put_prompt(stream, version, self.model.context_kv(embedding.to(self.device)[None]), words)
        if self._loras is not None and not self._fp8:
            self._streams.of(stream).embeddings[version] = embedding.cpu()

    def has_prompt(self, stream: str, version: int) -> bool:
        """Whether items of the stream may use this prompt version."""
        return stream in self._streams.states and version in self._streams.states[stream].prompts

    def drop_prompts(self, stream: str, keep: set[int]) -> None:
        """Forget all prompt versions of the stream but these."""
        self._streams.keep_prompts(stream, keep)

    @torch.inference_mode()
    def scale_loras(self, scales: Sequence[float]) -> None:
        """Give the LoRAs that were loaded other scales, for every stream; prompts are computed anew. Waits for the device.

        Raises LoraError for a wrong number of scales, and where weights can no longer be changed (fp8).
        """
        if self._loras is None or self._fp8:
            why = "fp8 weights cannot be changed" if self._fp8 else "none was loaded"
            raise LoraError(f"{len(scales)} LoRA scales: {why}")
        self._loras.apply(self.model, scales)
        repack(self.model)
        for stream, known in self._streams.states.items():
            for version, embedding in list(known.embeddings.items()):
                self.set_prompt(stream, version, embedding)

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

    # --- what is held ------------------------------------------------------------------------------------------------

    def reserve(self, latent_height: int, latent_width: int, slots: int) -> None:
        """Allocate this many slots of a size ahead of time. Raises NoSlotError beyond ``max_slots``."""
        self._streams.pool(latent_height, latent_width).reserve(slots)

    @torch.inference_mode()
    def copy_out(self, stream: str) -> dict[int, SlotCopy]:
        """The stream's slots by step index, copied to the host: with them another stage of these blocks goes on equally."""
        known = self._streams.of(stream)
        return {step: self._streams.pool(*known.size).copy_out(slot) for step, slot in known.slots.items()}

    @torch.inference_mode()
    def copy_in(self, stream: str, slots: Mapping[int, SlotCopy]) -> None:
        """The open stream's slots become these. Raises StageError when they are of another size or other blocks."""
        known = self._streams.of(stream)
        pool = self._streams.pool(*known.size)
        shape = (pool.blocks, self.spec.ring, pool.tokens, self.spec.dim)
        if wrong := [tuple(copy.keys.shape) for copy in slots.values() if tuple(copy.keys.shape) != shape]:
            raise StageError(f"slots of stream {stream} are {list(wrong[0])}, this stage has {list(shape)}")
        self._streams.empty(stream)
        for step, copy in sorted(slots.items()):
            pool.copy_in(self._streams.slot(stream, step), copy)

    def memory(self) -> StageMemory:
        """What this stage holds now."""
        storages = dict(parameter_bytes(p) for p in self.model.parameters())
        states = self._streams.states
        return StageMemory(
            weights=sum(storages.values()),
            kv=sum(pool.nbytes() for pool in self._streams.pools),
            prompts=self._streams.prompts.nbytes(),
            slots=sum(len(s.slots) for s in states.values()),
            streams={stream: self._streams.nbytes(stream) for stream in states},
        )

    def sinks(self, stream: str) -> dict[int, Tensor]:
        """Per step index: the latent index in every ring place, [blocks, ring] on the host, −1 where none is. Waits."""
        return self._streams.latents(stream)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _use(self, kernel: Kernel) -> None:
        self._kernel = kernel
        forward = StepForward(self.model, self._streams.prompts, kernel)
        self._forward = make_forward(forward, self._speed, self.device)

    def _pool_gone(self, pool: KvPool) -> None:
        if isinstance(self._forward, GraphedForward):
            self._forward.forget(pool)

    def _make_pool(self, height: int, width: int) -> KvPool:
        return KvPool(
            self.spec,
            len(self.layers),
            height * width // PATCH**2,
            self.device,
            self.dtype,
            max_slots=self._max_slots,
            public_rule=self._public_rule,
            inputs_shape=(self.spec.latent_channels, height, width) if self.is_first else None,
        )

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

    @property
    def _latent_channels(self) -> int:
        """Channels of one token's float32 latents, seen in the model's dtype."""
        return PATCH * PATCH * self.spec.latent_channels * 4 // self.dtype.itemsize

    def _pack(self, hidden: Tensor, noisy: Tensor) -> Tensor:
        return torch.cat([hidden, patchify(noisy).contiguous().view(self.dtype)], -1)

    def _unpack(self, x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        hidden, raw = x.to(self.dtype).split([self.spec.dim, self._latent_channels], -1)
        tokens = raw.contiguous().view(torch.float32)
        tokens = tokens.unflatten(-1, (self.spec.latent_channels, PATCH * PATCH)).transpose(-1, -2).flatten(-2)
        return hidden.contiguous(), unpatchify(tokens, rows, columns)


def _frame_shape(x: Tensor) -> tuple[int, int, int]:
    return x.shape[2], x.shape[3], x.shape[4]
