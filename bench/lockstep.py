"""Streams in lock step through the stages: one new frame block per stream and tick, older ones at their later steps.

What :class:`shared.engine.stepper.Stepper` does between encode and decode, cut so that each part can be timed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shared.engine.plan.items import Item
from shared.engine.plan.noise_controller import step_timesteps
from shared.engine.plan.spec import ModelSpec
from shared.engine.plan.stream_plan import StreamPlan
from shared.engine.stage import Stage


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds and result; waits for the device."""
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) * 1000, result


class LockStep:
    """Streams × K items in one forward per tick, once the pipeline of steps is full."""

    def __init__(
        self,
        spec: ModelSpec,
        stages: Sequence[Stage],
        size: tuple[int, int],
        steps: int,
        streams: int = 1,
        prompt: Tensor | None = None,
    ) -> None:
        """``size`` is (width, height) in pixels; ``prompt`` an embedding [text_len, text_dim], None: a random one."""
        rows, columns = spec.latent_size(*size)
        self.spec, self.stages, self.device = spec, list(stages), stages[0].device
        self.shape = (spec.latent_channels, rows, columns)
        self.timesteps = step_timesteps(spec.steps[0], spec.steps[:steps])
        self.plans = [StreamPlan.for_model(f"bench-{i}", 0, spec) for i in range(streams)]
        self.waiting: list[tuple[StreamPlan, Item, Tensor]] = []
        embedding = torch.randn(spec.text_len, spec.text_dim) if prompt is None else prompt
        for plan, stage in itertools.product(self.plans, stages):
            stage.open(plan.stream, rows, columns)
            stage.set_prompt(plan.stream, 1, embedding)

    def close(self) -> None:
        """Take the streams off the stages: others may be measured on them."""
        for plan, stage in itertools.product(self.plans, self.stages):
            stage.close(plan.stream)

    @property
    def next_frames(self) -> int:
        """Latent frames of the next block: 2 of the first one, 1 of the others."""
        return 1 if self.plans[0].under_way or self.plans[0].next_start_frame else 2

    def latents(self) -> Tensor:
        """Made-up source latents of one block of every stream [streams, T, C, h, w]."""
        return torch.randn(len(self.plans), self.next_frames, *self.shape, device=self.device)

    def tick(self, latents: Tensor | None = None) -> list[float]:
        """One new block per stream. Returns each stage's milliseconds, re-noising counted to the last stage."""
        spent = [0.0] * len(self.stages)
        latents = self.latents() if latents is None else latents
        waiting = [(plan, plan.next(item), x) for plan, item, x in self.waiting]
        entries = [
            (plan, plan.enter(len(x), self.spec.noise.s0, self.timesteps, 0, 1), x)
            for plan, x in zip(self.plans, latents, strict=True)
        ]
        # Stream by stream, step by step: neighbouring slots are read where they lie.
        entries = sorted(entries + waiting, key=lambda entry: (entry[0].stream, entry[1].step))
        self.waiting = []
        while entries:
            items, x = [item for _, item, _ in entries], torch.stack([x for _, _, x in entries])
            for index, stage in enumerate(self.stages):
                took, x = timed(self.device, partial(stage.run, items, x))
                spent[index] += took
            left = [i for i, item in enumerate(items) if not item.is_last_step]
            again: list[Tensor] = []
            if left:
                took, noisy = timed(self.device, partial(self.stages[-1].renoise, [items[i] for i in left], x[left]))
                spent[-1] += took
                again = list(noisy)
            renoised = iter(again)
            at_once: list[tuple[StreamPlan, Item, Tensor]] = []
            for plan, item, _ in entries:
                if plan.done(item):
                    continue
                if item.frames > 1:
                    at_once.append((plan, plan.next(item), next(renoised)))
                else:
                    self.waiting.append((plan, item, next(renoised)))
            entries = at_once
        return spent
