"""The causal Wan DiT, whole or only some of its blocks. Parameter names are those of the original Wan weights.

Shapes: latents [B, F, C, h, w]; tokens [B, L, dim] with L = F·(h/2)·(w/2), frame by frame, row by row; timesteps are nominal
(0…1000). The network predicts the flow v, so that x0 = x_t − σ·v, or x0 itself (the spec's ``prediction``).

The pieces are plain: ``patches`` → tokens, ``times`` → modulation, ``context`` → the prompt, blocks, ``predict``. Serving
calls them one by one (:mod:`shared.engine.stage`); training calls the module on a whole clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from shared.engine.model.attention import (
    EPS,
    Attend,
    ContextKv,
    CrossAttention,
    Kernel,
    SelfAttention,
    attention,
    full_attention,
)
from shared.engine.model.head import LEAST_ROWS, Head, openness
from shared.engine.model.modulation import modulate, per_token
from shared.engine.model.rope import Rope, RopeTable
from shared.engine.plan.sigmas import sigma_of
from shared.engine.plan.spec import PATCH, ModelSpec, Prediction

MENDING, STEEPNESS = 0.3, 5
"""Of a model that predicts x0: where x_t holds the estimate of the step before, it is kept and moved by the share (σ / 0.3)⁵,
so that a later step mends more than it loses (docs/adr/0030, 0032)."""


class Block(nn.Module):
    """One transformer layer: self-attention and MLP modulated by time, cross-attention to the prompt between them."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.self_attn = SelfAttention(spec.dim, spec.heads)
        self.norm3 = nn.LayerNorm(spec.dim, EPS)
        self.cross_attn = CrossAttention(spec.dim, spec.heads)
        self.ffn = nn.Sequential(
            nn.Linear(spec.dim, spec.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(spec.ffn_dim, spec.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, spec.dim) / spec.dim**0.5)

    def forward(self, x: Tensor, e: Tensor, rope: RopeTable, attend: Attend, context: ContextKv) -> Tensor:
        """x [B, L, dim]; e [B, F or 1, 6, dim] float32 from :meth:`Dit.times`; context from :meth:`Dit.context_kv`."""
        return self.finish(x, attend(*self.project(x, e, rope)), e, context)

    def project(self, x: Tensor, e: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor, Tensor]:
        """All before the cache: x, e → q, k, v [B, L, heads, D] each, q and k turned."""
        shift, scale = per_token((self.modulation + e)[:, :, :2], x)
        return self.self_attn.project(modulate(x, shift, scale), rope)

    def finish(
        self,
        x: Tensor,
        y: Tensor,
        e: Tensor,
        context: ContextKv,
        kernel: Kernel = attention,
        bias: Tensor | None = None,
    ) -> Tensor:
        """All behind the cache: y [B, L, heads, D] is what self-attention read → the next block's x.

        ``bias``: see :meth:`CrossAttention.forward`.
        """
        gate, shift, scale, gate_mlp = per_token((self.modulation + e)[:, :, 2:], x)
        x = torch.addcmul(x, self.self_attn.o(y.flatten(-2)), gate)
        x = x + self.cross_attn(self.norm3(x), context, kernel, bias)
        return torch.addcmul(x, self.ffn(modulate(x, shift, scale)), gate_mlp)


class Dit(nn.Module):
    """Blocks ``blocks`` of the model (all of them by default), with what the first and the last of them need."""

    def __init__(self, spec: ModelSpec, blocks: range | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.range = range(spec.layers) if blocks is None else blocks
        if not self.range or self.range.step != 1 or self.range.start < 0 or self.range.stop > spec.layers:
            raise ValueError(f"{self.range} is no run of the blocks 0…{spec.layers - 1} of {spec.name}")
        dim = spec.dim
        if self.is_first:
            self.patch_embedding = nn.Conv3d(spec.latent_channels, dim, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(
            nn.Linear(spec.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(spec.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleDict({str(i): Block(spec) for i in self.range})
        if self.is_last:
            self.head = Head(spec)
        self.rope = Rope(spec.head_dim)

    @property
    def is_first(self) -> bool:
        """Whether it takes latents."""
        return self.range.start == 0

    @property
    def is_last(self) -> bool:
        """Whether it returns the prediction."""
        return self.range.stop == self.spec.layers

    @property
    def time_weight(self) -> Tensor:
        """A weight that every stage has: its device and dtype are the model's."""
        return cast("nn.Linear", self.time_embedding[0]).weight

    def fuse(self) -> None:
        """Arrange the weights for serving; see :meth:`SelfAttention.fuse`."""
        for block in self.layers():
            block.self_attn.fuse()

    def layers(self) -> list[Block]:
        """The blocks in order."""
        return [block for block in self.blocks.values() if isinstance(block, Block)]

    def patches(self, latents: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] → tokens [B, L, dim]. First blocks only."""
        weight = self.patch_embedding.weight
        return fn.linear(patchify(latents).to(weight.dtype), weight.flatten(1), self.patch_embedding.bias)

    def times(self, timesteps: Tensor | Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
        """Nominal timesteps [B, F] → (e [B, F, dim] for the head, e6 [B, F, 6, dim] for the blocks), float32.

        F may be 1 where all frames of an item share a timestep. Given as numbers they never visit the device as float64.
        """
        return self.modulations(self.waves(timesteps))

    def waves(self, timesteps: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """Nominal timesteps [B, F] → their sinusoids [B, F, freq_dim], in the model's dtype on its device."""
        weight = self.time_weight
        nominal = torch.as_tensor(timesteps, dtype=torch.float64)
        half = self.spec.freq_dim // 2
        steps = torch.arange(half, dtype=torch.float64, device=nominal.device)
        angle = nominal[..., None] * torch.pow(torch.tensor(10000.0, dtype=torch.float64), -steps / half)
        return torch.cat([angle.cos(), angle.sin()], -1).to(weight.dtype).to(weight.device, non_blocking=True)

    def modulations(self, waves: Tensor) -> tuple[Tensor, Tensor]:
        """The second half of :meth:`times`."""
        rows = waves.flatten(0, 1)
        # A handful of rows goes through other kernels than many do, and an item's last bits would depend on its company.
        e = self.time_embedding(fn.pad(rows, (0, 0, 0, max(0, LEAST_ROWS - len(rows)))))
        e6 = self.time_projection(e)[: len(rows)].unflatten(0, waves.shape[:2])
        return e[: len(rows)].unflatten(0, waves.shape[:2]).float(), e6.unflatten(-1, (6, -1)).float()

    def context(self, text: Tensor) -> Tensor:
        """Text embeddings [B, text_len, text_dim] → projected [B, text_len, dim]."""
        return self.text_embedding(text.to(self.time_weight.dtype))

    def context_kv(self, text: Tensor) -> list[ContextKv]:
        """Text embeddings → every block's cross-attention keys and values."""
        context = self.context(text)
        return [block.cross_attn.context_kv(context) for block in self.layers()]

    def predict(
        self, x: Tensor, e: Tensor, noisy: Tensor, sigma: Tensor, prompt: ContextKv, bias: Tensor | None = None
    ) -> Tensor:
        """Tokens [B, L, dim], x_t [B, F, C, h, w] → flow or x0 (see :meth:`clean`), float32, like x_t. Last blocks only.

        σ [B, F or 1, 1, 1, 1]; ``prompt`` is the last block's of :meth:`context_kv`, ``bias`` what it had there.
        """
        rows, columns = (side // PATCH for side in noisy.shape[-2:])
        return unpatchify(self.head(x, e, noisy, sigma, prompt, bias), rows, columns)

    def clean(self, noisy: Tensor, sigma: Tensor | float, predicted: Tensor) -> Tensor:
        """x0 [B, F, C, h, w] from x_t and what the last layer gave for it; σ broadcasts."""
        if self.spec.prediction == Prediction.FLOW:
            return noisy - sigma * predicted
        sigma = torch.as_tensor(sigma)
        share = torch.lerp((sigma / MENDING).clamp(max=1.0).pow(STEEPNESS), torch.ones_like(sigma), openness(sigma))
        kept = (1 - share) / (1 - sigma).clamp(min=1 - MENDING)  # of x_t = (1 − σ)·x0 + σ·noise
        return torch.addcmul(share * predicted, noisy, kept)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        attend: Attend | None = None,
        start_frames: Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The whole model on whole clips; differentiable.

        latents [B, F, C, h, w], timesteps [B, F] or [B, 1], text [B or 1, text_len, text_dim], mask [L, L] or [B, 1, L, L]
        (True = may look) → the prediction [B, F, C, h, w] float32. ``attend`` replaces the masked attention in every block.
        """
        batch, frames, _, height, width = latents.shape
        rows, columns = height // PATCH, width // PATCH
        rope = self.rope.table(start_frames or [0] * batch, frames, rows, columns, latents.device)
        e, e6 = self.times(timesteps)
        x = self.patches(latents)
        look = attend if attend is not None else full_attention(mask)
        prompts = self.context_kv(text)
        for block, kv in zip(self.layers(), prompts, strict=True):
            x = block(x, e6, rope, look, kv)
        sigma = noise_levels(timesteps, self.spec.sigma_shift).to(x.device)
        return self.predict(x, e, latents, sigma, prompts[-1])


def noise_levels(timesteps: Tensor | Sequence[Sequence[float]], shift: float) -> Tensor:
    """Nominal timesteps [B, F] → σ [B, F, 1, 1, 1] float32 from the shifted table, on the host."""
    rows: list[list[float]] = torch.as_tensor(timesteps).tolist()
    return torch.tensor([[sigma_of(t, shift) for t in row] for row in rows])[:, :, None, None, None]


def patchify(latents: Tensor) -> Tensor:
    """Latents [B, F, C, h, w] → [B, F·(h/2)·(w/2), C·4], channels first within a patch."""
    b, f, c, h, w = latents.shape
    x = latents.reshape(b, f, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, f * (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpatchify(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The head's output [B, L, 4·C], channels last within a patch → [B, F, C, 2·rows, 2·columns]."""
    x = tokens.unflatten(-1, (PATCH, PATCH, -1)).unflatten(1, (-1, rows, columns))
    return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
