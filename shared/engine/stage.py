"""One worker's DiT blocks: a batch of items of several streams and steps in one forward.

The first stage takes latents and noises them, every stage carries out the items' slot operations and runs its blocks, the
last one returns x0 and re-noises what has steps left. A single stage does all of it.

Between stages a batch travels as one tensor [B, T·tokens, width]: the activations, and behind them the noisy latents x_t of the
same tokens as the raw bytes of float32, because the last stage needs x_t exactly (x0 = x_t − σ·v).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared.engine.model.attention import ContextKv
from shared.engine.model.checkpoints import Source
from shared.engine.model.dit import Dit, patchify, unpatchify
from shared.engine.model.kv_cache import CacheRun, KvPool, SlotCopy
from shared.engine.model.loading import load_dit, random_dit_weights
from shared.engine.plan.items import Item, SlotOp, SlotOpKind, check_batch
from shared.engine.plan.sigmas import sigma_of
from shared.engine.plan.spec import PATCH, ModelSpec
from shared.engine.random import KeyedNoise, NoiseSource


class StageError(RuntimeError):
    """A batch this stage cannot run: an unknown stream, prompt or shape. The message says which."""


@dataclass(slots=True)
class _Stream:
    height: int
    width: int
    slots: dict[int, int] = field(default_factory=dict)
    prompts: dict[int, list[ContextKv]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes held by a stage, and the KV slots in use."""

    weights: int
    kv: int
    prompts: int
    slots: int


