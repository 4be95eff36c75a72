"""The DiT's last layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from shared.engine.model.attention import ContextKv
from shared.engine.model.modulation import modulate, per_token
from shared.engine.plan.spec import PATCH, ModelSpec

SHUT_BELOW, OPEN_FROM = 0.16, 0.22
"""σ up to which x_t is taken for a step's own estimate, and from which for the source: later steps lie below by default, first
steps above (docs/adr/0028)."""
GATES = ("head.gates.", "head.prompt_gates.")
PATHS = ("head.paths.", *GATES)
"""What the names of the gated paths' parameters begin with. Without ``GATES`` nothing comes through."""
CELLS, CELLS_OUT = ("head.cells.",), ("head.cells.out.",)
"""What the names of the cell MLP's parameters begin with, and of those without which nothing comes through."""
LEAST_ROWS = 8


class CellMlp(nn.Module):
    """A gated MLP behind the blocks that works on latent cells, not on tokens, which stand for four of them.

    The first layer's hidden values see x_t in a cell and in the eight around it, the last block's token, and the prompt; the
    second layer's see those of the first, and the prompt. In both, half of what is summed up is values, half their gates;
    both come out (docs/adr/0029).
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        both = 2 * spec.cell_dim
        self.near = nn.Linear(9 * spec.latent_channels, both, bias=False)
        self.token = nn.Linear(spec.dim, PATCH * PATCH * both)
        self.prompt = nn.Linear(spec.dim, 2 * both, bias=False)
        self.mix = nn.Linear(spec.cell_dim, both)
        self.out = nn.Linear(both, spec.latent_channels, bias=False)

    def forward(self, x: Tensor, near: Tensor, prompt: Tensor) -> Tensor:
        """x [B, L, dim], near [B, F, h, w, 9·C] from :func:`neighbourhoods`, prompt [B or 1, dim] → [B, L, 4·C] float32."""
        asked_first, asked_second = few_rows(self.prompt, prompt)[:, None, None].chunk(2, -1)
        first = gated(by_token(self.near(near)) + self.token(x).unflatten(-1, (PATCH * PATCH, -1)) + asked_first)
        second = gated(self.mix(first) + asked_second)
        return self.out(torch.cat([first, second], -1)).flatten(2).float()


class Head(nn.Module):
    """The last norm and projection, modulated by time; and, if the spec has them, two ways past the blocks.

    A gated path is a 3×3 convolution of x_t itself. The prompt and the last block's token decide, value by value, how much of
    each path comes in and how much of the projection stays: fine detail of the source need not fit through ``dim`` channels
    (docs/adr/0028). What a style does to that detail is learned by the :class:`CellMlp`. Both read the prompt from what the
    last block's cross-attention has of it.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        values = PATCH * PATCH * spec.latent_channels
        self.head = nn.Linear(spec.dim, values)
        self.modulation = nn.Parameter(torch.randn(1, 2, spec.dim) / spec.dim**0.5)
        if spec.gated_paths:
            self.paths = nn.Linear(9 * spec.latent_channels, spec.gated_paths * spec.latent_channels, bias=False)
            self.gates = nn.Linear(spec.dim, (1 + spec.gated_paths) * values)
            self.prompt_gates = nn.Linear(spec.dim, (1 + spec.gated_paths) * values, bias=False)
        self.cells = CellMlp(spec) if spec.cell_dim else None
        self.gated_paths = spec.gated_paths

    def forward(
        self, x: Tensor, e: Tensor, noisy: Tensor, sigma: Tensor, prompt: ContextKv, bias: Tensor | None = None
    ) -> Tensor:
        """x [B, L, dim], e [B, F or 1, dim] float32, x_t [B, F, C, h, w], σ [B, F or 1, 1, 1, 1] → [B, L, 4·C] float32.

        ``bias``: see :meth:`CrossAttention.forward`.
        """
        shift, scale = per_token(self.modulation + e[:, :, None], x)
        x = modulate(x, shift, scale)
        made = self.head(x).float()
        if not self.gated_paths and self.cells is None:
            return made
        near, read = neighbourhoods(noisy.to(self.head.weight.dtype)), mean_prompt(prompt[1], bias)
        if self.gated_paths:
            gates = self.gates(x).float() + few_rows(self.prompt_gates, read).float()[:, None]
            gates = gates.unflatten(-1, (1 + self.gated_paths, -1))
            more = made * gates[..., 0, :] + (gates[..., 1:, :] * self.past(near)).sum(-2)
            (share,) = per_token(openness(sigma).flatten(2)[..., None], made)
            made = torch.addcmul(made, share, more)
        return made if self.cells is None else made + self.cells(x, near, read)

    def past(self, near: Tensor) -> Tensor:
        """[B, F, h, w, 9·C] from :func:`neighbourhoods` → what each path makes of it, [B, L, paths, 4·C] float32.

        Channels last within a patch.
        """
        made = by_token(self.paths(near).float()).unflatten(-1, (self.gated_paths, -1))
        return made.movedim(3, 2).flatten(3)


def gated(hidden: Tensor) -> Tensor:
    """Values and gates [..., 2·n] → [..., n]. A gate is at most one: what is loud comes out as loud, not squared."""
    return fn.glu(hidden, -1)


def openness(sigma: Tensor) -> Tensor:
    """How far x_t is taken for the source: wholly (1) in first steps, not at all (0) where it holds the model's estimate."""
    return ((sigma - SHUT_BELOW) / (OPEN_FROM - SHUT_BELOW)).clamp(0.0, 1.0)


def neighbourhoods(latents: Tensor) -> Tensor:
    """[B, F, C, h, w] → every cell with the eight around it, row by row, zeros beyond the border: [B, F, h, w, 9·C]."""
    rows, columns = latents.shape[-2:]
    cells = fn.pad(latents.movedim(2, -1), (0, 0, 1, 1, 1, 1))
    return torch.cat([cells[:, :, y : y + rows, x : x + columns] for y in range(3) for x in range(3)], -1)


def by_token(cells: Tensor) -> Tensor:
    """[B, F, h, w, D] → the cells of each token, row by row: [B, L, 4, D]."""
    b, f, rows, columns, _ = cells.shape
    cells = cells.reshape(b, f, rows // PATCH, PATCH, columns // PATCH, PATCH, -1)
    return cells.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5).flatten(1, 3)


def mean_prompt(values: Tensor, bias: Tensor | None = None) -> Tensor:
    """A prompt's values in the last block [B or 1, M, heads, D] → their mean [B or 1, dim]."""
    rows = values.flatten(2)
    # A row that stands for many, as padding does, counts as often: the bias is the logarithm of that.
    return rows.mean(1) if bias is None else (rows * bias[:, 0, 0, :, None].softmax(1)).sum(1)


def few_rows(layer: nn.Linear, rows: Tensor) -> Tensor:
    """``layer`` of [B, …]. A handful of rows goes through other kernels than many, and last bits would depend on company."""
    return layer(fn.pad(rows, (0, 0, 0, max(0, LEAST_ROWS - len(rows)))))[: len(rows)]
