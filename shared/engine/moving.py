"""A stream's state as plain tensors and a small dictionary: taken out of a stage, put into another, kept on the host meanwhile.

Blocks are numbered absolutely: a stage takes what belongs to its own blocks, keeps what belongs to blocks that it is about to
get, and leaves the rest. Only the written places of a ring travel. All of it is exact: what goes on with a copy computes the
same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from shared.engine.model.kv_cache import SlotHead

if TYPE_CHECKING:
    from shared.engine.stream_state import Streams

Value = Tensor | str | bool | int | None
"""What an autoencoder's memory is made of."""


class SlotsMeta(TypedDict):
    """What goes with a stream's slots: the model, the latent size, the blocks, and per step its index and its head."""

    model: str
    size: list[int]
    blocks: list[int]
    steps: list[list[int | None]]


@dataclass(slots=True)
class Carried:
    """State on its way: tensors on the host by name, and what is no tensor (of plain JSON types)."""

    meta: dict[str, Any] = field(default_factory=dict[str, Any])
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def join(self, other: Carried) -> None:
        """Put the other's state to this one's."""
        self.meta.update(other.meta)
        self.tensors.update(other.tensors)

    @property
    def blocks(self) -> list[int]:
        """The DiT blocks whose slots are in it."""
        return list(self.slots["blocks"]) if "slots" in self.meta else []

    @property
    def slots(self) -> SlotsMeta:
        """What goes with the slots."""
        return self.meta["slots"]

    @property
    def heads(self) -> dict[int, SlotHead]:
        """Step index → what the host knows of its slot."""
        found: dict[int, SlotHead] = {}
        for step, filled, last_start, seen in self.slots["steps"]:
            found[int(step or 0)] = SlotHead(int(filled or 0), last_start, int(seen or 0))
        return found

    def keep_blocks(self, wanted: Iterable[int]) -> Carried:
        """The same with the slots of these blocks only, tensors shared. Noisy latents go with block 0."""
        kept = [block for block in self.blocks if block in set(wanted)]
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            kind, *where = name.split("/")
            if (kind == "kv" and int(where[1]) not in kept) or (kind == "inputs" and 0 not in kept):
                continue
            tensors[name] = tensor
        meta = {**self.meta, "slots": {**self.slots, "blocks": kept}} if "slots" in self.meta else dict(self.meta)
        return Carried(meta, tensors)


def export_slots(streams: Streams, model: str, held: range, stream: str, blocks: range) -> Carried:
    """Copies, on the host, of the stream's slots of these blocks, where this stage (of ``held``) has them; and its prompts."""
    known = streams.of(stream)
    if known.aside is not None:
        carried = known.aside.keep_blocks(blocks)
    else:
        wanted = [block for block in held if block in blocks and block not in known.missing]
        carried = Carried()
        steps: list[list[int | None]] = []
        for step, slot in sorted(known.slots.items()):
            pool = streams.pool(*known.size)
            head = pool.head(slot)
            steps.append([step, head.filled, head.last_start, head.seen])
            for block in wanted:
                for name, part in pool.block_out(slot, block - held.start).items():
                    carried.tensors[f"kv/{step}/{block}/{name}"] = part
            if 0 in wanted:
                carried.tensors[f"inputs/{step}"] = pool.inputs[slot].to("cpu", copy=True)
        slots: SlotsMeta = {"model": model, "size": list(known.size), "blocks": wanted, "steps": steps}
        carried.meta["slots"] = slots
    carried.meta["prompts"] = sorted(known.embeddings)
    carried.tensors.update({f"prompt/{version}": t for version, t in known.embeddings.items()})
    return carried


def why_not(streams: Streams, model: str, stream: str, carried: Carried) -> str | None:
    """Why these slots are not the stream's, in one line; None: they are."""
    known, slots = streams.of(stream), carried.slots
    if slots["model"] != model:
        return f"the slots are of model {slots['model']}, this stage runs {model}"
    if tuple(slots["size"]) != known.size:
        return f"the slots are of {slots['size']} latents, the stream has {list(known.size)}"
    ours = known.aside.heads if known.aside is not None else streams.heads(stream)
    if ours and {step: head.place for step, head in ours.items()} != {s: h.place for s, h in carried.heads.items()}:
        return "the slots are of another moment than those that are here"
    return None


