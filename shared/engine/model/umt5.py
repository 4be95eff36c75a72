"""The text encoder of Wan 2.1: UMT5-XXL's encoder by ``transformers``, from the original Wan file or a ``text_encoder`` folder.

What the DiT was trained on is what is made here: prompts are cleaned as Wan does it, cut to ``text_len`` tokens, and the
rows beyond a prompt's tokens are exactly zero. ``transformers`` is imported here and nowhere else.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from shared.engine.model.checkpoints import Entry, Source, Weights, WeightsError, open_weights
from shared.engine.model.filling import complaints, fill
from shared.engine.plan.model_parts import ModelParts, Part, PartMissingError, parts_in
from shared.engine.plan.spec import ModelSpec

_ATTENTION, _MLP = "layer.0.SelfAttention", "layer.1.DenseReluDense"
_ORIGINAL = (
    (re.compile(r"^token_embedding\."), "shared."),
    (re.compile(r"^norm\."), "encoder.final_layer_norm."),
    (re.compile(r"^blocks\.(\d+)\.norm1\."), r"encoder.block.\1.layer.0.layer_norm."),
    (re.compile(r"^blocks\.(\d+)\.norm2\."), r"encoder.block.\1.layer.1.layer_norm."),
    (re.compile(r"^blocks\.(\d+)\.attn\.([qkvo])\."), rf"encoder.block.\1.{_ATTENTION}.\2."),
    (
        re.compile(r"^blocks\.(\d+)\.pos_embedding\.embedding\."),
        rf"encoder.block.\1.{_ATTENTION}.relative_attention_bias.",
    ),
    (re.compile(r"^blocks\.(\d+)\.ffn\.gate\.0\."), rf"encoder.block.\1.{_MLP}.wi_0."),
    (re.compile(r"^blocks\.(\d+)\.ffn\.fc1\."), rf"encoder.block.\1.{_MLP}.wi_1."),
    (re.compile(r"^blocks\.(\d+)\.ffn\.fc2\."), rf"encoder.block.\1.{_MLP}.wo."),
)
_UNUSED = ("decoder.", "lm_head.")
"""Parts of the whole UMT5 that an encoder has no use for."""


def clean(prompt: str) -> str:
    """A prompt as Wan cleans it: mended text, HTML entities resolved (twice: they come doubly escaped), single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class Umt5TextEncoder:
    """``encode(prompt)`` → float32 [text_len, text_dim] on the encoder's device. Holds weights only."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: Any, text_len: int) -> None:
        self._model: Any = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._text_len = text_len
        self.device = model.device

    @torch.inference_mode()
    def encode(self, prompt: str) -> Tensor:
        """The same text always gives the same numbers. A prompt longer than text_len tokens is cut.

        Only the prompt's own tokens are computed: those that a mask would hide have no part in the result.
        """
        ids = self._tokenizer(clean(prompt), truncation=True, max_length=self._text_len, return_tensors="pt").input_ids
        ids = ids.to(self.device)
        hidden = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        out = torch.zeros(self._text_len, hidden.shape[-1], device=self.device)
        out[: len(hidden)] = hidden.float()
        return out


def load_umt5(spec: ModelSpec, source: Source, device: torch.device | str, dtype: torch.dtype) -> Umt5TextEncoder:
    """The encoder and its tokenizer. Raises WeightsError, FileNotFoundError (PartMissingError where a part is nowhere)."""
    tokenizer = _open_tokenizer(_tokenizer_folder(source))
    model, weights = umt5_on_meta(spec, source)
    fill(model, weights, device=device, dtype=dtype)
    model.encoder.set_input_embeddings(model.shared)
    if len(tokenizer) > model.config.vocab_size:
        raise WeightsError(
            f"the tokenizer knows {len(tokenizer)} tokens, the text encoder in {weights.source} {model.config.vocab_size}"
        )
    return Umt5TextEncoder(model, tokenizer, spec.text_len)


def umt5_on_meta(spec: ModelSpec, source: Source) -> tuple[UMT5EncoderModel, Weights]:
    """The encoder these tensors are of, without data and without its second name for the embedding. Raises WeightsError."""
    weights = open_weights(source, Part.TEXT).without(_UNUSED).renamed(_name)
    entries = dict(weights.entries)
    embedding = entries.pop("encoder.embed_tokens.weight", None)
    if embedding is not None:
        entries.setdefault("shared.weight", embedding)
    weights = Weights(weights.source, entries, weights.path, weights.on_read)
    try:
        sizes = _sizes(entries)
    except (KeyError, IndexError) as error:
        raise WeightsError(f"{error.args[0]}: tensor missing; {weights.source} is no UMT5 encoder") from None
    if sizes["d_model"] != spec.text_dim:
        raise WeightsError(
            f"the text encoder in {weights.source} makes vectors of {sizes['d_model']}, {spec.name} needs {spec.text_dim}"
        )
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu"))
    del model.encoder.embed_tokens
    return model, weights


def check_umt5(spec: ModelSpec, source: Source) -> list[str]:
    """What is wrong with the text encoder's weights, one line each; names and shapes only."""
    try:
        return complaints(*umt5_on_meta(spec, source))
    except (WeightsError, FileNotFoundError) as error:
        return [str(error)]


def check_tokenizer(source: Source) -> list[str]:
    """What is wrong with the tokenizer, one line or none."""
    try:
        _open_tokenizer(_tokenizer_folder(source))
    except (WeightsError, FileNotFoundError) as error:
        return [str(error)]
    return []


def _name(name: str) -> str:
    name = name.removeprefix("module.").removeprefix("model.")
    for pattern, new in _ORIGINAL:
        name = pattern.sub(new, name)
    return name


def _sizes(entries: dict[str, Entry]) -> dict[str, Any]:
    """The network's configuration, from its tensors' shapes."""
    first = "encoder.block.0"
    vocabulary, dim = entries["shared.weight"].shape
    buckets, heads = entries[f"{first}.{_ATTENTION}.relative_attention_bias.weight"].shape
    blocks = [int(m[1]) for name in entries if (m := re.match(r"encoder\.block\.(\d+)\.", name))]
    return {
        "vocab_size": vocabulary,
        "d_model": dim,
        "d_kv": entries[f"{first}.{_ATTENTION}.q.weight"].shape[0] // heads,
        "d_ff": entries[f"{first}.{_MLP}.wi_0.weight"].shape[0],
        "num_layers": max(blocks) + 1,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _tokenizer_folder(source: Source) -> Path:
    if isinstance(source, ModelParts):
        return source.need(Part.TOKENIZER)
    if isinstance(source, Path | str):
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        return parts_in(folder, folder.name).need(Part.TOKENIZER)
    raise PartMissingError("a text encoder given as tensors has no tokenizer beside it: name its folder")


def _open_tokenizer(folder: Path) -> Any:
    """From local files only, and never with code that lies beside them. Raises WeightsError."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise WeightsError(f"{folder} holds no tokenizer that can be read: {reason}") from None
