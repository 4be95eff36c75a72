"""A stage reads its own blocks from the file; a wrong file is named, not guessed at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shared.engine.model.loading import WeightsError, load_dit, load_vae, random_dit_weights, random_vae_weights
from shared.engine.plan.spec import ModelSpec, SpecError, UnknownModelError, spec_of
from shared.engine.stage import Stage
from tests.support.engine import NANO, item, latents, open_on, run, stages_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    save_file(random_dit_weights(NANO, range(NANO.layers)), folder / "dit.safetensors")
    save_file(random_vae_weights(NANO), folder / "vae.safetensors")
    NANO.to_json(folder / "spec.json")
    return folder


def test_stages_from_a_file_compute_what_the_weights_say(folder: Path) -> None:
    spec = ModelSpec.from_json(folder / "spec.json")
    assert spec == NANO
    loaded = [Stage.load(spec, folder, blocks) for blocks in (range(2), range(2, 3))]
    open_on(loaded, "a")
    built = stages_of()
    open_on(built, "a")
    x = latents(0, 2)[None]
    assert torch.allclose(run(loaded, [item("a", 0)], x), run(built, [item("a", 0)], x), atol=1e-5)


def test_a_stage_holds_its_own_blocks_only(folder: Path) -> None:
    names = [
        set(load_dit(NANO, folder, blocks, "cpu", torch.float32).state_dict()) for blocks in (range(1), range(1, 3))
    ]
    assert not {n for n in names[0] & names[1] if n.startswith(("blocks", "head", "patch"))}
    assert "patch_embedding.weight" in names[0]
    assert "head.head.weight" in names[1]
    assert "blocks.2.ffn.2.weight" in names[1]


def test_names_with_the_public_prefix_are_understood() -> None:
    prefixed = {f"model.{name}": t for name, t in random_dit_weights(NANO, range(3)).items()}
    assert Stage.load(NANO, prefixed).blocks == range(3)


def test_wrong_tensors_are_named() -> None:
    weights = random_dit_weights(NANO, range(3))
    without = {n: t for n, t in weights.items() if n != "blocks.1.ffn.0.bias"}
    with pytest.raises(WeightsError, match=r"blocks\.1\.ffn\.0\.bias: tensor missing"):
        Stage.load(NANO, without)
    assert Stage.load(NANO, without, range(1)).is_first, "another stage's tensor is not asked for"
    with pytest.raises(WeightsError, match=r"blocks\.7\.extra: tensor not part"):
        Stage.load(NANO, {**weights, "blocks.7.extra": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"head\.head\.weight is \[1, 1\], the model needs \[64, 64\]"):
        Stage.load(NANO, {**weights, "head.head.weight": torch.zeros(1, 1)})
    with pytest.raises(WeightsError, match=r"decoder\.22\.bias: tensor missing"):
        load_vae(NANO, {n: t for n, t in random_vae_weights(NANO).items() if n != "decoder.22.bias"})


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dit\.safetensors"):
        Stage.load(NANO, tmp_path)
    (tmp_path / "dit.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(WeightsError, match="no safetensors file"):
        Stage.load(NANO, tmp_path)


def test_a_spec_survives_its_file_and_refuses_what_cannot_run(tmp_path: Path) -> None:
    for name in ("rheo-tiny", "wan2.1-1.3b", "wan2.1-14b"):
        spec = spec_of(name)
        spec.to_json(tmp_path / "spec.json")
        assert ModelSpec.from_json(tmp_path / "spec.json") == spec
    assert spec_of("wan2.1-1.3b").head_dim == spec_of("wan2.1-14b").head_dim == 128
    assert spec_of("wan2.1-1.3b").tokens(832, 480) == 1560
    with pytest.raises(UnknownModelError, match="rheo-tiny"):
        spec_of("nonesuch")
    with pytest.raises(SpecError, match="sinks 6"):
        replace(NANO, sinks=6)
    with pytest.raises(SpecError, match="multiples of 16"):
        NANO.latent_size(100, 64)
    with pytest.raises(SpecError, match="unknown fields in the model's spec: colour"):
        ModelSpec.from_dict({**NANO.to_dict(), "colour": 1})
    (tmp_path / "spec.json").write_text("[]")
    with pytest.raises(SpecError, match="no JSON object"):
        ModelSpec.from_json(tmp_path / "spec.json")