class Stage:
    """The blocks of one worker with the slots and prompts of its streams. Not thread-safe: one thread runs it."""

    def __init__(
        self,
        model: Dit,
        *,
        noise: NoiseSource | None = None,
        max_slots: int = 4096,
        public_rule: bool = False,
    ) -> None:
        self.model, self.spec, self.blocks = model, model.spec, model.range
        self.layers = model.layers()
        self.device, self.dtype = model.time_weight.device, model.time_weight.dtype
        self._noise: NoiseSource = noise or KeyedNoise()
        self._max_slots, self._public_rule = max_slots, public_rule
        self._streams: dict[str, _Stream] = {}
        self._pools: dict[tuple[int, int], KvPool] = {}

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
    ) -> Stage:
        """A stage of these blocks (default: all), from a model folder, its parts, a file or a state dict.

        ``public_rule`` reproduces the public code's choice of ring places, faults included, to replay its recordings.
        Raises WeightsError, FileNotFoundError.
        """
        model = load_dit(spec, source, range(spec.layers) if blocks is None else blocks, device, dtype)
        return cls(model, noise=noise, max_slots=max_slots, public_rule=public_rule)

    @classmethod
    def random(
        cls,
        spec: ModelSpec,
        blocks: range | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Stage:
        """A stage with random weights that depend on the seed only: any split of the blocks computes the same."""
        blocks = range(spec.layers) if blocks is None else blocks
        return cls.load(spec, random_dit_weights(spec, blocks, seed), blocks, device, dtype)

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

    def open(self, stream: str, latent_height: int, latent_width: int) -> None:
        """Make the stream known, with empty slots. An open stream is reset; its prompts stay."""
        if latent_height % PATCH or latent_width % PATCH or min(latent_height, latent_width) < PATCH:
            raise StageError(
                f"stream {stream}: {latent_height}×{latent_width} latents are no multiple of the patch {PATCH}"
            )
        known = self._streams.get(stream)
        prompts = known.prompts if known else {}
        self._release(stream)
        self._streams[stream] = _Stream(latent_height, latent_width, prompts=prompts)

    def close(self, stream: str) -> None:
        """Forget the stream and free its slots. Unknown streams are no error."""
        self._release(stream)
        known = self._streams.pop(stream, None)
        pool = self._pools.get((known.height, known.width)) if known else None
        if known and pool and pool.idle and len(self._pools) > 1:
            # Sizes come and go; the last one used keeps its memory for the next stream.
            del self._pools[known.height, known.width]

    def reset(self) -> None:
        """Every stream's slots become empty; streams and prompts stay."""
        for stream in self._streams:
            self._release(stream)

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
        self._stream(stream).prompts[version] = self.model.context_kv(embedding.to(self.device)[None])

    def has_prompt(self, stream: str, version: int) -> bool:
        """Whether items of the stream may use this prompt version."""
        return stream in self._streams and version in self._streams[stream].prompts

    def drop_prompts(self, stream: str, keep: set[int]) -> None:
        """Forget all prompt versions of the stream but these."""
        known = self._stream(stream)
        known.prompts = {version: kv for version, kv in known.prompts.items() if version in keep}

    @torch.inference_mode()
    def run(self, items: Sequence[Item], x: Tensor) -> Tensor:
        """One forward of all items, in order, after their slot operations.

        x: on the first stage latents [B, T, C, h, w]: of step 0 clean source latents, which are noised here with
        ε·s + x·(1−s), of later steps what :meth:`renoise` returned; on others the previous stage's result.
        Returns the wire tensor [B, T·tokens, wire_width], or on the last stage x0 [B, T, C, h, w] float32.
        Raises StageError before anything was changed.
        """
        pool, stream = self._check(items, x)
        frames, rows, columns = items[0].frames, stream.height // PATCH, stream.width // PATCH
        slots = [self._prepare(item, pool) for item in items]
        starts = [item.start_frame for item in items]
        cache = CacheRun(pool, slots, frames, [item.first_latent for item in items], starts)
        rope = self.model.rope.table(starts, frames, rows, columns, self.device)
        e, e6 = self.model.times([[float(item.timestep)] for item in items])
        prompts = self._contexts(items)
        if self.is_first:
            noisy = self._noised(items, x)
            hidden = self.model.patches(noisy)
        else:
            hidden, noisy = self._unpack(x.to(self.device), rows, columns)
        for index, block in enumerate(self.layers):
            hidden = block(hidden, e6, rope, cache.bound(index), prompts[index])
        cache.finish()
        if not self.is_last:
            return self._pack(hidden, noisy)
        flow = self.model.flow(hidden, e, rows, columns)
        return noisy - self._per_item([self._sigma(item.timestep) for item in items]) * flow

    @torch.inference_mode()
    def renoise(self, items: Sequence[Item], x0: Tensor) -> Tensor:
        """x0 [B, T, C, h, w] of items with steps left → the next steps' input (1−σ)·x0 + σ·ε, float32."""
        later = [item.next_timestep for item in items]
        if any(t is None for t in later):
            raise StageError("renoise: an item has no step left")
        sigma = self._per_item([self._sigma(t) for t in later if t is not None])
        noise = self._noise.draw(items, 1, _frame_shape(x0)).to(self.device, non_blocking=True)
        return (1 - sigma) * x0.to(self.device, torch.float32) + sigma * noise

    def reserve(self, latent_height: int, latent_width: int, slots: int) -> None:
        """Allocate this many slots of a size ahead of time. Raises NoSlotError beyond ``max_slots``."""
        self._pool(latent_height, latent_width).reserve(slots)

    @torch.inference_mode()
    def copy_out(self, stream: str) -> dict[int, SlotCopy]:
        """The stream's slots by step index, copied to the host: with them another stage of these blocks goes on equally."""
        known = self._stream(stream)
        return {step: self._pool(known.height, known.width).copy_out(slot) for step, slot in known.slots.items()}

    @torch.inference_mode()
    def copy_in(self, stream: str, slots: Mapping[int, SlotCopy]) -> None:
        """The open stream's slots become these. Raises StageError when they are of another size or other blocks."""
        known = self._stream(stream)
        pool = self._pool(known.height, known.width)
        shape = (pool.blocks, self.spec.ring, pool.tokens, self.spec.dim)
        if wrong := [tuple(copy.keys.shape) for copy in slots.values() if tuple(copy.keys.shape) != shape]:
            raise StageError(f"slots of stream {stream} are {list(wrong[0])}, this stage has {list(shape)}")
        self._release(stream)
        for step, copy in sorted(slots.items()):
            pool.copy_in(self._slot(stream, step, pool), copy)

    def memory(self) -> StageMemory:
        """What this stage holds now."""
        tensors = [t for s in self._streams.values() for kvs in s.prompts.values() for kv in kvs for t in kv]
        return StageMemory(
            weights=sum(p.numel() * p.element_size() for p in self.model.parameters()),
            kv=sum(pool.nbytes() for pool in self._pools.values()),
            prompts=sum(t.numel() * t.element_size() for t in tensors),
            slots=sum(len(s.slots) for s in self._streams.values()),
        )

    def sinks(self, stream: str) -> dict[int, Tensor]:
        """Per step index: the latent index in every ring place, [blocks, ring] on the host, −1 where none is. Waits."""
        known = self._stream(stream)
        pool = self._pools.get((known.height, known.width))
        return {} if pool is None else {k: pool.rule.latents[:, slot].cpu() for k, slot in known.slots.items()}

    def _stream(self, stream: str) -> _Stream:
        try:
            return self._streams[stream]
        except KeyError:
            raise StageError(f"stream {stream} is not open on this stage") from None

    def _release(self, stream: str) -> None:
        known = self._streams.get(stream)
        if known is None:
            return
        for slot in known.slots.values():
            self._pools[known.height, known.width].give_back(slot)
        known.slots = {}

    def _check(self, items: Sequence[Item], x: Tensor) -> tuple[KvPool, _Stream]:
        """Everything that can be wrong with a batch, before any slot changes."""
        if not items:
            raise StageError("an empty batch")
        first = self._stream(items[0].stream)
        frames = items[0].frames
        try:
            check_batch(items)
        except ValueError as error:
            raise StageError(str(error)) from None
        for item in items:
            known = self._stream(item.stream)
            if (known.height, known.width) != (first.height, first.width):
                raise StageError(f"streams {items[0].stream} and {item.stream} differ in size")
            if item.prompt_version not in known.prompts:
                raise StageError(f"prompt {item.prompt_version} of stream {item.stream} is not ready on this stage")
            most = self._room(item, known)
            if frames > most:
                raise StageError(
                    f"block {item.block} of stream {item.stream} has {frames} frames, its slot takes {most}"
                )
        tokens = first.height * first.width // PATCH**2
        c = self.spec.latent_channels
        shape = (
            (len(items), frames, c, first.height, first.width)
            if self.is_first
            else (len(items), frames * tokens, self.wire_width)
        )
        if tuple(x.shape) != shape:
            raise StageError(f"input is {list(x.shape)}, the batch needs {list(shape)}")
        return self._pool(first.height, first.width), first

    def _room(self, item: Item, known: _Stream) -> int:
        """Latent frames the item's slot can take: all of it while empty, else what is no sink."""
        emptied = any(op.kind is SlotOpKind.RESET and op.slot == item.slot for op in item.ops)
        if emptied or item.slot not in known.slots:
            return self.spec.ring
        return self.spec.ring - self.spec.sinks

    def _pool(self, height: int, width: int) -> KvPool:
        if (height, width) not in self._pools:
            self._pools[height, width] = KvPool(
                self.spec,
                len(self.layers),
                height * width // PATCH**2,
                self.device,
                self.dtype,
                max_slots=self._max_slots,
                public_rule=self._public_rule,
            )
        return self._pools[height, width]

    def _slot(self, stream: str, step: int, pool: KvPool) -> int:
        slots = self._streams[stream].slots
        if step not in slots:
            slots[step] = pool.take(slots.get(step - 1))
        return slots[step]

    def _prepare(self, item: Item, pool: KvPool) -> int:
        """Carry out the item's operations; returns its pool slot."""
        for op in item.ops:
            self._operate(item.stream, op, pool)
        return self._slot(item.stream, item.slot, pool)

    def _operate(self, stream: str, op: SlotOp, pool: KvPool) -> None:
        slot = self._slot(stream, op.slot, pool)
        if op.kind is SlotOpKind.RESET:
            pool.reset(slot)
        elif op.kind is SlotOpKind.FORK:
            pool.fork(self._slot(stream, op.source, pool), slot)
        else:
            pool.rerotate(slot, self.model.rope.shift(op.frames, self.device))

    def _contexts(self, items: Sequence[Item]) -> list[ContextKv]:
        """Per block the items' prompt K/V; one prompt for all is not copied."""
        used = [self._streams[item.stream].prompts[item.prompt_version] for item in items]
        if all(kv is used[0] for kv in used):
            return used[0]
        return [
            (torch.cat([kv[i][0] for kv in used]), torch.cat([kv[i][1] for kv in used]))
            for i in range(len(self.layers))
        ]

    def _noised(self, items: Sequence[Item], x: Tensor) -> Tensor:
        """Step 0's items noised by their s; later steps' as they are. float32."""
        x = x.to(self.device, torch.float32)
        entering = [i for i, item in enumerate(items) if item.step == 0]
        if not entering:
            return x
        drawn = self._noise.draw([items[i] for i in entering], 0, _frame_shape(x)).to(self.device, non_blocking=True)
        noise = torch.zeros_like(x)
        noise[entering] = drawn
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
