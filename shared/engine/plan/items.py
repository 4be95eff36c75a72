"""Items: what a batch is made of.

An item is one (stream, frame block, step) with *everything* that alters its result. It is bound when the block's
step 0 is scheduled; its later steps are made from it by :meth:`Item.next_step`. No other message touches a slot.

Slots. A stream has one slot (the KV cache of every DiT block of the model) per step index 0…K−1. A slot is a ring of
``ring`` latent frames of which the first ``sinks`` are sinks.

Slot operations ride in the item and are carried out by every stage, in order, immediately before the item's forward:

* ``reset(k)``       slot k becomes empty;
* ``fork(j → k)``    slot k becomes a copy of slot j, ring positions included;
* ``rerotate(k, d)`` the rotation of every cached key of slot k is moved by d frames (a RoPE refresh).

A batch carries out the operations of all its items, in the order of the items, and then runs one forward. So no two
items of one stream in one batch may touch the same slot (:attr:`Item.touches`).

The first frame block of a stream has 1+T latent frames (its first chunk has 5 pixel frames) and runs its K steps one
after the other in slot 0, each of them resetting it first; its next block's step 0 forks slot 0 into 1…K−1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any


class SlotOpKind(StrEnum):
    """The three things that may happen to a slot besides being written by a forward."""

    RESET = "reset"
    FORK = "fork"
    REROTATE = "rerotate"


@dataclass(frozen=True, slots=True)
class SlotOp:
    """One operation on a slot of the item's stream.

    ``slot`` is the step index whose slot changes; ``source`` the slot a fork copies from; ``frames`` the signed shift
    of a re-rotation, in latent frames. Unused fields stay at their defaults.
    """

    kind: SlotOpKind
    slot: int
    source: int = -1
    frames: int = 0

    def to_plain(self) -> list[Any]:
        """Plain values, for a session store."""
        return [self.kind.value, self.slot, self.source, self.frames]

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> SlotOp:
        """The inverse of :meth:`to_plain`."""
        kind, slot, source, frames = plain
        return cls(SlotOpKind(kind), slot, source, frames)


@dataclass(frozen=True, slots=True)
class Item:
    """One step of one frame block of one stream.

    ``slot`` is the slot the forward reads and writes: the step index, except for a stream's first block, which uses
    slot 0 at every step. ``frames`` is the number of latent frames in the block. ``first_latent`` counts the latent
    frames of this stream that entered step 0 before this block; it keys ε with ``seed`` and ``step``. ``start_frame``
    is the RoPE position of the block's first frame. ``timesteps`` holds the nominal timestep (0…1000) of each of the
    block's K steps, so ``timesteps[step]`` is this item's and ``len(timesteps)`` is K. ``noise_scale`` is s: step 0's
    input is ε·s + latents·(1−s); s = 1 with no source latents means text to video.

    ``blend`` is the share (0…1) that the prompt ``blend_version`` has in the cross-attention keys and values; the rest is
    ``prompt_version``'s. ``context`` counts the latent frames just before the block that run along with it (a re-cache):
    its slot is emptied by its operations, and stage 0 puts the inputs that the slot saw last before the block's own.

    ``still``: nothing moves, so the noise does not either; each frame has the ε of latent frame 0.
    """

    stream: str
    epoch: int
    block: int
    step: int
    slot: int
    frames: int
    first_latent: int
    start_frame: int
    noise_scale: float
    timesteps: tuple[int, ...]
    seed: int
    prompt_version: int
    ops: tuple[SlotOp, ...] = ()
    blend_version: int = 0
    blend: float = 0.0
    context: int = 0
    still: bool = False

    @property
    def steps(self) -> int:
        """K, bound when step 0 was scheduled."""
        return len(self.timesteps)

    @property
    def timestep(self) -> int:
        """The nominal timestep this item's forward runs at."""
        return self.timesteps[self.step]

    @property
    def next_timestep(self) -> int | None:
        """The timestep the last stage re-noises to, or None when this is the block's last step."""
        return self.timesteps[self.step + 1] if self.step + 1 < self.steps else None

    @property
    def is_last_step(self) -> bool:
        """Whether the forward's x0 goes to decode."""
        return self.step + 1 == len(self.timesteps)

    @property
    def forward_frames(self) -> int:
        """Latent frames of the forward: the block's own and those that run along."""
        return self.context + self.frames

    @property
    def noise_frames(self) -> tuple[int, ...]:
        """The latent frame whose ε each of the block's frames gets."""
        first = self.first_latent
        return (0,) * self.frames if self.still else tuple(range(first, first + self.frames))

    @property
    def begins(self) -> bool:
        """Whether it is of a stream's first block: into an empty slot, by itself."""
        return not self.context and any(op.kind is SlotOpKind.RESET for op in self.ops)

    @property
    def prompts(self) -> tuple[int, ...]:
        """The prompt versions that the forward reads."""
        return (self.prompt_version, self.blend_version) if self.blend else (self.prompt_version,)

    @property
    def touches(self) -> frozenset[int]:
        """The slots that this item changes: the one it writes and the ones its operations change."""
        return frozenset({self.slot, *(op.slot for op in self.ops)})

    def next_step(self, slot: int, ops: tuple[SlotOp, ...] = ()) -> Item:
        """The same block, one step on. Everything but the slot and its operations is kept (rule 2)."""
        if self.is_last_step:
            raise ValueError(
                f"block {self.block} of stream {self.stream} has no step after {self.step}: K = {self.steps}"
            )
        return replace(self, step=self.step + 1, slot=slot, ops=ops)

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for a session store."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {"timesteps": list(self.timesteps), "ops": [op.to_plain() for op in self.ops]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Item:
        """The inverse of :meth:`to_plain`."""
        values: dict[str, Any] = dict(plain)
        values["timesteps"] = tuple(plain["timesteps"])
        values["ops"] = tuple(SlotOp.from_plain(op) for op in plain["ops"])
        return cls(**values)


def check_batch(items: Iterable[Item]) -> None:
    """Raise ValueError unless the items may share a forward: same frames and context, and no slot touched twice."""
    touched: set[tuple[str, int]] = set()
    frames: set[int] = set()
    contexts: set[int] = set()
    for item in items:
        frames.add(item.frames)
        contexts.add(item.context)
        for slot in sorted(item.touches):
            if (item.stream, slot) in touched:
                raise ValueError(f"two items of one batch touch slot {slot} of stream {item.stream}")
            touched.add((item.stream, slot))
    if len(frames) > 1:
        raise ValueError(f"items of {sorted(frames)} latent frames cannot share a batch")
    if len(contexts) > 1:
        raise ValueError(f"items that re-cache {sorted(contexts)} latent frames cannot share a batch")
