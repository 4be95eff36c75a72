"""The text encoder of the published models: both namings, an independent reference, cleaning, padding, refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as fn

from shared.engine.model.loading import load_text_encoder
from shared.engine.model.umt5 import Umt5TextEncoder, WeightsError, check_tokenizer, check_umt5, clean, load_umt5
from tests.support import wan_files
from tests.support.wan_files import TEXT_DIM, WORDS, original_t5, tiny_wan

SPEC = tiny_wan()
PROMPT = "a neon cat in the rain"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("text")
    torch.save(original_t5(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    wan_files.write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Umt5TextEncoder:
    return load_umt5(SPEC, folder, "cpu", torch.float32)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def _bucket(distance: int) -> int:
    """Which of 32 buckets a key ``distance`` places after its query falls into: 16 a side, exact below 8, then by log."""
    side, far = (16 if distance > 0 else 0), abs(distance)
    if far < 8:
        return side + far
    return side + min(15, 8 + int(math.log(far / 8) / math.log(128 / 8) * 8))


def reference(state: dict[str, Tensor], ids: list[int], heads: int = 4, layers: int = 2) -> Tensor:
    """UMT5's encoder written out, in float64: no scaling of the scores, relative positions of each layer's own."""
    state = {name: t.double() for name, t in state.items()}
    x = state["token_embedding.weight"][ids]
    buckets = torch.tensor([[_bucket(k - q) for k in range(len(ids))] for q in range(len(ids))])
    for i in range(layers):
        w = {n.removeprefix(f"blocks.{i}."): t for n, t in state.items() if n.startswith(f"blocks.{i}.")}
        y = _rms(x, w["norm1.weight"])
        q, k, v = ((y @ w[f"attn.{n}.weight"].T).unflatten(-1, (heads, -1)).transpose(0, 1) for n in "qkv")
        scores = q @ k.transpose(1, 2) + w["pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w["attn.o.weight"].T
        y = _rms(x, w["norm2.weight"])
        gate = fn.gelu(y @ w["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ w["ffn.fc1.weight"].T)) @ w["ffn.fc2.weight"].T
    return _rms(x, state["norm.weight"])


@pytest.mark.parametrize("words", [5, 22])
def test_the_original_names_compute_what_a_plain_reference_does(encoder: Umt5TextEncoder, words: int) -> None:
    prompt = [WORDS[(3 * i) % len(WORDS)] for i in range(words)]
    ids = [WORDS.index(word) + 3 for word in prompt] + [1]
    made = encoder.encode(" ".join(prompt))
    expected = reference(original_t5(), ids)
    assert made.shape == (SPEC.text_len, TEXT_DIM)
    assert made.dtype == torch.float32
    assert expected.std() > 0.3
    assert (made[: len(ids)] - expected).abs().max() < 2e-5
    assert torch.equal(made[len(ids) :], torch.zeros(SPEC.text_len - len(ids), TEXT_DIM)), "padding is exactly zero"


def test_padding_and_a_mask_would_change_nothing(encoder: Umt5TextEncoder) -> None:
    ids = torch.zeros(1, SPEC.text_len, dtype=torch.long)
    tokens = encoder._tokenizer(PROMPT).input_ids
    ids[0, : len(tokens)] = torch.tensor(tokens)
    with torch.no_grad():
        masked = encoder._model(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state[0]
    assert torch.allclose(encoder.encode(PROMPT)[: len(tokens)], masked[: len(tokens)], atol=2e-5)


@pytest.mark.parametrize("shards", [False, True])
def test_the_names_of_transformers_give_the_same(encoder: Umt5TextEncoder, shards: bool, tmp_path: Path) -> None:
    state = {n: t.clone() for n, t in encoder._model.state_dict().items()}
    assert "encoder.embed_tokens.weight" in state
    state.pop("shared.weight" if shards else "encoder.embed_tokens.weight")
    inside = tmp_path / "text_encoder"
    inside.mkdir()
    if shards:
        places: dict[str, str] = {}
        names = sorted(state)
        for number, part in enumerate((names[::2], names[1::2]), 1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({n: state[n] for n in part}, inside / file)
            places |= dict.fromkeys(part, file)
        (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        save_file(state, inside / "model.safetensors")
    wan_files.write_tokenizer(tmp_path / "tokenizer")
    again = load_umt5(SPEC, tmp_path, "cpu", torch.float32)
    assert torch.equal(again.encode(PROMPT), encoder.encode(PROMPT))


def test_the_embedding_is_held_once_and_nothing_is_left_without_data(encoder: Umt5TextEncoder) -> None:
    model = encoder._model
    assert model.encoder.embed_tokens.weight is model.shared.weight
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.device.type == "cpu" for t in tensors)
    assert sum(t.numel() for t in tensors) == sum(t.numel() for t in original_t5().values())


def test_bfloat16_is_close_and_the_answer_float32(folder: Path, encoder: Umt5TextEncoder) -> None:
    half = load_umt5(SPEC, folder, "cpu", torch.bfloat16).encode(PROMPT)
    full = encoder.encode(PROMPT)
    assert half.dtype == torch.float32
    assert (half - full).norm() / full.norm() < 0.05


def test_prompts_are_cleaned_as_wan_does_it(encoder: Umt5TextEncoder) -> None:
    assert clean("  a\t cat \n\n &amp;amp; dog ") == "a cat & dog"
    assert clean("schÃ¶n") == "schön", "text that was decoded wrongly is mended"
    assert torch.equal(encoder.encode("a   cat &amp;amp;\tdog"), encoder.encode("a cat & dog"))
    assert not torch.equal(encoder.encode("a cat"), encoder.encode("a dog"))
    empty = encoder.encode(" \n ")
    assert empty[0].abs().sum() > 0, "the end of the text is a token"
    assert not empty[1:].any()


def test_a_long_prompt_is_cut(encoder: Umt5TextEncoder) -> None:
    made = encoder.encode("cat " * 100)
    assert made.isfinite().all()
    assert made[-1].any()


def test_what_is_wrong_is_named(folder: Path, tmp_path: Path) -> None:
    assert check_umt5(SPEC, folder) == check_tokenizer(folder) == []
    state = original_t5()
    del state["blocks.1.ffn.fc2.weight"]
    torch.save(state, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    weights, tokenizer = *check_umt5(SPEC, tmp_path), *check_tokenizer(tmp_path)
    assert "encoder.block.1.layer.1.DenseReluDense.wo.weight: tensor missing" in weights
    assert "no tokenizer weights in" in tokenizer
    assert "google/umt5-xxl" in tokenizer
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(WeightsError, match="no tokenizer that can be read"):
        load_umt5(SPEC, tmp_path, "cpu", torch.float32)
    torch.save({"a": torch.zeros(1)}, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    assert "is no UMT5 encoder" in check_umt5(SPEC, tmp_path)[0]
    torch.save(original_t5(dim=64), folder / "wide.pth")
    with pytest.raises(WeightsError, match="makes vectors of 64, tiny-wan needs 32"):
        load_umt5(SPEC, folder / "wide.pth", "cpu", torch.float32)


def test_the_embedded_model_does_not_pay_for_it() -> None:
    code = (
        "import sys; from shared.engine.model.loading import *; from shared.engine.plan.registry import *;"
        "load_text_encoder(model_spec('rheo-tiny'), model_folder('rheo-tiny')).encode('ink');"
        "load_vae(model_spec('rheo-tiny'), model_folder('rheo-tiny'));"
        "assert not {'transformers', 'ftfy', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert callable(load_text_encoder)
