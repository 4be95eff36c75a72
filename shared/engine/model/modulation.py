"""How time acts on tokens: shifts, scales and gates per latent frame, as in adaptive layer norm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as fn

from shared.engine.model.attention import EPS


def per_token(modulation: Tensor, x: Tensor) -> list[Tensor]:
    """[B, F or 1, n, dim] → n tensors that broadcast over x [B, L, dim], in x's dtype."""
    frames = modulation.shape[1]
    if frames > 1:
        modulation = modulation.repeat_interleave(x.shape[1] // frames, 1)
    return list(modulation.to(x.dtype).unbind(2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift."""
    return torch.addcmul(shift, fn.layer_norm(x, x.shape[-1:], None, None, EPS), 1 + scale)
