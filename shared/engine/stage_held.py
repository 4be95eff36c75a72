"""What one worker's stage holds: weights of its DiT blocks, the slots and prompts of its streams; all of it may come and go.

What it computes with them is :mod:`shared.engine.stage`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.engine.blocks import Loader, Pieces, fill_prompts, joined, kept_blocks, load_pieces, padded, serve, words_of
from shared.engine.compile import GraphedForward, Speed, make_forward
from shared.engine.forward import StepForward
from shared.engine.model.attention import Kernel
from shared.engine.model.dit import Dit
from shared.engine.model.fp8 import parameter_bytes
from shared.engine.model.kernels import KernelName, kernel_of
from shared.engine.model.kv_cache import KvPool
from shared.engine.model.lora import LoraError, LoraSet
from shared.engine.model.packed import repack
from shared.engine.model.prompt_pool import PromptPool
from shared.engine.moving import Carried, bring_back, change_blocks, export_slots, import_slots, set_aside, why_not
from shared.engine.plan.spec import PATCH
from shared.engine.random import KeyedNoise, NoiseSource
from shared.engine.stream_state import StageError, Streams


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes held by a stage, and the KV slots in use. ``streams`` is what each stream holds of kv and prompts."""

    weights: int
    kv: int
    prompts: int
    slots: int
    streams: Mapping[str, int]


