"""The two attentions of a DiT block. What self-attention looks at is decided by the caller.

Self-attention makes its queries, keys and values, turns them by RoPE and hands them to an :data:`Attend`: the trainer passes
full attention with a mask, serving passes the rolling cache, which stores the keys and attends to what it holds.

Which kernel computes the softmax is a matter of device and dtype (:mod:`shared.engine.model.kernels`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from shared.engine.model.rope import RopeTable, rotate

EPS = 1e-6

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each [B, L, heads, D] with q and k already turned → [B, L, heads, D]."""

ContextKv = tuple[Tensor, Tensor]
"""The prompt's keys and values in one block: [B or 1, M, heads, D] each; M is text_len, or fewer (PromptPool)."""


Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Softmax attention without a mask: q [B, L, heads, D] over k, v [B, M, heads, D] → [B, L, heads, D]."""


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of q [B, L, heads, D] over k, v [B, M, heads, D] → [B, L, heads, D].

    A bool mask says True = may look; a float one, in q's dtype, is added to the scores.
    """
    y = fn.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return y.transpose(1, 2)


def full_attention(mask: Tensor | None = None) -> Attend:
    """An Attend over the clip itself, for training: mask [L, L] or [B, 1, L, L], True = may look. Differentiable."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask)

    return attend


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dimension (all heads together), computed in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim]."""
        return fn.rms_norm(x.float(), self.weight.shape, None, EPS).to(x.dtype) * self.weight


class SelfAttention(nn.Module):
    """Queries, keys and values of the tokens themselves."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RmsNorm(dim)
        self.norm_k = RmsNorm(dim)
        self.qkv: nn.Linear | None = None

    def fuse(self) -> None:
        """Lay the three projections behind one another, so that one matrix product makes them all (for serving).

        The three become views of the joined one: what changes them in place, as a LoRA does, changes both.
        """
        parts = (self.q, self.k, self.v)
        weight, bias = (torch.cat([getattr(part, n).detach() for part in parts]) for n in ("weight", "bias"))
        for part, w, b in zip(parts, weight.chunk(3), bias.chunk(3), strict=True):
            part.weight, part.bias = _frozen(w), _frozen(b)
        with torch.device("meta"):
            self.qkv = nn.Linear(weight.shape[1], weight.shape[0])
        self.qkv.weight, self.qkv.bias = _frozen(weight), _frozen(bias)

    def project(self, x: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, dim] → q, k (turned) and v, [B, L, heads, D] each."""
        q, k, v = (self.q(x), self.k(x), self.v(x)) if self.qkv is None else self.qkv(x).chunk(3, -1)
        split = (self.heads, -1)
        q = rotate(self.norm_q(q).unflatten(-1, split), rope)
        k = rotate(self.norm_k(k).unflatten(-1, split), rope)
        return q, k, v.unflatten(-1, split)

    def forward(self, x: Tensor, rope: RopeTable, attend: Attend) -> Tensor:
        """x [B, L, dim] → [B, L, dim]."""
        return self.o(attend(*self.project(x, rope)).flatten(-2))


class CrossAttention(nn.Module):
    """Queries of the tokens over the prompt's keys and values, which are made once per prompt."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RmsNorm(dim)
        self.norm_k = RmsNorm(dim)

    def context_kv(self, context: Tensor) -> ContextKv:
        """context [B, text_len, dim] (the projected text) → this block's keys and values."""
        split = (self.heads, -1)
        return self.norm_k(self.k(context)).unflatten(-1, split), self.v(context).unflatten(-1, split)

    def forward(self, x: Tensor, kv: ContextKv, kernel: Kernel = attention, bias: Tensor | None = None) -> Tensor:
        """x [B, L, dim] → [B, L, dim]. A kv of batch 1 serves every x.

        ``bias`` [B or 1, 1, 1, M], in x's dtype, is added to the scores: the logarithm of how often a key counts.
        """
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        k, v = (t.expand(x.shape[0], -1, -1, -1) for t in kv)
        return self.o((kernel(q, k, v) if bias is None else attention(q, k, v, bias)).flatten(-2))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
