"""One forward of a stage as a fixed sequence of kernels: everything that changes from batch to batch lies in tensors.

``StepInputs`` is made on the host (:mod:`shared.engine.stage`); ``StepForward`` reads it and never looks back at the host. So
the same function runs as it stands, with compiled pieces, or captured as a CUDA graph (:mod:`shared.engine.compile`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shared.engine.model.attention import ContextKv, Kernel
from shared.engine.model.cache_run import CacheRun
from shared.engine.model.dit import Block, Dit
from shared.engine.model.prompt_pool import PromptPool
from shared.engine.model.rope import RopeTable
from shared.engine.plan.spec import PATCH

Project = Callable[[Block, Tensor, Tensor, RopeTable], tuple[Tensor, Tensor, Tensor]]
Finish = Callable[[Block, Tensor, Tensor, Tensor, ContextKv, Kernel, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """B items of F frames (the blocks' own T and those that run along), all on the stage's device.

    noisy [B, F, C, h, w] float32: x_t; hidden [B, L, dim] from the stage before, None on the first; waves [B, 1, freq_dim]: the
    timesteps' sinusoids; turn [2, B, F, ·]: RoPE's part over time; sigma [B, 1, 1, 1, 1]; prompts: the entry of every item
    [B], or one number for all. ``frames`` is T: the result has as many.
    """

    noisy: Tensor
    hidden: Tensor | None
    waves: Tensor
    turn: Tensor
    sigma: Tensor
    prompts: Tensor | int
    cache: CacheRun
    frames: int

    def tensors(self) -> tuple[Tensor, ...]:
        """All that changes from batch to batch, in a fixed order."""
        some = (self.noisy, self.waves, self.turn, self.sigma, self.cache.slots, self.cache.full, self.cache.latents)
        more = (self.hidden, self.prompts)
        return (*some, *(t for t in more if isinstance(t, Tensor)))

    def with_prompt_tensor(self) -> StepInputs:
        """The same with prompts as a tensor: [1] where all items share one."""
        if isinstance(self.prompts, Tensor):
            return self
        return replace(self, prompts=torch.full((1,), self.prompts, device=self.noisy.device))


class StepForward:
    """The blocks of one stage. ``project`` and ``finish`` may be compiled versions of :class:`Block`'s."""

    def __init__(
        self,
        model: Dit,
        prompts: PromptPool,
        kernel: Kernel,
        project: Project = Block.project,
        finish: Finish = Block.finish,
    ) -> None:
        self.model, self.prompts, self.kernel = model, prompts, kernel
        self.blocks = model.layers()
        self._project, self._finish = project, finish

    def __call__(self, step: StepInputs) -> Tensor:
        """Writes the slots; returns activations [B, L, dim], or on the last stage x0 [B, T, C, h, w] float32."""
        rows, columns = (side // PATCH for side in step.noisy.shape[-2:])
        model, cache = self.model, step.cache
        rope = model.rope.join(step.turn, rows, columns)
        e, e6 = model.modulations(step.waves)
        x = model.patches(step.noisy) if step.hidden is None else step.hidden
        bias = self.prompts.bias(step.prompts)
        cache.begin()
        for index, block in enumerate(self.blocks):
            q, k, v = self._project(block, x, e6, rope)
            y = cache.attend(index, q, k, v)
            x = self._finish(block, x, y, e6, self._prompt(index, step.prompts), self.kernel, bias)
        cache.finish()
        if not model.is_last:
            return x
        own = step.frames * rows * columns
        noisy = step.noisy[:, -step.frames :]
        prompt = self._prompt(len(self.blocks) - 1, step.prompts)
        predicted = model.predict(x[:, -own:], e, noisy, step.sigma, prompt, bias)
        return model.clean(noisy, step.sigma, predicted)

    def _prompt(self, block: int, prompts: Tensor | int) -> ContextKv:
        if isinstance(prompts, int):
            return self.prompts.at(block, prompts)
        return self.prompts.of(block, prompts)
