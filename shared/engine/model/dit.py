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
from shared.engine.model.rope import Rope, RopeTable
from shared.engine.plan.sigmas import sigma_of
from shared.engine.plan.spec import PATCH, ModelSpec, Prediction

_LEAST_ROWS = 8


SHUT_BELOW, OPEN_FROM = 0.16, 0.22
"""σ between which gated paths open. Steps after the first lie below by default, first steps above (docs/adr/0028)."""
PAST_THE_BLOCKS = ("head.paths.", "head.gates.", "head.prompt_gates.")
"""What the names of the gated paths' parameters begin with."""
DIRECT_FROM = 0.3
"""σ from which a model that predicts x0 gives it whole. Below, x_t is nearly x0: it is kept, and moved by the share σ / 0.3."""


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
        shift, scale = _per_token((self.modulation + e)[:, :, :2], x)
        return self.self_attn.project(_modulate(x, shift, scale), rope)

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
        gate, shift, scale, gate_mlp = _per_token((self.modulation + e)[:, :, 2:], x)
        x = torch.addcmul(x, self.self_attn.o(y.flatten(-2)), gate)
        x = x + self.cross_attn(self.norm3(x), context, kernel, bias)
        return torch.addcmul(x, self.ffn(_modulate(x, shift, scale)), gate_mlp)


class Head(nn.Module):
    """The last norm and projection, modulated by time; and, if the spec has them, gated paths past the blocks.

    A path is a 3×3 convolution of x_t itself. The prompt and the last block's token decide, value by value, how much of each
    path comes in and how much of the projection stays: fine detail of the source need not fit through ``dim`` channels
    (docs/adr/0028). The prompt is read from what the last block's cross-attention has of it.
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
        self.gated_paths = spec.gated_paths

    def forward(
        self, x: Tensor, e: Tensor, noisy: Tensor, sigma: Tensor, prompt: ContextKv, bias: Tensor | None = None
    ) -> Tensor:
        """x [B, L, dim], e [B, F or 1, dim] float32, x_t [B, F, C, h, w], σ [B, F or 1, 1, 1, 1] → [B, L, 4·C] float32.

        ``bias``: see :meth:`CrossAttention.forward`.
        """
        shift, scale = _per_token(self.modulation + e[:, :, None], x)
        x = _modulate(x, shift, scale)
        made = self.head(x).float()
        if not self.gated_paths:
            return made
        gates = self.gates(x).float() + self.gates_of(prompt[1], bias)[:, None]
        gates = gates.unflatten(-1, (1 + self.gated_paths, -1))
        more = made * gates[..., 0, :] + (gates[..., 1:, :] * self.past(noisy)).sum(-2)
        (share,) = _per_token(openness(sigma).flatten(2)[..., None], made)
        return torch.addcmul(made, share, more)

    def past(self, noisy: Tensor) -> Tensor:
        """x_t [B, F, C, h, w] → what every path makes of it [B, L, paths, 4·C] float32, channels last within a patch."""
        weight = self.paths.weight
        rows, columns = noisy.shape[-2:]
        made = self.paths(neighbourhoods(noisy.to(weight.dtype))).float()
        b, f = made.shape[:2]
        made = made.reshape(b, f, rows // PATCH, PATCH, columns // PATCH, PATCH, self.gated_paths, -1)
        return made.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5).flatten(1, 3)

    def gates_of(self, values: Tensor, bias: Tensor | None = None) -> Tensor:
        """A prompt's values in the last block [B or 1, M, heads, D] → its part of the gates [B or 1, …] float32."""
        rows = values.flatten(2)
        # A row that stands for many, as padding does, counts as often: the bias is the logarithm of that.
        mean = rows.mean(1) if bias is None else (rows * bias[:, 0, 0, :, None].softmax(1)).sum(1)
        return self.prompt_gates(fn.pad(mean, (0, 0, 0, max(0, _LEAST_ROWS - len(mean)))))[: len(mean)].float()


def openness(sigma: Tensor) -> Tensor:
    """How far the gated paths are open: wholly where x_t holds the source, not at all where it holds the model's estimate."""
    return ((sigma - SHUT_BELOW) / (OPEN_FROM - SHUT_BELOW)).clamp(0.0, 1.0)


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
        e = self.time_embedding(fn.pad(rows, (0, 0, 0, max(0, _LEAST_ROWS - len(rows)))))
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
        share = torch.as_tensor(sigma / DIRECT_FROM).clamp(max=1.0)
        return noisy + share * (predicted - noisy)

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


def neighbourhoods(latents: Tensor) -> Tensor:
    """[B, F, C, h, w] → every cell with the eight around it, row by row, zeros beyond the border: [B, F, h, w, 9·C]."""
    rows, columns = latents.shape[-2:]
    cells = fn.pad(latents.movedim(2, -1), (0, 0, 1, 1, 1, 1))
    return torch.cat([cells[:, :, y : y + rows, x : x + columns] for y in range(3) for x in range(3)], -1)


def patchify(latents: Tensor) -> Tensor:
    """Latents [B, F, C, h, w] → [B, F·(h/2)·(w/2), C·4], channels first within a patch."""
    b, f, c, h, w = latents.shape
    x = latents.reshape(b, f, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, f * (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpatchify(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The head's output [B, L, 4·C], channels last within a patch → [B, F, C, 2·rows, 2·columns]."""
    x = tokens.unflatten(-1, (PATCH, PATCH, -1)).unflatten(1, (-1, rows, columns))
    return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def _per_token(modulation: Tensor, x: Tensor) -> list[Tensor]:
    """[B, F or 1, n, dim] → n tensors that broadcast over x [B, L, dim], in x's dtype."""
    frames = modulation.shape[1]
    if frames > 1:
        modulation = modulation.repeat_interleave(x.shape[1] // frames, 1)
    return list(modulation.to(x.dtype).unbind(2))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift."""
    return torch.addcmul(shift, fn.layer_norm(x, x.shape[-1:], None, None, EPS), 1 + scale)
