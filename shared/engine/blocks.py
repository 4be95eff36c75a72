"""Blocks that come to a stage and go from it while it serves: weights are loaded ahead, beside those that are in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from shared.engine.model.dit import Dit
from shared.engine.model.fp8 import to_fp8
from shared.engine.model.lora import LoraSet
from shared.engine.model.packed import can_pack, pack
from shared.engine.model.prompt_pool import PromptPool
from shared.engine.plan.spec import ModelSpec
from shared.engine.stream_state import StreamState

Loader = Callable[[range], Dit]
"""Reads a run of blocks from the model's files, to the device."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Weights of the blocks that a stage of ``blocks`` lacks, arranged for serving, with the LoRA scales merged into them."""

    blocks: range
    dits: tuple[Dit, ...]
    scales: tuple[float, ...]


def load_pieces(
    load: Loader, held: range, blocks: range, loras: LoraSet | None, scales: tuple[float, ...], fp8: bool
) -> Pieces:
    """What a stage of ``held`` lacks to be one of ``blocks``; from any thread. Raises WeightsError, FileNotFoundError."""
    dits = tuple(load(run) for run in runs([block for block in blocks if block not in held]))
    for dit in dits:
        if loras is not None:
            (LoraSet(loras.loras, keep_base=False) if fp8 else loras).apply(dit, scales)
        serve(dit, fp8)
        device = dit.time_weight.device
        if device.type == "cuda":  # this thread's copies are done when the stage's streams read them
            torch.cuda.current_stream(device).synchronize()
    return Pieces(blocks, dits, scales)


def serve(dit: Dit, fp8: bool) -> None:
    """Arrange weights for serving, in place."""
    dit.fuse()
    if fp8:
        to_fp8(dit)
    if can_pack(dit.time_weight.device, dit.time_weight.dtype):
        pack(dit)


def joined(spec: ModelSpec, blocks: range, parts: Sequence[Dit]) -> Dit:
    """A Dit of these blocks, made of the parts' own modules."""
    with torch.device("meta"):
        model = Dit(spec, blocks)
    first = parts[0]
    model.text_embedding, model.time_embedding = first.text_embedding, first.time_embedding
    model.time_projection, model.rope = first.time_projection, first.rope
    layers = {name: block for part in parts for name, block in part.blocks.items()}
    model.blocks = nn.ModuleDict({str(index): layers[str(index)] for index in blocks})
    if model.is_first:
        model.patch_embedding = next(part.patch_embedding for part in parts if part.is_first)
    if model.is_last:
        model.head = next(part.head for part in parts if part.is_last)
    return model.eval().requires_grad_(False)


def kept_blocks(before: range, after: range) -> dict[int, int]:
    """Place in the stage after → place before, of the blocks that stay."""
    return {block - after.start: block - before.start for block in after if block in before}


def fill_prompts(model: Dit, gained: Sequence[int], pool: PromptPool, states: Sequence[StreamState]) -> None:
    """Keys and values of every stream's prompts in the blocks that came."""
    layers = model.layers()
    for known in states:
        for version, entry in known.prompts.items():
            context = model.context(padded(known.embeddings[version], model.spec).to(model.time_weight.device)[None])
            for block in gained:
                place = block - model.range.start
                pool.fill(place, entry, layers[place].cross_attn.context_kv(context))


def words_of(embedding: Tensor) -> int:
    """Rows of an embedding before its padding."""
    there = embedding.ne(0).any(1).nonzero()
    return int(there.max()) + 1 if len(there) else 0


def padded(words: Tensor, spec: ModelSpec) -> Tensor:
    """The whole embedding [text_len, text_dim] of its words."""
    whole = words.new_zeros(spec.text_len, spec.text_dim)
    whole[: len(words)] = words
    return whole


def runs(blocks: Sequence[int]) -> list[range]:
    """Ascending numbers as runs without gaps."""
    found: list[range] = []
    for _, members in groupby(enumerate(blocks), lambda pair: pair[1] - pair[0]):
        numbers = [block for _, block in members]
        found.append(range(numbers[0], numbers[-1] + 1))
    return found
