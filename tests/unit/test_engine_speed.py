"""Compiled pieces and recorded forwards give what the plain forward gives; only the way they run differs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shared.engine import compile as fast
from shared.engine.compile import EAGER_RUNS, GraphedForward, Piece, Speed, make_forward
from shared.engine.forward import StepForward
from shared.engine.model.fp8 import Fp8Error
from shared.engine.model.kernels import KernelName, dense, fastest_kernel, kernel_of
from shared.engine.model.loading import random_dit_weights
from shared.engine.model.packed import PackedLinear, can_pack, repack
from shared.engine.plan.items import Item
from shared.engine.stage import Stage
from tests.support.engine import NANO, item, latents, open_on, prompt, stages_of

CLOSE = 1e-5
CPU = torch.device("cpu")


class Tape:
    """A recorder without a GPU: recording runs nothing, replaying runs the kernels again on the recorded tensors."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        return work


def taped(stage: Stage) -> tuple[GraphedForward, Tape]:
    tape, plain = Tape(), stage._forward
    assert isinstance(plain, StepForward)
    graphed = GraphedForward(plain, tape)
    stage._forward = graphed
    return graphed, tape


def stream_of(stage: Stage, blocks: int, change: Callable[[Item], Item] = lambda i: i) -> list[Tensor]:
    made = []
    for block in range(blocks):
        one = change(item("a", block, steps=(700,)))
        made.append(stage.run([one], latents(block, one.frames)[None]))
    return made


def test_recorded_forwards_give_what_plain_ones_do_with_new_inputs_each_time() -> None:
    (plain,), (stage,) = stages_of(), stages_of()
    graphed, tape = taped(stage)
    for each in (plain, stage):
        open_on([each], "a")
        each.set_prompt("a", 2, prompt(99))

    def change(one: Item) -> Item:  # the prompt changes while the graph stays
        return replace(one, prompt_version=2) if one.block > 12 else one

    for ours, theirs in zip(stream_of(stage, 16, change), stream_of(plain, 16, change), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(plain.sinks("a")[0], stage.sinks("a")[0])
    assert tape.recorded == 1
    filling = 5  # blocks until the ring of 6 is full
    assert graphed.counts == {
        "eager": filling - 1 + EAGER_RUNS,
        "recorded": 1,
        "replayed": 16 - filling + 1 - EAGER_RUNS,
    }


def test_each_bucket_is_recorded_once_and_a_pool_made_anew_ends_its_graphs() -> None:
    (stage,) = stages_of()
    graphed, tape = taped(stage)
    open_on([stage], "a", "b")
    stream_of(stage, 12)
    assert tape.recorded == 1
    for block in range(12):
        stage.run([item("b", block, steps=(700,))], latents(block, 2 if block == 0 else 1)[None])
    alone = tape.recorded
    for block in range(12, 20):
        both = [item(name, block, steps=(700,)) for name in "ab"]
        stage.run(both, torch.stack([latents(block)] * 2))
    assert tape.recorded == alone + 1
    stage.reserve(8, 12, 16)  # the pool's tensors move
    before = graphed.counts["eager"]
    stage.run([item("a", 20, steps=(700,))], latents(20)[None])
    assert graphed.counts["eager"] == before + 1


def test_a_recorded_batch_reads_the_slots_of_its_own_items_and_not_of_those_it_was_recorded_with() -> None:
    """Slots that are no neighbours are gathered: their numbers are an input like any other."""
    (plain,), (stage,) = stages_of(), stages_of()
    graphed, _ = taped(stage)
    for each in (plain, stage):
        open_on([each], *"abcde")
        for name in "abcde":
            for block in range(6):
                each.run([item(name, block, steps=(700,))], latents(ord(name) + block, 2 if block == 0 else 1)[None])
    for block in range(6, 12):
        for pair in ("ac", "be", "da"):
            batch = [item(name, block, steps=(700,)) for name in pair]
            x = torch.stack([latents(ord(name) + block) for name in pair])
            assert torch.allclose(stage.run(batch, x), plain.run(batch, x), atol=CLOSE), (pair, block)
    assert graphed.counts["replayed"] > 6


def test_a_size_that_is_no_longer_used_lets_its_graphs_go() -> None:
    (stage,) = stages_of()
    graphed, tape = taped(stage)
    open_on([stage], "a", "big")
    stage.open("big", 16, 12)
    stream_of(stage, 12)
    for block in range(12):
        frames = 2 if block == 0 else 1
        stage.run([item("big", block, steps=(700,))], torch.zeros(1, frames, 16, 16, 12))
    assert tape.recorded == len(graphed._graphs) == 2
    stage.close("big")
    assert len(graphed._graphs) == 1


def test_graphs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "MAX_GRAPHS", 2)
    (stage,) = stages_of()
    graphed, tape = taped(stage)
    names = [f"s{i}" for i in range(4)]
    open_on([stage], *names)
    for block in range(10):
        for name in names:
            stage.run([item(name, block, steps=(700,))], latents(block, 2 if block == 0 else 1)[None])
    assert tape.recorded > 2, "every stream has slots of its own"
    assert len(graphed._graphs) == 2


