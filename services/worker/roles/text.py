"""text: prompts to embeddings, shared by every stream that uses the same words."""

from __future__ import annotations

from typing import Protocol

import torch


class TextEncoder(Protocol):
    """A prompt to [text_len, text_dim], padding zeroed."""

    def encode(self, prompt: str) -> torch.Tensor: ...


class TextRole:
    """Encodes prompts; results are kept in the session store by content, so a prompt is encoded once."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder

    def run(self, prompt: str) -> torch.Tensor:
        """The embedding, float32 on the CPU: [text_len, text_dim]."""
        return self._encoder.encode(prompt).detach().to("cpu", torch.float32).contiguous()
