"""stage: a contiguous range of DiT blocks, run on the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.engine.plan.items import Item
from shared.engine.stage import Stage


@dataclass(frozen=True, slots=True)
class StageOutput:
    """Of a middle stage: ``activations`` [items, tokens, dim]. Of the last one: per item its next step's input, or x0."""

    activations: torch.Tensor | None
    latents: tuple[torch.Tensor, ...] = ()


class StageRole:
    """Drives the engine's stage; latents of an item are [frames, C, h, w]."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._open: set[str] = set()

    def open(self, stream: str, height: int, width: int, steps: int = 0) -> None:
        """Give a stream room for the slots of so many steps; sizes in pixels. Raises StageError where there is none.

        One that is here keeps its prompts and loses its slots: items of its former epoch that are still under way find what
        they need, and what they leave in a slot the first block empties.
        """
        self.stage.open(stream, height // 8, width // 8, steps)
        self._open.add(stream)

    def close(self, stream: str) -> None:
        """Free a stream's slots."""
        if stream in self._open:
            self._open.discard(stream)
            self.stage.close(stream)

    def reset(self) -> None:
        """Empty every slot: the pipeline was rebuilt."""
        self.stage.reset()

    def set_prompt(self, stream: str, version: int, embedding: torch.Tensor, oldest: int = 0) -> None:
        """Compute the cross-attention K/V of a prompt version; those below ``oldest`` are in no item any more."""
        self.stage.set_prompt(stream, version, embedding)
        self.stage.drop_prompts(stream, set(range(oldest, version + 1)))

    def input_of(self, item: Item, parts: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """An item's latents [frames, C, h, w] from its chunks'. Without a source s is 1: the noise replaces what this is."""
        if not parts:
            return torch.zeros(item.frames, self.stage.spec.latent_channels, *size, device=self.stage.device)
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))

    def run(self, items: Sequence[Item], inputs: Sequence[torch.Tensor] | torch.Tensor) -> StageOutput:
        """One forward. The first stage takes each item's latents, later ones the activations of the one before."""
        x = inputs if isinstance(inputs, torch.Tensor) else torch.stack(list(inputs))
        y = self.stage.run(items, x)
        if not self.stage.is_last:
            return StageOutput(y)
        renoised = [index for index, item in enumerate(items) if not item.is_last_step]
        latents = list(y.unbind(0))
        if renoised:
            left = torch.stack([latents[index] for index in renoised])
            again = self.stage.renoise([items[index] for index in renoised], left)
            for place, index in enumerate(renoised):
                latents[index] = again[place]
        return StageOutput(None, tuple(latents))
