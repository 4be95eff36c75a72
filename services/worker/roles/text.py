"""text: prompts to embeddings, shared by every stream that uses the same words."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch


class TextEncoder(Protocol):
    """A prompt to [text_len, text_dim], padding zeroed."""

    def encode(self, prompt: str) -> torch.Tensor: ...


class TextRole:
    """Encodes prompts; results are kept in the session store by content, so a prompt is encoded once."""

    def __init__(self, encoder: TextEncoder, *, beside: bool = False) -> None:
        self._encoder = encoder
        self._lock = threading.Lock()
        self.beside = beside
        """The encoder is not on the worker's device, so that it must not keep the device's thread waiting."""

    def run(self, prompt: str) -> torch.Tensor:
        """The embedding, float32 on the CPU: [text_len, text_dim]. One prompt at a time."""
        with self._lock:
            return self._encoder.encode(prompt).detach().to("cpu", torch.float32).contiguous()

    def mix(self, parts: Sequence[tuple[str, float]]) -> torch.Tensor:
        """The weighted mean of several prompts' embeddings (text, weight). A proportion of 1 is that prompt's own, exactly."""
        total = sum(weight for _, weight in parts)
        return torch.stack([self.run(text) * (weight / total) for text, weight in parts]).sum(0)
