"""The small text encoder of the embedded model: prompt → [text_len, text_dim]. No vocabulary file: words are hashed.

A word is its own bucket plus the mean of its letter-trigram buckets, so a plural or a slip of the pen lands near the
word it stands for. One attention layer lets the words see each other; ``text_len`` learned queries read the result.
A prompt's first :data:`WORDS` words count; any text whatever is a legal prompt.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as fn

from shared.engine.plan.spec import ModelSpec

WORDS = 64
"""Words of a prompt that are read; the rest is ignored."""
TRIGRAMS = 12
"""Letter trigrams of a word that are read."""
MAX_CHARS = 4000
"""Characters of a prompt that are looked at."""

_WORD = re.compile(r"[^\W_]+|[^\w\s]", re.UNICODE)
_PLAIN_MARKS = frozenset(".,;:!?'\"()[]{}<>-–—/\\|*#@&%^~`+=$")


def words_of(prompt: str) -> list[str]:
    """Lower-case words without accents, and symbols such as emoji; plain punctuation falls away. At most :data:`WORDS`."""
    text = unicodedata.normalize("NFKD", prompt[:MAX_CHARS].casefold())
    text = "".join(c for c in text if not unicodedata.combining(c))
    return [word for word in _WORD.findall(text) if word not in _PLAIN_MARKS][:WORDS]


def buckets_of(word: str, buckets: int) -> list[int]:
    """The word's own bucket, then those of its trigrams (``^``/``$`` mark its ends). Bucket 0 is never used."""
    padded = f"^{word}$"
    parts = [word] + [f"#{padded[i : i + 3]}" for i in range(min(len(padded) - 2, TRIGRAMS))]
    return [1 + zlib.crc32(part.encode("utf-8", "surrogatepass")) % (buckets - 1) for part in parts]


class TinyTextEncoder(nn.Module):
    """Hashed words → one self-attention layer → ``text_len`` vectors of ``text_dim`` with unit root mean square.

    Thread-safe for reading: holds weights only. Row 0 of ``embedding`` stands for "no words here".
    """

    def __init__(self, text_len: int = 16, text_dim: int = 128, buckets: int = 8192, heads: int = 4) -> None:
        super().__init__()
        self.text_len, self.text_dim, self.buckets, self.heads = text_len, text_dim, buckets, heads
        self.embedding = nn.Parameter(torch.randn(buckets, text_dim) * 0.5)
        self.start = nn.Parameter(torch.randn(text_dim) * 0.5)
        self.queries = nn.Parameter(torch.randn(text_len, text_dim) * 0.5)
        self.norm = nn.LayerNorm(text_dim)
        self.qkv = nn.Linear(text_dim, 3 * text_dim)
        self.out = nn.Linear(text_dim, text_dim)
        self.norm_mlp = nn.LayerNorm(text_dim)
        self.mlp = nn.Sequential(nn.Linear(text_dim, 2 * text_dim), nn.GELU(), nn.Linear(2 * text_dim, text_dim))
        self.norm_read = nn.LayerNorm(text_dim)
        self.read_key = nn.Linear(text_dim, 2 * text_dim)
        self.head = nn.Sequential(nn.Linear(text_dim, 2 * text_dim), nn.GELU(), nn.Linear(2 * text_dim, text_dim))

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], heads: int = 4) -> TinyTextEncoder:
        """The encoder whose ``state_dict`` this is; its sizes are read from the shapes."""
        text_len, text_dim = state["queries"].shape
        encoder = cls(text_len, text_dim, state["embedding"].shape[0], heads)
        encoder.load_state_dict({k: v.float() for k, v in state.items()})
        return encoder.eval()

    @torch.inference_mode()
    def encode(self, prompt: str) -> Tensor:
        """One prompt → float32 [text_len, text_dim]. The same text always gives the same numbers."""
        return self.forward([prompt])[0]

    def __call__(self, prompts: str | Sequence[str]) -> Tensor:
        """A prompt → [text_len, text_dim] (no gradient); several → [B, text_len, text_dim], differentiable."""
        return self.encode(prompts) if isinstance(prompts, str) else super().__call__(prompts)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts → [B, text_len, text_dim]; differentiable."""
        words = [[buckets_of(word, self.buckets) for word in words_of(prompt)] for prompt in prompts]
        longest = max(len(each) for each in words)
        ids = torch.zeros(len(words), longest, 1 + TRIGRAMS, dtype=torch.long)
        for row, each in enumerate(words):
            for place, parts in enumerate(each):
                ids[row, place, : len(parts)] = torch.tensor(parts)
        ids = ids.to(self.embedding.device)
        there = (ids > 0).unsqueeze(-1)
        rows = fn.embedding(ids, self.embedding) * there
        tokens = rows[:, :, 0] + rows[:, :, 1:].sum(2) / there[:, :, 1:].sum(2).clamp(min=1)
        x = torch.cat([self.start.expand(len(words), 1, -1), tokens], 1)
        seen = fn.pad(there[:, :, 0, 0], (1, 0), value=True)[:, None, None]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(fn.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(-2))
        x = x + self.mlp(self.norm_mlp(x))
        keys, values = self.read_key(self.norm_read(x)).chunk(2, -1)
        y = fn.scaled_dot_product_attention(self.queries.expand(len(words), -1, -1), keys, values, attn_mask=seen[:, 0])
        y = y + self.queries
        return fn.rms_norm(y + self.head(y), (self.text_dim,))


def load(spec: ModelSpec, path: Path) -> TinyTextEncoder:
    """The encoder in ``text.safetensors``. Raises FileNotFoundError, or ValueError if its sizes are not the spec's."""
    encoder = TinyTextEncoder.from_state(load_file(path))
    if (encoder.text_len, encoder.text_dim) != (spec.text_len, spec.text_dim):
        found = f"{encoder.text_len}×{encoder.text_dim}"
        raise ValueError(f"{path} makes {found}, the model {spec.name} needs {spec.text_len}×{spec.text_dim}")
    return encoder
