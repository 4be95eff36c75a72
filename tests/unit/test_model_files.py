"""Published files at a tiny size: every layout loads, a stage reads its own share only, what is wrong is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.engine.model.checkpoints import open_weights, wan_name
from shared.engine.model.dit_files import check_dit
from shared.engine.model.loading import WeightsError, check_vae, load_dit, load_vae, random_dit_weights
from shared.engine.plan.model_parts import Part
from tests.support.engine import NANO, latents, prompt

BLOCKS = range(NANO.layers)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.set_num_threads(1)
    return random_dit_weights(NANO, BLOCKS, 7)


def _fsdp(name: str) -> str:
    """Where FSDP puts its wrappers: around the model, and around each block."""
    return f"_fsdp_wrapped_module.{name}".replace("blocks.1.", "blocks.1._fsdp_wrapped_module.")


@pytest.mark.parametrize("key", ["generator", "generator_ema", "state_dict", None])
@pytest.mark.parametrize("rename", [str, "model.{}".format, lambda n: f"model.{_fsdp(n)}", _fsdp])
def test_every_layout_of_the_generators_file_loads(key: str | None, rename, weights, tmp_path: Path) -> None:
    named = {rename(name): t for name, t in weights.items()}
    torch.save({key: named, "step": 3} if key else named, tmp_path / "model.pt")
    loaded = load_dit(NANO, tmp_path, range(1, 3), "cpu", torch.float32).state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in loaded.items())


def test_the_generator_is_preferred_to_its_average_as_in_the_public_code(weights, tmp_path: Path) -> None:
    average = {name: torch.zeros_like(t) for name, t in weights.items()}
    torch.save({"generator_ema": average, "generator": weights}, tmp_path / "model.pt")
    assert open_weights(tmp_path, Part.DIT).read("head.head.bias").equal(weights["head.head.bias"])


def test_the_old_torch_format_and_other_dtypes_load(weights, tmp_path: Path) -> None:
    half = {name: t.to(torch.bfloat16) for name, t in weights.items()}
    torch.save(half, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    loaded = load_dit(NANO, tmp_path, BLOCKS, "cpu", torch.float32).state_dict()
    assert all(t.dtype == torch.float32 and torch.equal(t, half[name].float()) for name, t in loaded.items())


def test_names_are_brought_back_from_every_wrapper() -> None:
    assert (
        wan_name("model._fsdp_wrapped_module.blocks.3._checkpoint_wrapped_module.ffn.0.bias") == "blocks.3.ffn.0.bias"
    )
    assert wan_name("module.model._orig_mod.head.modulation") == "head.modulation"
    assert wan_name("blocks.0.attn2.to_out.0.weight") == "blocks.0.cross_attn.o.weight"


def _sharded(weights: dict[str, Tensor], folder: Path, stem: str = "diffusion_pytorch_model") -> Path:
    names = list(weights)
    places: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05d}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_shards_that_are_missing_or_elsewhere_are_named(weights, tmp_path: Path) -> None:
    index = _sharded(weights, tmp_path)
    assert load_dit(NANO, tmp_path, BLOCKS, "cpu", torch.float32)
    first = tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors"
    first.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="names diffusion_pytorch_model-00001-of-00002"):
        load_dit(NANO, tmp_path, BLOCKS, "cpu", torch.float32)
    index.write_text(json.dumps({"weight_map": {"a": "../away"}}))
    with pytest.raises(WeightsError, match="not beside it"):
        load_dit(NANO, tmp_path, BLOCKS, "cpu", torch.float32)
    index.write_text("{}")
    with pytest.raises(WeightsError, match="no index of shards"):
        load_dit(NANO, tmp_path, BLOCKS, "cpu", torch.float32)
    (tmp_path / "away").rename(first)
    index.write_text(json.dumps({"weight_map": {"lost.weight": first.name}}))
    with pytest.raises(WeightsError, match=r"lost\.weight: tensor listed in"):
        load_dit(NANO, tmp_path, BLOCKS, "cpu", torch.float32)


def test_a_stage_reads_its_own_blocks_one_tensor_at_a_time(weights, tmp_path: Path) -> None:
    _sharded(weights, tmp_path)
    read: dict[str, int] = {}

    def note(name: str, size: int) -> None:
        assert name not in read, "read once"
        read[name] = size

    opened = open_weights(tmp_path, Part.DIT)
    watched = type(opened)(opened.source, opened.entries, opened.path, note)
    model = load_dit(NANO, watched, range(1, 2), "cpu", torch.float32)
    assert set(read) == set(model.state_dict())
    assert sum(read.values()) == sum(t.numel() * 4 for t in model.state_dict().values())
    assert not any(name.startswith(("blocks.0.", "blocks.2.", "patch", "head")) for name in read)


_LOAD = """
import sys, torch
from dataclasses import replace
from shared.engine.model.loading import load_dit
from shared.engine.plan.spec import spec_of
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
torch.set_num_threads(1)
spec = replace(spec_of("nano"), dim=256, ffn_dim=2048, layers=12)
load_dit(spec_of("nano"), sys.argv[1] + "/warm.pt", range(3), "cpu", torch.float32)
before = anonymous()
model = load_dit(spec, sys.argv[1] + "/" + sys.argv[2], range(3, 6), "cpu", torch.float32)
print(anonymous() - before, sum(p.numel() * 4 for p in model.parameters()) / 2**20)
"""


@pytest.mark.parametrize("file", ["dit.safetensors", "model.pt"])
def test_the_hosts_memory_grows_by_the_stages_share_only(file: str, tmp_path: Path) -> None:
    from dataclasses import replace

    spec = replace(NANO, dim=256, ffn_dim=2048, layers=12)
    whole = {n: torch.zeros_like(t) for n, t in random_dit_weights(replace(spec, layers=1), range(1)).items()}
    for name in [n for n in whole if n.startswith("blocks.0.")]:
        whole |= {name.replace("blocks.0.", f"blocks.{i}."): torch.zeros_like(whole[name]) for i in range(1, 12)}
    torch.save(random_dit_weights(NANO, BLOCKS), tmp_path / "warm.pt")
    if file == "model.pt":
        torch.save({"generator": whole}, tmp_path / file)
    else:
        save_file(whole, tmp_path / file)
    total = sum(t.numel() * 4 for t in whole.values()) / 2**20
    answer = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path), file], capture_output=True, text=True, timeout=60, check=True
    )
    grown, share = map(float, answer.stdout.split())
    assert share < total / 3
    assert grown < share + 8, f"{grown:.0f} MiB for a share of {share:.0f} of {total:.0f} MiB"


def test_what_is_no_text_to_video_model_is_refused(weights, tmp_path: Path) -> None:
    assert load_dit(NANO, {**weights, "freqs": torch.zeros(4)}, BLOCKS, "cpu", torch.float32), "a buffer does no harm"
    images = (
        {**weights, "img_emb.proj.0.weight": torch.zeros(1)},
        {**weights, "blocks.0.cross_attn.k_img.weight": torch.zeros(1)},
        {**weights, "condition_embedder.image_embedder.norm1.bias": torch.zeros(1)},
        {**weights, "patch_embedding.weight": torch.zeros(64, 36, 1, 2, 2)},
    )
    for state in images:
        with pytest.raises(WeightsError, match="image-to-video model"):
            load_dit(NANO, state, BLOCKS, "cpu", torch.float32)
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "i2v", "dim": NANO.dim}))
    with pytest.raises(WeightsError, match="model_type is i2v"):
        load_dit(NANO, tmp_path, BLOCKS, "cpu", torch.float32)


def test_another_models_weights_are_refused_with_both_values(weights, tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(WeightsError, match="has dim 64, ffn_dim 128, but nano has dim 128, ffn_dim 256"):
        load_dit(replace(NANO, dim=128, ffn_dim=256), weights, BLOCKS, "cpu", torch.float32)
    with pytest.raises(WeightsError, match="layers 3, but nano has layers 2"):
        load_dit(replace(NANO, layers=2), weights, range(2), "cpu", torch.float32)
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    good = {"dim": NANO.dim, "ffn_dim": NANO.ffn_dim, "num_layers": 3, "num_heads": NANO.heads, "model_type": "t2v"}
    (tmp_path / "config.json").write_text(json.dumps(good))
    assert check_dit(NANO, tmp_path) == []
    (tmp_path / "config.json").write_text(json.dumps({**good, "num_layers": 40}))
    with pytest.raises(WeightsError, match=r"config\.json: num_layers is 40, but nano has 3"):
        load_dit(NANO, tmp_path, BLOCKS, "cpu", torch.float32)
    assert "num_layers is 40" in check_dit(NANO, tmp_path)[0]
    for text in ("[1]", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=r"config\.json"):
            load_dit(NANO, tmp_path, BLOCKS, "cpu", torch.float32)


def test_every_complaint_names_the_tensor_and_the_file(weights, tmp_path: Path) -> None:
    without = {n: t for n, t in weights.items() if n != "blocks.1.ffn.2.bias"}
    file = tmp_path / "dit.safetensors"
    save_file({**without, "colour": torch.zeros(1), "head.head.bias": torch.zeros(3)}, file)
    missing, extra, shape = check_dit(NANO, tmp_path)
    assert missing == f"blocks.1.ffn.2.bias: tensor missing in {file}"
    assert extra == f"colour: tensor not part of this model, in {file}"
    assert shape == f"head.head.bias is [3], the model needs [64] ({file})"
    with pytest.raises(WeightsError, match=r"blocks\.1\.ffn\.2\.bias: tensor missing in .*dit\.safetensors"):
        load_dit(NANO, tmp_path, BLOCKS, "cpu", torch.float32)
    assert (
        "no dit weights" in check_dit(NANO, tmp_path / "nowhere")[0]
        or "no weights" in check_dit(NANO, tmp_path / "x")[0]
    )


def test_loaded_models_compute_alike_whatever_the_layout(weights, tmp_path: Path) -> None:
    _sharded(weights, tmp_path)
    torch.save({"generator": {f"model.{n}": t for n, t in weights.items()}}, tmp_path / "model.pt")
    x, times, text = latents(1, 2)[None], torch.tensor([[500.0]]), prompt(2)[None]
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    with torch.no_grad():
        flows = [
            load_dit(NANO, source, BLOCKS, "cpu", torch.float32)(x, times, text)
            for source in (weights, tmp_path / "model.pt", index)
        ]
    assert flows[0].isfinite().all()
    assert flows[0].abs().max() > 0.01
    assert all(torch.equal(flow, flows[0]) for flow in flows[1:])


def test_what_pickle_could_run_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return print, ("never printed",)

    torch.save({"generator": Evil()}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match="no file of weights"):
        load_dit(NANO, tmp_path, BLOCKS, "cpu", torch.float32)
    assert "no file of weights" in check_vae(NANO, tmp_path / "model.pt")[0]
    with pytest.raises(WeightsError, match="no file of weights"):
        load_vae(NANO, tmp_path / "model.pt")
