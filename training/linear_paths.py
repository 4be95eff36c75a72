"""The start of the DiT's gated paths, by least squares: a minute instead of the hours that gradient descent would take.

A path gives every latent channel a 3×3 filter of x_t's cells; gates say how much of it comes in, and how much of what the
blocks made stays (:class:`shared.engine.model.head.Head`). First every style's best linear map from source to target is solved
for. Per channel, the first few directions that span most of those maps become the filters. Then, with the blocks as they are,
every style's best gates are solved for, and the map from prompts to gates. That gates also follow the picture is left to
training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from shared.engine.model.dit import Dit, patchify
from shared.engine.model.head import Head, mean_prompt, neighbourhoods
from shared.engine.plan.spec import PATCH
from training.pairs import Pair
from training.streaming_task import FIRST

Batch = Callable[[], list[Pair]]
Forward = Callable[[list[Pair]], object]
"""Restyles pairs with step 0 as the last thing the model does; frames before ``FIRST`` may be at another step."""


class StyleMaps:
    """Normal equations of every style's best linear map from a cell with its neighbours to the styled cell."""

    def __init__(self, styles: int, channels: int) -> None:
        self._grams = torch.zeros(styles, 9 * channels, 9 * channels)
        self._moments = torch.zeros(styles, 9 * channels, channels)

    def add(self, pair: Pair) -> None:
        """One pair's cells."""
        near = neighbourhoods(pair.source[None]).flatten(0, -2)
        styled = pair.target.movedim(1, -1).flatten(0, -2)
        self._grams[pair.style] += near.T @ near
        self._moments[pair.style] += near.T @ styled

    def solve(self, ridge: float = 0.01) -> Tensor:
        """[styles, C, 9·C]; zeros for a style that was never added."""
        return torch.stack([least_squares(g, m, ridge).mT for g, m in zip(self._grams, self._moments, strict=True)])


def least_squares(gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """Normal equations [n, n], [n, k] → their solution [n, k]; ``ridge`` is a share of the gram's mean diagonal."""
    level = ridge * gram.diagonal().mean().clamp(min=1e-6)
    factor = torch.linalg.cholesky(gram.double() + level * torch.eye(len(gram), dtype=torch.float64))
    return torch.cholesky_solve(moment.double(), factor).float()


def filters(maps: Tensor, paths: int) -> Tensor:
    """Maps [styles, C, 9·C] → per channel the directions that span most of them, [paths·C, 9·C], each of length one."""
    _, _, directions = torch.linalg.svd(maps.movedim(0, 1), full_matrices=False)
    return directions[:, :paths].movedim(1, 0).flatten(0, 1)


class GateFit:
    """Normal equations of every style's best gates: per channel, (projection ⊕ paths) → what is left to add."""

    def __init__(self, styles: int, channels: int, paths: int) -> None:
        self._grams = torch.zeros(styles, channels, 1 + paths, 1 + paths)
        self._moments = torch.zeros(styles, channels, 1 + paths)

    def add(self, style: int, gated: Tensor, left: Tensor) -> None:
        """gated [N, 1 + paths, 4·C], left [N, 4·C]: the four cells of a token alike."""
        channels = self._grams.shape[1]
        gated = gated.unflatten(-1, (-1, channels)).movedim(1, -1).flatten(0, 1)  # [4·N, C, 1 + paths]
        left = left.unflatten(-1, (-1, channels)).flatten(0, 1)
        self._grams[style] += torch.einsum("ncp,ncq->cpq", gated, gated)
        self._moments[style] += torch.einsum("ncp,nc->cp", gated, left)

    def solve(self, ridge: float = 1e-3) -> Tensor:
        """[styles, (1 + paths)·4·C], in the head's order."""
        solved = [
            torch.stack([least_squares(g, m[:, None], ridge)[:, 0] for g, m in zip(grams, moments, strict=True)], 1)
            for grams, moments in zip(self._grams, self._moments, strict=True)
        ]  # [1 + paths, C] each
        return torch.stack(solved)[:, :, None].expand(-1, -1, PATCH * PATCH, -1).flatten(1)


@torch.no_grad()
def gates_by_prompt(model: Dit, prompts: Sequence[Tensor], gates: Tensor, ridge: float = 1e-3) -> None:
    """Sets the map from prompts to gates. prompts: per style [n, text_len, text_dim]; gates [styles, (1 + paths)·4·C]."""
    read = [mean_prompt(model.context_kv(bank)[-1][1]) for bank in prompts]
    rows = torch.cat([torch.cat([each, torch.ones_like(each[:, :1])], 1) / len(each) ** 0.5 for each in read])
    wanted = torch.cat([gate.expand(len(each), -1) / len(each) ** 0.5 for each, gate in zip(read, gates, strict=True)])
    rows, wanted = rows.double(), wanted.double()
    solved = least_squares(rows.T @ rows, rows.T @ wanted, ridge)
    model.head.prompt_gates.weight.copy_(solved[:-1].T)
    cast("nn.Parameter", model.head.gates.bias).copy_(solved[-1])


@torch.no_grad()
def start_paths(model: Dit, prompts: Sequence[Tensor], batch: Batch, forward: Forward, clips: int) -> None:
    """Sets ``model``'s paths and gates from about ``clips`` pairs. ``prompts``: per style [n, text_len, text_dim]."""
    head, channels = model.head, model.spec.latent_channels
    maps, waiting = StyleMaps(len(prompts), channels), list[list[Pair]]()
    while sum(len(pairs) for pairs in waiting) < clips:
        waiting.append(batch())
        for pair in waiting[-1]:
            maps.add(pair)
    head.paths.weight.copy_(filters(maps.solve(), head.gated_paths))
    fit, seen = GateFit(len(prompts), channels, head.gated_paths), Seen(head)
    try:
        for pairs in waiting:
            forward(pairs)
            for pair, gated in zip(pairs, seen.gated, strict=True):
                target = patchify_last(pair.target[None, FIRST:])[0]
                gated = gated[-len(target) :]
                fit.add(pair.style, gated, target - gated[:, 0])
    finally:
        seen.end()
    gates_by_prompt(model, prompts, fit.solve())


def patchify_last(latents: Tensor) -> Tensor:
    """[B, F, C, h, w] → [B, L, 4·C] with channels last within a patch, as the head gives them."""
    tokens = patchify(latents).unflatten(-1, (latents.shape[2], 4))
    return tokens.mT.flatten(-2)


class Seen:
    """What the head's gates are for, of its last call: ``gated`` [B, L, 1 + paths, 4·C]."""

    def __init__(self, head: Head) -> None:
        self.gated = self._made = torch.empty(0)
        self._head = head
        self._hooks = [head.head.register_forward_hook(self._keep), head.register_forward_hook(self._note)]

    def _keep(self, _: nn.Module, __: object, made: Tensor) -> None:
        self._made = made.float()

    def _note(self, _: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], __: Tensor) -> None:
        self.gated = torch.cat([self._made[:, :, None], self._head.past(neighbourhoods(inputs[2]))], 2)

    def end(self) -> None:
        """Listens no more."""
        for hook in self._hooks:
            hook.remove()
