"""A worker's runtime with a published model's files (tiny): load, warm-up, encode, stage, decode, text; parts anywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from services.worker.core import TEXT_HEADROOM, Role, choose_text_device
from services.worker.runtime import Runtime
from services.worker.settings import Settings
from shared.engine.plan.model_parts import Part, PartMissingError, find_parts, needed_parts
from shared.engine.plan.registry import known_models, model_spec
from shared.engine.plan.spec import SpecError, UnknownModelError, spec_of
from tests.support import wan_files
from tests.support.engine import item
from tests.support.wan_files import tiny_wan

SPEC = tiny_wan()
HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    wan_files.write_model(SPEC, root / "tiny-wan")
    return root


def runtime(models: Path, **changes: Any) -> Runtime:
    made = Runtime(Settings(model="tiny-wan", models_dir=models, device="cpu", **changes))
    made.load()
    return made


@pytest.mark.parametrize("vae", ["auto", "taehv", "wan+taehv"])
def test_a_worker_serves_the_published_files(models: Path, vae: str) -> None:
    worker = runtime(models, vae=vae)
    worker.warm_up()
    assert worker.encode is not None
    assert worker.decode is not None
    assert worker.stage is not None
    assert worker.text is not None
    worker.open("s", HEIGHT, WIDTH)
    embedding = worker.text.run("a neon cat")
    assert embedding.shape == (SPEC.text_len, SPEC.text_dim)
    assert embedding[:4].abs().sum(1).min() > 0
    assert not embedding[4:].any()
    worker.stage.set_prompt("s", 1, embedding)
    generator = np.random.default_rng(0)
    for block, (frames, count) in enumerate(((5, 2), (4, 1))):
        latents = worker.encode.run("s", generator.integers(0, 256, (frames, HEIGHT, WIDTH, 3), np.uint8)).latents
        assert latents.shape == (count, 16, HEIGHT // 8, WIDTH // 8)
        done = worker.stage.run([replace(item("s", block, steps=(700,)), noise_scale=0.8)], [latents]).latents[0]
        pictures = worker.decode.run("s", done)
        assert pictures.shape == (frames, HEIGHT, WIDTH, 3)
        assert pictures.dtype == np.uint8
        assert pictures.std() > 1
    worker.close("s")


def test_two_stages_compute_what_one_does(models: Path) -> None:
    whole = runtime(models, roles=(Role.STAGE,))
    parts = [runtime(models, roles=(Role.STAGE,), stage=k, stages=2) for k in range(2)]
    results = []
    for chain in ([whole], parts):
        x: Any = [torch.randn(2, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(1))]
        for worker in chain:
            assert worker.stage is not None
            worker.open("s", HEIGHT, WIDTH)
            worker.stage.set_prompt("s", 1, torch.ones(SPEC.text_len, SPEC.text_dim))
            done = worker.stage.run([item("s", 0, steps=(700,))], x)
            x = done.activations
        results.append(done.latents[0])
    assert torch.allclose(results[0], results[1], atol=1e-5)


def test_parts_may_lie_where_streamdiffusionv2_puts_them(tmp_path: Path) -> None:
    small = spec_of("wan2.1-1.3b")
    wan_files.write_generator(SPEC, tmp_path / "ckpts" / "wan_causal_dmd_v2v")
    wan_files.write_wan_base(tmp_path / "wan_models" / "Wan2.1-T2V-1.3B")
    wan_files.write_taehv(SPEC, tmp_path / "ckpts" / "taew2_1.pth")
    # The base model's own DiT is not the streaming generator: it is never taken for it.
    (tmp_path / "wan_models" / "Wan2.1-T2V-1.3B" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    for name in ("wan2.1-1.3b", "wan2.1-1.3b-fast"):
        found = find_parts(name, tmp_path)
        assert found.need(Part.DIT) == tmp_path / "ckpts" / "wan_causal_dmd_v2v" / "model.pt"
        assert found.need(Part.VAE).name == "Wan2.1_VAE.pth"
        assert found.need(Part.TAEHV).name == "taew2_1.pth"
        assert found.need(Part.TOKENIZER).name == "umt5-xxl"
        assert [p for p in needed_parts(model_spec(name, tmp_path)) if p not in found.found] == []
    large = find_parts("wan2.1-14b", tmp_path)
    with pytest.raises(PartMissingError, match=r"no dit weights .*model\.pt.*rheocast models fetch wan2\.1-14b"):
        large.need(Part.DIT)
    assert needed_parts(small) == (Part.DIT, Part.VAE, Part.TEXT, Part.TOKENIZER)


def test_settings_and_model_json_point_at_parts(models: Path, tmp_path: Path) -> None:
    generator, base = tmp_path / "generator", tmp_path / "base"
    wan_files.write_generator(SPEC, generator, seed=5)
    wan_files.write_wan_base(base)
    named = runtime(
        models,
        dit=generator / "model.pt",
        vae_weights=base,
        text_weights=base,
        roles=(Role.STAGE, Role.TEXT, Role.ENCODE),
    )
    plain = runtime(models, roles=(Role.STAGE, Role.TEXT))
    assert named.stage is not None
    assert plain.stage is not None
    weight = "head.head.weight"
    assert not torch.equal(named.stage.stage.model.state_dict()[weight], plain.stage.stage.model.state_dict()[weight])
    with pytest.raises(PartMissingError, match=r"said to be at .*nowhere"):
        runtime(models, dit=tmp_path / "nowhere")

    own = tmp_path / "models" / "mine"
    own.mkdir(parents=True)
    places = {"dit": "../../generator", "vae": str(base), "text": "../../base"}
    (own / "model.json").write_text(json.dumps({"preset": "wan2.1-1.3b", **places}))
    found = find_parts("mine", tmp_path / "models")
    assert found.need(Part.DIT).samefile(generator / "model.pt")
    assert found.need(Part.VAE).samefile(base / "Wan2.1_VAE.pth")
    assert found.need(Part.TOKENIZER).samefile(base / "google" / "umt5-xxl")
    assert model_spec("mine", tmp_path / "models") == replace(spec_of("wan2.1-1.3b"), name="mine")
    assert "mine" in known_models(tmp_path / "models")
    (own / "model.json").write_text('{"preset": "wan-9"}')
    with pytest.raises(SpecError, match="no preset 'wan-9'"):
        model_spec("mine", tmp_path / "models")
    (own / "model.json").write_text("{")
    with pytest.raises(SpecError, match="is not JSON"):
        find_parts("mine", tmp_path / "models")
    with pytest.raises(UnknownModelError, match="not a model's name"):
        model_spec("../mine", tmp_path / "models")


def test_loras_are_merged_where_a_stage_loads(models: Path, tmp_path: Path) -> None:
    name, file = "diffusion_model.blocks.1.ffn.0", tmp_path / "style.safetensors"
    up, down = torch.randn(SPEC.ffn_dim, 4), torch.randn(4, SPEC.dim)
    save_file({f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}, file)
    weights = []
    for loras in ((), ((str(file), 0.5),)):
        worker = runtime(models, roles=(Role.STAGE,), loras=loras)
        assert worker.stage is not None
        weights.append(worker.stage.stage.model.state_dict())
    changed = [key for key, tensor in weights[1].items() if not torch.equal(tensor, weights[0][key])]
    assert changed == ["blocks.1.ffn.0.weight"]
    assert torch.allclose(weights[1][changed[0]], weights[0][changed[0]] + 0.5 * up @ down, atol=1e-5)


def test_shipped_models_are_found_beside_ones_own(models: Path) -> None:
    assert model_spec("rheo-tiny", models).name == "rheo-tiny"
    assert find_parts("rheo-tiny", models).need(Part.DIT).is_file()
    assert {"rheo-tiny", "tiny-wan", "wan2.1-1.3b", "wan2.1-14b-fast"} <= set(known_models(models))


@pytest.mark.parametrize(
    ("setting", "device", "free", "needed", "chosen"),
    [
        ("auto", "cuda:1", 40 << 30, 11 << 30, "cuda:1"),
        ("auto", "cuda:1", (11 << 30) + TEXT_HEADROOM, 11 << 30, "cuda:1"),
        ("auto", "cuda:1", (11 << 30) + TEXT_HEADROOM - 1, 11 << 30, "cpu"),
        ("auto", "cpu", 0, 11 << 30, "cpu"),
        ("cpu", "cuda", 80 << 30, 1, "cpu"),
        ("cuda:0", "cuda:1", 0, 11 << 30, "cuda:0"),
    ],
)
def test_the_text_encoder_leaves_the_gpu_when_memory_is_short(
    setting: str, device: str, free: int, needed: int, chosen: str
) -> None:
    assert choose_text_device(setting, device, free, needed) == chosen


def test_an_unknown_autoencoder_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'best' is no autoencoder: auto, wan, taehv, wan\+taehv"):
        Settings(vae="best")


@pytest.mark.gpu
def test_a_worker_serves_the_published_files_on_the_gpu(models: Path) -> None:
    worker = Runtime(Settings(model="tiny-wan", models_dir=models, device="cuda"))
    worker.load()
    worker.warm_up()
    assert worker.stage is not None
    assert worker.text is not None
    weights = worker.stage.stage.model.state_dict()
    assert {(t.device.type, t.dtype) for t in weights.values()} == {("cuda", torch.bfloat16)}
    free = torch.cuda.mem_get_info()[0]
    assert worker.text.beside == (free < TEXT_HEADROOM)
    assert worker.text.run("a neon cat").device.type == "cpu"
