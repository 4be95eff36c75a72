"""LoRAs in every published layout merge into the weights; scales change without drift; what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from services.worker.settings import Settings
from shared.engine.model.loading import random_dit_weights
from shared.engine.model.lora import Lora, LoraError, LoraSet
from shared.engine.model.packed import repack
from shared.engine.stage import Stage
from tests.support.engine import NANO, item, latents, open_on, run

RANK = 4
MODULES = ("blocks.0.self_attn.q", "blocks.1.cross_attn.o", "blocks.2.ffn.0", "blocks.2.ffn.2")
DIFFUSERS = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.cross_attn.o": "blocks.1.attn2.to_out.0",
    "blocks.2.ffn.0": "blocks.2.ffn.net.0.proj",
    "blocks.2.ffn.2": "blocks.2.ffn.net.2",
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weights_of(stage: Stage) -> dict[str, Tensor]:
    """Copies of the stage's weights; the joined projections are views of their parts."""
    return {n: t.clone() for n, t in stage.model.state_dict().items() if ".qkv." not in n}


def factors(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """(up, down) per module."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: t.shape for name, t in Stage.random(NANO).model.state_dict().items()}
    made = {}
    for module in MODULES:
        rows, columns = shapes[f"{module}.weight"]
        made[module] = torch.randn(rows, RANK, generator=generator), torch.randn(RANK, columns, generator=generator)
    return made


def as_layout(layout: str, alpha: float | None = None) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for module, (up, down) in factors().items():
        name, below, above = {
            "kohya": (f"lora_unet_{module.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
            "kohya-diffusers": (
                f"lora_transformer_{DIFFUSERS[module].replace('.', '_')}",
                "lora_down.weight",
                "lora_up.weight",
            ),
            "peft": (f"diffusion_model.{module}", "lora_A.weight", "lora_B.weight"),
            "peft-named": (f"base_model.model.{module}", "lora_A.default.weight", "lora_B.default.weight"),
            "diffusers": (f"transformer.{DIFFUSERS[module]}", "lora_A.weight", "lora_B.weight"),
            "bare": (module, "lora_down.weight", "lora_up.weight"),
        }[layout]
        state |= {f"{name}.{below}": down, f"{name}.{above}": up}
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


@pytest.mark.parametrize("layout", ["kohya", "kohya-diffusers", "peft", "peft-named", "diffusers", "bare"])
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_every_layout_merges_the_product_of_its_factors(layout: str, alpha: float | None, tmp_path: Path) -> None:
    save_file({n: t.contiguous() for n, t in as_layout(layout, alpha).items()}, tmp_path / "style.safetensors")
    stage = Stage.random(NANO)
    before = weights_of(stage)
    LoraSet.open(NANO, [tmp_path / "style.safetensors"]).apply(stage.model, [0.5])
    after = weights_of(stage)
    expected = {m: up @ down * 0.5 * ((alpha or RANK) / RANK) for m, (up, down) in factors().items()}
    for name, tensor in after.items():
        change = expected.get(name.removesuffix(".weight"))
        if change is None:
            assert torch.equal(tensor, before[name]), name
        else:
            assert torch.allclose(tensor, before[name] + change, atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_change_back_and_forth_to_the_very_same_bits(dtype: torch.dtype) -> None:
    stage = Stage.random(NANO, dtype=dtype)
    base, places = weights_of(stage), {n: t.data_ptr() for n, t in stage.model.state_dict().items()}
    loras = LoraSet([Lora.open(NANO, as_layout("peft")), Lora.open(NANO, as_layout("kohya", 1.0))])
    loras.apply(stage.model, [1.0, 0.3])
    merged = weights_of(stage)
    assert any(not torch.equal(t, base[n]) for n, t in merged.items())
    for scales in ([0.7, -1.0], [0.0, 0.0], [1.0, 0.3]):
        loras.apply(stage.model, scales)
        if not any(scales):
            assert all(torch.equal(t, base[n]) for n, t in weights_of(stage).items()), "0 is the model itself"
    assert all(torch.equal(t, merged[n]) for n, t in weights_of(stage).items())
    assert places == {n: t.data_ptr() for n, t in stage.model.state_dict().items()}, (
        "in place: graphs keep their addresses"
    )
    assert loras.nbytes() == sum(base[f"{m}.weight"].numel() * dtype.itemsize for m in MODULES)


def test_a_stage_reads_the_factors_of_its_own_blocks_only_and_computes_alike() -> None:
    read: list[str] = []
    whole, parts = Stage.random(NANO), [Stage.random(NANO, blocks) for blocks in (range(2), range(2, 3))]
    LoraSet([Lora.open(NANO, as_layout("peft"))]).apply(whole.model, [1.0])
    repack(whole.model)
    for stage in parts:
        lora = Lora.open(NANO, as_layout("peft"))
        watched = type(lora.weights)(lora.weights.source, lora.weights.entries, None, lambda name, _: read.append(name))
        LoraSet([Lora(watched, lora.changes)], keep_base=False).apply(stage.model, [1.0])
        repack(stage.model)
        assert not any(f"blocks.{i}." in name for name in read for i in range(3) if i not in stage.blocks)
        read.clear()
    x = latents(0, 2)[None]
    open_on([whole], "a")
    open_on(parts, "a")
    merged = run([whole], [item("a", 0)], x)
    assert torch.allclose(merged, run(parts, [item("a", 0)], x), atol=1e-5)
    plain = Stage.random(NANO)
    open_on([plain], "a")
    assert not torch.allclose(merged, run([plain], [item("a", 0)], x), atol=1e-2)


def test_whole_differences_and_the_patch_embedding_are_understood() -> None:
    stage = Stage.random(NANO)
    before = weights_of(stage)
    shape = before["patch_embedding.weight"].shape
    up, down = torch.randn(shape[0], 2, 1, 1, 1), torch.randn(2, *shape[1:])
    state = {
        "diffusion_model.blocks.0.norm3.diff": torch.full((64,), 0.25),
        "diffusion_model.blocks.0.norm3.diff_b": torch.full((64,), 0.5),
        "diffusion_model.blocks.1.diff_m": torch.full((1, 6, 64), 0.125),
        "lora_unet_head_head.diff_b": torch.ones(64),
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
    }
    LoraSet([Lora.open(NANO, state)]).apply(stage.model, [2.0])
    after = weights_of(stage)
    for name, change in (
        ("blocks.0.norm3.weight", 0.5),
        ("blocks.0.norm3.bias", 1.0),
        ("blocks.1.modulation", 0.25),
        ("head.head.bias", 2.0),
    ):
        assert torch.allclose(after[name], before[name] + change), name
    product = torch.einsum("or,r...->o...", up.flatten(1), down)
    assert torch.allclose(after["patch_embedding.weight"], before["patch_embedding.weight"] + 2 * product, atol=1e-5)


def test_what_does_not_fit_is_named() -> None:
    def opened(more: dict[str, Tensor]) -> Lora:
        return Lora.open(NANO, {**as_layout("peft"), **more})

    ffn = "diffusion_model.blocks.0.ffn.0"
    with pytest.raises(LoraError, match=r"diffusion_model\.blocks\.9\.ffn\.0\.lora_A\.weight: tensor not part of nano"):
        opened({"diffusion_model.blocks.9.ffn.0.lora_A.weight": torch.zeros(4, 64)})
    with pytest.raises(LoraError, match=r"k_img\.lora_A\.weight.*not part of nano"):
        opened({"diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": torch.zeros(4, 64)})
    with pytest.raises(LoraError, match="dora_scale: tensor not part of nano"):
        opened({"diffusion_model.blocks.0.ffn.0.dora_scale": torch.zeros(1)})
    with pytest.raises(LoraError, match="its other half is missing"):
        opened({"diffusion_model.blocks.0.ffn.0.lora_A.weight": torch.zeros(4, 64)})
    with pytest.raises(LoraError, match="nothing that it scales"):
        opened({"diffusion_model.blocks.0.ffn.0.alpha": torch.ones(())})
    with pytest.raises(LoraError, match=r"do not make the \[128, 64\] of blocks\.0\.ffn\.0\.weight"):
        opened({f"{ffn}.lora_A.weight": torch.zeros(4, 60), f"{ffn}.lora_B.weight": torch.zeros(128, 4)})
    with pytest.raises(LoraError, match=r"diff_b is \[3\], blocks\.0\.ffn\.0\.bias is \[128\]"):
        opened({"diffusion_model.blocks.0.ffn.0.diff_b": torch.zeros(3)})
    stage = Stage.random(NANO)
    fixed = LoraSet([opened({})], keep_base=False)
    fixed.apply(stage.model, [1.0])
    assert fixed.nbytes() == 0
    with pytest.raises(LoraError, match="merged for good"):
        fixed.apply(stage.model, [0.0])
    with pytest.raises(LoraError, match="2 scales for 1 LoRAs"):
        LoraSet([opened({})]).apply(stage.model, [1.0, 2.0])


def test_a_stage_takes_other_scales_while_it_serves(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file({n: t.contiguous() for n, t in as_layout("peft", None).items()}, path)
    weights = random_dit_weights(NANO, range(NANO.layers))

    def fresh(scale: float) -> Tensor:
        stage = Stage.load(NANO, weights, loras=[(path, scale)])
        open_on([stage], "a")
        return run([stage], [item("a", 0)], latents(0, 2)[None])

    stage = Stage.load(NANO, weights, loras=[(path, 1.0)])
    open_on([stage], "a")
    for scale in (0.3, 0.0, 1.0):
        stage.scale_loras([scale])
        assert torch.equal(run([stage], [item("a", 0)], latents(0, 2)[None]), fresh(scale)), "prompts are made anew too"
    assert not torch.allclose(fresh(1.0), fresh(0.0), atol=1e-2)
    with pytest.raises(LoraError, match="2 scales for 1"):
        stage.scale_loras([1.0, 2.0])
    with pytest.raises(LoraError, match="none was loaded"):
        Stage.load(NANO, weights).scale_loras([1.0])


def test_the_setting_lists_paths_and_scales() -> None:
    settings = Settings(loras="/a/ink.safetensors:0.8, b.safetensors,/c:d/e.safetensors:-1")
    assert settings.loras == (("/a/ink.safetensors", 0.8), ("b.safetensors", 1.0), ("/c:d/e.safetensors", -1.0))
    assert Settings(loras="").loras == ()
    with pytest.raises(ValueError, match="no number: write path:scale"):
        Settings(loras="a.safetensors:much")
