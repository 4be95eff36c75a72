"""The rolling KV cache: preallocated rings of frames, one per (stream, step), for all blocks of a stage.

The host knows how many frames each slot holds; *which* place a frame takes is decided on the device
(:mod:`shared.engine.model.places`), so no forward waits for the device. Written places are always a prefix of the ring:
attention looks at that prefix and needs no mask. What a forward does with it: :mod:`shared.engine.model.cache_run`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.engine.model.places import OldestFirst, PublicRule, moved_rows
from shared.engine.model.rope import RopeTable, rotate
from shared.engine.plan.spec import ModelSpec


class NoSlotError(RuntimeError):
    """The cache holds as many slots as it may."""


@dataclass(frozen=True, slots=True)
class SlotHead:
    """What the host knows of a slot: frames held, the newest start frame, how many noisy latents it has seen (block 0)."""

    filled: int
    last_start: int | None
    seen: int

    @property
    def place(self) -> tuple[int, int | None]:
        """The part that is the same on every stage."""
        return self.filled, self.last_start


def room_on(device: torch.device) -> float:
    """Bytes that can still be allocated on the device; of a CPU nothing is said."""
    if device.type != "cuda":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class KvPool:
    """Slots of one latent size.

    keys, values: [blocks, slots, ring, tokens, dim] in the model's dtype, keys turned by RoPE; means [blocks, slots, ring, 2,
    dim] float32: each frame's mean key and mean value, which the sink test compares. With ``inputs_shape`` (C, h, w), the
    noisy latents that each slot saw last are kept as well, [slots, ring, C, h, w] float32: a re-cache runs them again.
    ``generation`` changes whenever the tensors are made anew, which ends what was captured with their addresses.
    """

    def __init__(
        self,
        spec: ModelSpec,
        blocks: int,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        slots: int = 2,
        max_slots: int = 4096,
        public_rule: bool = False,
        inputs_shape: tuple[int, int, int] | None = None,
    ) -> None:
        self.spec, self.tokens, self.max_slots = spec, tokens, max_slots
        self.device = device
        self.generation = 0
        slots = min(slots, max_slots)
        shape = (blocks, slots, spec.ring, tokens, spec.dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.means = torch.zeros(blocks, slots, spec.ring, 2, spec.dim, device=device)
        self.inputs = torch.zeros(slots, spec.ring, *(inputs_shape or (0, 0, 0)), device=device)
        rule = PublicRule if public_rule else OldestFirst
        threshold = -2.0 if spec.sink_threshold is None else spec.sink_threshold
        self.rule = rule(blocks, slots, spec.ring, spec.sinks, threshold, device)
        self.filled = [0] * slots
        self.last_start: list[int | None] = [None] * slots
        self._seen = [0] * slots
        self._free = list(range(slots))

    @property
    def slots(self) -> int:
        """Slots made, in use or not."""
        return len(self.filled)

    @property
    def blocks(self) -> int:
        """DiT blocks held."""
        return self.keys.shape[0]

    @property
    def tests_sinks(self) -> bool:
        """Whether single frames may replace a sink."""
        return self.spec.sink_threshold is not None and self.spec.sinks > 0

    def take(self, near: int | None = None) -> int:
        """A free slot, the one after ``near`` if it can be had: neighbours need no gathering. NoSlotError at the limit."""
        if not self._free:
            self._grow()
        slot = near + 1 if near is not None and near + 1 in self._free else self._free[0]
        self._free.remove(slot)
        self.reset(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """The slot is free again."""
        self._free.append(slot)
        self._free.sort()

    def nbytes(self) -> int:
        """Bytes of the tensors held."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.means, self.inputs))

    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        return self.nbytes() // self.slots

    def reset(self, slot: int) -> None:
        """The slot becomes empty. Its kept inputs stay: a re-cache empties the slot and then runs them again."""
        self.filled[slot], self.last_start[slot] = 0, None
        self.rule.reset(slot)
        if self.rule.attends_unwritten:
            for tensor in (self.keys, self.values, self.means):
                tensor[:, slot].zero_()

    def fork(self, source: int, slot: int) -> None:
        """The slot becomes a copy of the source, ring positions included."""
        self.filled[slot], self.last_start[slot] = self.filled[source], self.last_start[source]
        self._seen[slot] = self._seen[source]
        self.rule.fork(source, slot)
        for tensor in (self.keys, self.values, self.means):
            tensor[:, slot].copy_(tensor[:, source])
        self.inputs[slot].copy_(self.inputs[source])

    def keep(self, slots: Sequence[int], noisy: Tensor) -> None:
        """The items' noisy latents [B, T, C, h, w] are the newest that their slots have seen."""
        ring, frames = self.spec.ring, noisy.shape[1]
        rows = [slot * ring + (self._seen[slot] + i) % ring for slot in slots for i in range(frames)]
        self.inputs.flatten(0, 1).index_copy_(0, self._index(rows), noisy.flatten(0, 1))
        for slot in slots:
            self._seen[slot] += frames

    def kept(self, slots: Sequence[int], frames: int) -> Tensor:
        """The last ``frames`` noisy latents that each slot has seen, oldest first: [B, frames, C, h, w] float32."""
        ring = self.spec.ring
        rows = [slot * ring + (self._seen[slot] - frames + i) % ring for slot in slots for i in range(frames)]
        return self.inputs.flatten(0, 1).index_select(0, self._index(rows)).unflatten(0, (len(slots), frames))

    def rerotate(self, slot: int, turn: RopeTable) -> None:
        """Every key of the slot is turned by the table of :meth:`Rope.shift`."""
        heads = (self.spec.heads, -1)
        keys = self.keys[:, slot]
        keys.copy_(rotate(keys.flatten(1, 2).unflatten(-1, heads), turn).flatten(-2).view_as(keys))
        means = self.means[:, slot, :, 0]
        means.copy_(rotate(means.unflatten(-1, heads), turn).flatten(-2))

    @property
    def idle(self) -> bool:
        """Whether no slot is in use."""
        return len(self._free) == self.slots

    def reserve(self, slots: int) -> None:
        """Make room for this many slots at once, up to the limit, so that nothing is allocated while streams run."""
        if slots > self.slots:
            self._grow(slots)

    def expect(self, slots: int) -> None:
        """Raises NoSlotError where so many more cannot be taken."""
        if len(self._free) + self.max_slots - self.slots < slots:
            raise NoSlotError(f"all {self.max_slots} KV slots of this latent size are in use")

    @property
    def free(self) -> int:
        """Slots that are made and not in use."""
        return len(self._free)

    def head(self, slot: int) -> SlotHead:
        """What the host knows of the slot."""
        return SlotHead(self.filled[slot], self.last_start[slot], self._seen[slot])

    def set_head(self, slot: int, head: SlotHead, *, with_inputs: bool) -> None:
        """The slot's contents are being put in. ``with_inputs``: its noisy latents, too."""
        self.filled[slot], self.last_start[slot] = head.filled, head.last_start
        if with_inputs:
            self._seen[slot] = head.seen

    def block_out(self, slot: int, block: int) -> dict[str, Tensor]:
        """Copies on the host of one pool block's part of a slot, written places only. Waits for the device."""
        return {name: part.to("cpu", copy=True) for name, part in self._parts(slot, block).items()}

    def block_in(self, slot: int, block: int, parts: Mapping[str, Tensor]) -> None:
        """Put in what :meth:`block_out` gave, after :meth:`set_head`. Raises KeyError, RuntimeError for other shapes."""
        for name, target in self._parts(slot, block).items():
            target.copy_(parts[name])

    def reblock(self, blocks: int, kept: Mapping[int, int], inputs_shape: tuple[int, int, int] | None) -> None:
        """Have so many blocks from now on: block ``new`` is what ``kept[new]`` was, the others hold nothing yet."""
        for name in ("keys", "values", "means"):  # one by one: the room for two of each is not there
            setattr(self, name, moved_rows(getattr(self, name), blocks, kept, 0))
        if tuple(self.inputs.shape[2:]) != (inputs_shape or (0, 0, 0)):
            self.inputs = self.inputs.new_zeros(*self.inputs.shape[:2], *(inputs_shape or (0, 0, 0)))
            self._seen = [0] * len(self._seen)
        self.rule.reblock(blocks, kept)
        self.generation += 1

    def _parts(self, slot: int, block: int) -> dict[str, Tensor]:
        held = self.spec.ring if self.rule.attends_unwritten else self.filled[slot]
        stores = {"keys": self.keys, "values": self.values, "means": self.means}
        parts = {name: store[block, slot, :held] for name, store in stores.items()}
        return {**parts, **{name: record[block, slot] for name, record in self.rule.records().items()}}

    def _grow(self, least: int = 0) -> None:
        """More slots. Where the device has no room for all of it there are as many as before, whatever was made."""
        held = self.slots
        slots = min(max(2 * held, least), self.max_slots)
        if self.slot_bytes() * slots > room_on(self.device):  # the new one beside the old one, tensor by tensor
            slots = min(max(held + 1, least), self.max_slots)
        if slots <= held:
            raise NoSlotError(f"all {held} KV slots of this latent size are in use")
        self.generation += 1  # first: a tensor that was made has another address even where the next one finds no room
        for name, axis in (("keys", 1), ("values", 1), ("means", 1), ("inputs", 0)):
            setattr(self, name, _longer(getattr(self, name), slots, axis))  # one by one: so the old one is freed
        self.rule.grow(slots)
        self.filled += [0] * (slots - held)
        self.last_start += [None] * (slots - held)
        self._seen += [0] * (slots - held)
        self._free += range(held, slots)

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(list(rows)).to(self.device, non_blocking=True)


def _longer(tensor: Tensor, size: int, axis: int) -> Tensor:
    """The tensor with zeros at an axis' end; itself if it is that long already."""
    held = tensor.shape[axis]
    if held >= size:
        return tensor
    longer = tensor.new_zeros(*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    longer.narrow(axis, 0, held).copy_(tensor)
    return longer