def test_a_recording_that_fails_is_told_once_and_forwards_go_on(caplog: pytest.LogCaptureFixture) -> None:
    (plain,), (stage,) = stages_of(), stages_of()

    def broken(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("no graphs on this card")

    assert isinstance(stage._forward, StepForward)
    stage._forward = GraphedForward(stage._forward, broken)
    open_on([plain], "a")
    open_on([stage], "a")
    with caplog.at_level(logging.WARNING):
        for ours, theirs in zip(stream_of(stage, 12), stream_of(plain, 12), strict=True):
            assert torch.equal(ours, theirs)
    assert caplog.text.count("no graphs on this card") == 1


def test_speeds_mean_what_the_device_can_do() -> None:
    assert Speed.AUTO.on(CPU) is Speed.EAGER
    assert Speed.AUTO.on(torch.device("cuda")) is Speed.GRAPHS
    assert Speed.COMPILED.on(CPU) is Speed.COMPILED
    with pytest.raises(ValueError, match="needs a GPU"):
        Speed.GRAPHS.on(CPU)


def test_compiled_pieces_compute_what_plain_ones_do() -> None:
    small = replace(NANO, layers=2)
    plain, stage = Stage.random(small), Stage.random(small, speed=Speed.COMPILED)
    open_on([plain], "a")
    open_on([stage], "a")
    for ours, theirs in zip(stream_of(stage, 4), stream_of(plain, 4), strict=True):
        assert torch.allclose(ours, theirs, atol=CLOSE)
    assert isinstance(stage._forward, StepForward)


def test_a_piece_that_cannot_be_compiled_runs_as_it_stands(caplog: pytest.LogCaptureFixture) -> None:
    from torch._dynamo.exc import Unsupported

    def double(x: Tensor) -> Tensor:
        return 2 * x

    def refuses(x: Tensor) -> Tensor:
        raise Unsupported("this compiler cannot")

    piece = Piece(double)
    piece._fast = refuses
    with caplog.at_level(logging.WARNING):
        assert torch.equal(piece(torch.ones(2)), torch.full((2,), 2.0))
        assert torch.equal(piece(torch.ones(2)), torch.full((2,), 2.0))
    assert caplog.text.count("double runs without the compiler") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_of_the_cpu_computes_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, 16, dtype=dtype) for n in (12, 40, 40))
    exact = kernel_of(KernelName.FUSED)(*(t.float() for t in (q, k, v)))
    assert torch.allclose(dense(q, k, v).float(), exact, atol=1e-5 if dtype is torch.float32 else 0.03)
    chosen = fastest_kernel(CPU, dtype, batch=2, length=12, keys=40, heads=4, head_dim=16)
    assert chosen is KernelName.FUSED if dtype is torch.float32 else chosen in (KernelName.FUSED, KernelName.DENSE)


def test_tuning_changes_the_kernel_and_not_the_picture() -> None:
    plain, stage = stages_of(dtype=torch.bfloat16)[0], stages_of(dtype=torch.bfloat16)[0]
    assert stage.tune(8, 12) in ("fused", "dense")
    open_on([plain], "a")
    open_on([stage], "a")
    for ours, theirs in zip(stream_of(stage, 4), stream_of(plain, 4), strict=True):
        assert float((ours - theirs).square().mean().sqrt() / theirs.std()) < 0.05


