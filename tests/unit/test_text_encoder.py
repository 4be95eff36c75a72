"""The small text encoder: any text is a legal prompt, and the same text always means the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from services.worker.roles.text import TextRole
from shared.engine.model.loading import load_text_encoder
from shared.engine.model.text import MAX_CHARS, WORDS, TinyTextEncoder, buckets_of, load, words_of
from shared.engine.plan.registry import model_folder, model_spec
from shared.engine.plan.spec import spec_of


@pytest.fixture(scope="module")
def encoder() -> TinyTextEncoder:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return TinyTextEncoder().eval()


def test_words_are_lower_case_without_accents_and_plain_punctuation():
    assert words_of("A Pencil-Drawing, très joli!") == ["a", "pencil", "drawing", "tres", "joli"]


def test_an_emoji_is_a_word_of_its_own():
    assert words_of("neon🔥cat") == ["neon", "🔥", "cat"]


def test_only_the_first_words_count(encoder: TinyTextEncoder):
    start = " ".join(["word"] * WORDS)
    assert torch.equal(encoder.encode(start), encoder.encode(start + " blueprint neon"))


def test_a_prompt_of_four_thousand_characters_is_read(encoder: TinyTextEncoder):
    assert encoder.encode("x" * MAX_CHARS).shape == (16, 128)
    assert encoder.encode("sketch " * 600).isfinite().all()


@pytest.mark.parametrize("prompt", ["", "   ", "?!", "🎨" * 50, "\x00\x01", "日本の絵", "\ud800"])
def test_odd_prompts_have_finite_vectors(encoder: TinyTextEncoder, prompt: str):
    vectors = encoder.encode(prompt)
    assert vectors.shape == (16, 128)
    assert vectors.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_a_legal_prompt(encoder: TinyTextEncoder, prompt: str):
    vectors = encoder.encode(prompt)
    assert vectors.isfinite().all()
    assert torch.allclose(vectors.square().mean(-1), torch.ones(16), atol=1e-3)


def test_a_prompt_means_the_same_alone_and_among_longer_ones(encoder: TinyTextEncoder):
    alone = encoder.encode("a blueprint")
    among = encoder(["a blueprint", "a much longer prompt about a cat that walks in the grass at noon"])[0]
    assert torch.allclose(alone, among, atol=1e-5)


def test_calling_with_one_prompt_is_encoding_it(encoder: TinyTextEncoder):
    assert torch.equal(encoder("neon"), encoder.encode("neon"))


def test_a_plural_shares_buckets_with_its_word():
    shared = set(buckets_of("blueprint", 8192)) & set(buckets_of("blueprints", 8192))
    assert len(shared) >= 7
    assert 0 not in shared


def test_weights_survive_the_file_and_a_wrong_size_is_named(encoder: TinyTextEncoder, tmp_path):
    path = tmp_path / "text.safetensors"
    save_file(encoder.state_dict(), path)
    again = load(spec_of("rheo-tiny"), path)
    assert torch.equal(again.encode("a sketch"), encoder.encode("a sketch"))
    with pytest.raises(ValueError, match="16×128"):
        load(spec_of("nano"), path)
    with pytest.raises(FileNotFoundError):
        load(spec_of("rheo-tiny"), tmp_path / "none.safetensors")


def test_a_mix_of_prompts_lies_between_them() -> None:
    text = TextRole(load_text_encoder(model_spec("rheo-tiny"), model_folder("rheo-tiny")))
    pencil, neon = text.run("a pencil drawing"), text.run("neon lights")
    mixed = text.mix([("a pencil drawing", 3.0), ("neon lights", 1.0)])
    assert torch.allclose(mixed, 0.75 * pencil + 0.25 * neon)
    assert torch.equal(text.mix([("a pencil drawing", 2.0)]), pencil)
    assert (mixed - pencil).norm() < (mixed - neon).norm()