def import_slots(streams: Streams, held: range, stream: str, carried: Carried) -> None:
    """The open stream's slots of ``carried``'s blocks become these: at once those of ``held``, the others when they are got.

    Call it after :func:`why_not`. Raises NoSlotError, with nothing changed.
    """
    known = streams.of(stream)
    ours = [block for block in carried.blocks if block in held]
    ahead = [block for block in carried.blocks if block not in held]
    if ahead:
        more = carried.keep_blocks(ahead)
        if known.ahead is None:
            known.ahead = more
        else:
            more.meta["slots"]["blocks"] = sorted({*known.ahead.blocks, *ahead})
            known.ahead.join(more)
    if not ours:
        return
    if known.aside is not None:
        both = sorted({*known.aside.blocks, *ours})
        known.aside.join(carried.keep_blocks(ours))
        known.aside.meta["slots"]["blocks"] = both
        known.missing -= set(ours)
        return
    fresh = not known.slots
    pool = streams.pool(*known.size)
    if fresh:
        pool.expect(len(carried.heads))
    for step, head in sorted(carried.heads.items()):
        slot = streams.slot(stream, step)
        pool.set_head(slot, head, with_inputs=0 in ours)
        for block in ours:
            prefix = f"kv/{step}/{block}/"
            parts = {name.removeprefix(prefix): t for name, t in carried.tensors.items() if name.startswith(prefix)}
            pool.block_in(slot, block - held.start, parts)
        if 0 in ours:
            pool.inputs[slot].copy_(carried.tensors[f"inputs/{step}"])
    known.missing = (set(held) if fresh and carried.heads else known.missing) - set(ours)


def set_aside(streams: Streams, model: str, held: range, stream: str) -> int:
    """Move the stream's slots to the host; returns the bytes there. Aside already: nothing happens."""
    known = streams.of(stream)
    if known.aside is None:
        copied = export_slots(streams, model, held, stream, held)
        slots = {name: t for name, t in copied.tensors.items() if not name.startswith("prompt/")}
        missing = known.missing
        streams.give_back(stream)
        known.missing = missing
        known.aside = Carried({"slots": copied.slots}, slots)
    return known.aside.nbytes()


def bring_back(streams: Streams, held: range, stream: str) -> None:
    """Move them back. Raises NoSlotError, and they stay on the host, where others have taken the room."""
    known = streams.of(stream)
    aside = known.aside
    if aside is None:
        return
    missing = set(known.missing)
    known.aside = None
    try:
        import_slots(streams, held, stream, aside)
    except BaseException:
        known.aside = aside
        raise
    known.missing = missing if aside.heads else set()


def change_blocks(streams: Streams, model: str, before: range, after: range) -> tuple[str, ...]:
    """The pools have blocks ``after`` now: put in what came ahead. Returns the streams that lack slots of new blocks."""
    lacking: list[str] = []
    gained = [block for block in after if block not in before]
    for stream, known in streams.states.items():
        ahead, known.ahead = known.ahead, None
        if known.aside is not None:
            known.aside = known.aside.keep_blocks(after)
        has_slots = bool(known.slots) or (known.aside is not None and bool(known.aside.heads))
        known.missing = ({*known.missing, *gained} & set(after)) if has_slots else set()
        if ahead is not None and why_not(streams, model, stream, ahead) is None:
            import_slots(streams, after, stream, ahead.keep_blocks(after))
        if known.missing:
            lacking.append(stream)
    return tuple(lacking)


def carry_memory(name: str, values: Sequence[Value]) -> Carried:
    """An autoencoder's memory (:meth:`values`), copied to the host. Memory formats are kept: kernels depend on them."""
    carried, plain = Carried(), list[Any]()
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            carried.tensors[f"{name}/{index}"] = value.to("cpu", copy=True)
            plain.append({"tensor": index})
        else:
            plain.append(value)
    carried.meta[name] = plain
    return carried


def carried_memory(name: str, carried: Carried, device: torch.device) -> list[Value]:
    """What :func:`carry_memory` was given, on the device. Raises KeyError where it is not in there."""
    found: list[Value] = []
    for index, value in enumerate(carried.meta[name]):
        found.append(carried.tensors[f"{name}/{index}"].to(device) if isinstance(value, dict) else value)
    return found
