"""The DiT's training forward on a CPU, about twice as fast as the plain one: compiled blocks and dense attention.

The fused attention's backward is slow on a CPU, most of all over the prompt's few keys; two matrix products and a softmax are
not. The numbers are those of ``Dit.forward`` up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shared.engine.model.dit import Block, Dit
from shared.engine.model.modulation import modulate, per_token
from shared.engine.model.rope import RopeTable

BlockForward = Callable[..., Tensor]


def compute_dtype() -> torch.dtype:
    """bfloat16 where the CPU computes in it: twice as fast. Where it would be emulated it is slower than float32."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32  # pyright: ignore[reportPrivateUsage]


def autocast() -> torch.autocast:
    """A region that computes in :func:`compute_dtype`."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute_dtype() == torch.bfloat16)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B, L, heads, D] over [B, M, heads, D] → [B, L, heads, D]; bias [L, M] float32 is added to the scores."""
    q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    weights = torch.softmax(scores if bias is None else scores + bias, -1).to(v.dtype)
    return (weights @ v).transpose(1, 2)


def block_forward(
    block: Block, x: Tensor, e6: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, keys: Tensor, values: Tensor
) -> Tensor:
    """``Block.forward`` with dense attention."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = per_token(block.modulation + e6, x)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v, bias)

    x = torch.addcmul(x, block.self_attn(modulate(x, shift, scale), (cos, sin), attend), gate)
    cross = block.cross_attn
    q = cross.norm_q(cross.q(block.norm3(x))).unflatten(-1, (cross.heads, -1))
    x = x + cross.o(dense_attention(q, keys, values).flatten(-2))
    return torch.addcmul(x, block.ffn(modulate(x, shift_mlp, scale_mlp)), gate_mlp)


def compiled_block() -> Any:
    """:func:`block_forward` compiled for static shapes; one compilation serves all blocks."""
    return torch.compile(block_forward, dynamic=False)


def positions_table(model: Dit, positions: Sequence[int], rows: int, columns: int) -> RopeTable:
    """RoPE tables of a clip whose frames stand at any positions, [1, L, 1, D/2] each."""
    parts = [model.rope.table([p], 1, rows, columns) for p in positions]
    return torch.cat([c for c, _ in parts], 1), torch.cat([s for _, s in parts], 1)


def predict(
    model: Dit,
    latents: Tensor,
    timesteps: Tensor,
    sigma: Tensor,
    text: Tensor,
    positions: Sequence[int],
    bias: Tensor | None,
    block_fn: BlockForward,
    other: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What the last layer gives for whole clips: latents [B, F, C, h, w], timesteps [B, F], σ [B, F, 1, 1, 1], text
    [B, len, dim] → [B, F, C, h, w] float32. ``other`` is a second prompt [B, len, dim] and its share [B]."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    dtype = compute_dtype()
    with autocast():
        cos, sin = positions_table(model, positions, rows, columns)
        e, e6 = model.times(timesteps)
        x = model.patches(latents).to(dtype)
        prompts = model.context_kv(text)
        if other is not None:  # as a blend is served: in keys and values (docs/adr/0010)
            share = other[1][:, None, None, None]
            pairs = zip(prompts, model.context_kv(other[0]), strict=True)
            prompts = [(k + share * (c - k), v + (share * (d - v)).to(v.dtype)) for (k, v), (c, d) in pairs]
        for block, (k, v) in zip(model.layers(), prompts, strict=True):
            x = block_fn(block, x, e6, cos, sin, bias, k.to(dtype), v)
        return model.predict(x, e, latents, sigma, prompts[-1])


def score_bias(mask: Tensor) -> Tensor:
    """A mask [L, L] (True = may look) as a bias of the scores."""
    return torch.zeros(mask.shape).masked_fill(~mask, -1e4)