class HeldStage:
    """Weights, slots and prompts. Not thread-safe: one thread runs it, but for :meth:`prepare`."""

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
        scales: Sequence[float] = (),
        loader: Loader | None = None,
    ) -> None:
        self.model, self.spec, self.blocks = model, model.spec, model.range
        self.layers = model.layers()
        serve(model, fp8)
        self.device, self.dtype = model.time_weight.device, model.time_weight.dtype
        self._loader, self._scales = loader, tuple(scales)
        self._noise: NoiseSource = noise or KeyedNoise()
        self._max_slots, self._public_rule = max_slots, public_rule
        prompts = PromptPool(self.spec, len(self.layers), self.device, self.dtype)
        self._streams = Streams(prompts, self._make_pool, self._pool_gone)
        self._loras, self._fp8 = loras, fp8
        self._speed = speed
        self._use(kernel_of(KernelName.FUSED))

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

    def open(self, stream: str, latent_height: int, latent_width: int, slots: int = 0) -> None:
        """Make the stream known, with empty slots. An open stream is reset; its prompts stay. Room for so many ``slots``.

        Raises StageError where there is no room, or for a size of no whole patches.
        """
        self._streams.open(stream, latent_height, latent_width, slots)

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
        words = words_of(embedding)
        self._streams.put_prompt(stream, version, self.model.context_kv(embedding.to(self.device)[None]), words)
        self._streams.of(stream).embeddings[version] = embedding[:words].to("cpu", copy=True)

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
        self._scales = tuple(scales)
        repack(self.model)
        for stream, known in self._streams.states.items():
            for version, words in list(known.embeddings.items()):
                self.set_prompt(stream, version, padded(words, self.spec))

    # --- what is held ------------------------------------------------------------------------------------------------

    def reserve(self, latent_height: int, latent_width: int, slots: int) -> None:
        """Allocate this many slots of a size ahead of time. Raises NoSlotError beyond ``max_slots``."""
        self._streams.pool(latent_height, latent_width).reserve(slots)

    @torch.inference_mode()
    def export_stream(self, stream: str, blocks: range | None = None) -> Carried:
        """The stream's slots of these blocks (default: all) and its prompts, copied to the host. Waits for the device."""
        wanted = self.blocks if blocks is None else blocks
        return export_slots(self._streams, self.spec.name, self.blocks, stream, wanted)

    @torch.inference_mode()
    def import_stream(self, stream: str, carried: Carried) -> None:
        """The open stream goes on from these slots: those of this stage's blocks; others wait for :meth:`set_blocks`.

        Prompts that it has not are taken, too. Raises StageError for slots of another model, size or moment, NoSlotError.
        """
        if carried.blocks and (reason := why_not(self._streams, self.spec.name, stream, carried)) is not None:
            raise StageError(f"stream {stream}: {reason}")
        import_slots(self._streams, self.blocks, stream, carried)
        for version in carried.meta.get("prompts", ()):
            if not self.has_prompt(stream, version):
                self.set_prompt(stream, version, padded(carried.tensors[f"prompt/{version}"], self.spec))

    @torch.inference_mode()
    def suspend(self, stream: str) -> int:
        """Move the stream's slots to the host, where they cost no room in the pool; returns the bytes. :meth:`run` resumes."""
        return set_aside(self._streams, self.spec.name, self.blocks, stream)

    @torch.inference_mode()
    def resume(self, stream: str) -> None:
        """Move them back. Raises NoSlotError, and the stream stays suspended, where others have taken the room."""
        bring_back(self._streams, self.blocks, stream)

    @property
    def free_slot_bytes(self) -> int:
        """Bytes of slots that are made and that nobody uses."""
        return sum(pool.free * pool.slot_bytes() for pool in self._streams.pools)

    @property
    def suspended(self) -> dict[str, int]:
        """The streams whose slots are on the host, with their bytes there."""
        held = self._streams.states.items()
        return {stream: known.aside.nbytes() for stream, known in held if known.aside is not None}

    # --- blocks that come and go -------------------------------------------------------------------------------------

    def prepare(self, blocks: range) -> Pieces:
        """Load what this stage lacks to be one of ``blocks``; from any thread, while it serves.

        Raises StageError, WeightsError, FileNotFoundError.
        """
        if self._loader is None:
            raise StageError("this stage was not loaded from files: it has no other blocks")
        return load_pieces(self._loader, self.blocks, blocks, self._loras, self._scales, self._fp8)

    def none_of(self, blocks: range) -> Pieces:
        """What :meth:`prepare` gives for blocks that are all here."""
        return Pieces(blocks, (), self._scales)

    @torch.inference_mode()
    def set_blocks(self, pieces: Pieces) -> tuple[str, ...]:
        """Be a stage of other blocks from now on; slots and prompts of those that stay are untouched, others are dropped.

        Slots of new blocks are those that were imported before. Returns the streams that lack some: they cannot run before
        these are imported, or the stream is reset. Raises StageError when blocks are neither here nor in the pieces.
        """
        before, after = self.blocks, pieces.blocks
        parts = (self.model, *pieces.dits)
        if lacking := [block for block in after if not any(block in part.range for part in parts)]:
            raise StageError(f"blocks {', '.join(map(str, lacking))} were not prepared")
        self.model = joined(self.spec, after, parts)
        self.blocks, self.layers = after, self.model.layers()
        if self._loras is not None and not self._fp8 and pieces.scales != self._scales:
            self._loras.apply(self.model, self._scales)
            repack(self.model)
        kept = kept_blocks(before, after)
        for (height, width), pool in self._streams.by_size.items():
            pool.reblock(len(after), kept, self._inputs_shape(height, width))
        streams = self._streams
        streams.unmix()
        streams.prompts.reblock(len(after), kept)
        fill_prompts(self.model, [b for b in after if b not in before], streams.prompts, list(streams.states.values()))
        self._use(self._kernel)  # what was recorded is of the old blocks
        return change_blocks(streams, self.spec.name, before, after)

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
            inputs_shape=self._inputs_shape(height, width),
        )

    def _inputs_shape(self, height: int, width: int) -> tuple[int, int, int] | None:
        return (self.spec.latent_channels, height, width) if self.is_first else None

    @property
    def _latent_channels(self) -> int:
        """Channels of one token's float32 latents, seen in the model's dtype."""
        return PATCH * PATCH * self.spec.latent_channels * 4 // self.dtype.itemsize