def test_only_the_forward_is_replaced() -> None:
    (stage,) = stages_of()
    assert make_forward(stage._forward, Speed.EAGER, CPU) is stage._forward
    assert isinstance(make_forward(stage._forward, Speed.COMPILED, CPU), StepForward)


@pytest.mark.gpu
def test_cuda_graphs_give_what_eager_forwards_do() -> None:
    plain, stage = (Stage.random(NANO, device="cuda", speed=speed) for speed in (Speed.EAGER, Speed.GRAPHS))
    for each in (plain, stage):
        open_on([each], "a")
        each.set_prompt("a", 2, prompt(99))

    def change(one: Item) -> Item:
        return replace(one, prompt_version=2) if one.block > 12 else one

    for ours, theirs in zip(stream_of(stage, 20, change), stream_of(plain, 20, change), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert isinstance(stage._forward, GraphedForward)
    assert stage._forward.counts["recorded"] == 1
    assert stage._forward.counts["replayed"] >= 10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fastest_kernel_of_the_gpu_computes_attention(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    name = fastest_kernel(device, dtype, batch=1, length=1560, keys=9360, heads=12, head_dim=128)
    q, k, v = (torch.randn(1, n, 12, 128, device=device, dtype=dtype) for n in (1560, 9360, 9360))
    exact = kernel_of(KernelName.FUSED)(*(t.float() for t in (q, k, v)))
    assert torch.allclose(kernel_of(name)(q, k, v).float(), exact, atol=0.02)


def test_fp8_says_what_it_needs() -> None:
    with pytest.raises(Fp8Error, match=r"compute capability 8\.9 or newer, the device is cpu: leave fp8 off"):
        Stage.load(NANO, random_dit_weights(NANO, range(NANO.layers)), fp8=True)


@pytest.mark.gpu
def test_fp8_halves_the_weights_and_stays_near() -> None:
    pytest.importorskip("torchao", reason="pip install -e '.[fp8]'")
    wide = replace(NANO, dim=512, ffn_dim=2048, heads=4, layers=2)
    weights = random_dit_weights(wide, range(2))
    plain, small = (Stage.load(wide, weights, None, "cuda", torch.bfloat16, fp8=fp8) for fp8 in (False, True))
    for each in (plain, small):
        open_on([each], "a")
    for ours, theirs in zip(stream_of(small, 6), stream_of(plain, 6), strict=True):
        assert float((ours - theirs).square().mean().sqrt() / theirs.std()) < 0.1


@pytest.mark.parametrize("dtype", [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(CPU, dtype)])
def test_packed_layers_compute_what_plain_ones_do_and_follow_their_weights(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(48, 32, dtype=dtype), torch.randn(5, 7, 48, dtype=dtype)
    near = {"atol": 1e-5} if dtype is torch.float32 else {"atol": 0.05}
    with torch.inference_mode():
        fast, warm = PackedLinear(plain), PackedLinear(plain, gelu=True)
        assert torch.allclose(fast(x), plain(x), **near)
        assert torch.allclose(warm(x), torch.nn.functional.gelu(plain(x), approximate="tanh"), **near)
        assert torch.equal(fast(x)[:1], fast(x[:1])), "the rows beside them change nothing"
        with torch.no_grad():
            plain.weight.mul_(2)
        repack(torch.nn.ModuleList([fast]))
        assert torch.allclose(fast(x), plain(x), **near)
        assert fast.weight is plain.weight


def test_a_stage_in_bfloat16_runs_on_any_cpu_packed_or_not() -> None:
    (stage,) = stages_of(dtype=torch.bfloat16)
    assert isinstance(stage.layers[0].self_attn.o, PackedLinear) == can_pack(CPU, torch.bfloat16)
    open_on([stage], "a")
    assert all(torch.isfinite(made).all() for made in stream_of(stage, 2))


def test_a_stage_on_the_cpu_is_packed_under_the_models_own_names() -> None:
    (stage,) = stages_of()
    assert can_pack(CPU, torch.float32)
    assert not can_pack(CPU, torch.float16)
    first = stage.layers[0]
    for layer in (
        first.self_attn.qkv,
        first.self_attn.o,
        first.cross_attn.q,
        first.cross_attn.o,
        first.ffn[0],
        first.ffn[2],
    ):
        assert isinstance(layer, PackedLinear)
    assert set(random_dit_weights(NANO, range(NANO.layers))) <= set(stage.model.state_dict())
