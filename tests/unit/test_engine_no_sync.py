"""No forward waits for the device: nothing in a step turns a tensor's content into a number of the host.

On a GPU each such read would stall the pipeline. Here a dispatch mode watches every operator instead. The tensors it
watches live on the CPU, so reading one would go unnoticed on the clock; the mode fails on the operator itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared.engine.forward import StepInputs
from shared.engine.plan.items import SlotOp, SlotOpKind
from shared.engine.stage import Stage
from tests.support.engine import item, latents, open_on, stages_of, with_ops

READS_THE_DEVICE = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
DOUBLE = (torch.float64, torch.complex64, torch.complex128)


class Watch(TorchDispatchMode):
    """Fails on an operator that reads a result and, in the block loop, on one that makes double or complex numbers.

    Counts the operators, all of them and those inside the block loop.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.inside = 0
        self.in_blocks = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(READS_THE_DEVICE), f"{name} waits for the device"
        self.operators += 1
        self.inside += self.in_blocks
        out = func(*args, **(kwargs or {}))
        if self.in_blocks and isinstance(out, torch.Tensor):
            assert out.dtype not in DOUBLE, f"{name} makes {out.dtype} in the block loop"
        return out


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def stage(request: pytest.FixtureRequest) -> Stage:
    (stage,) = stages_of(dtype=request.param)
    open_on([stage], "a", "b")
    for block in range(7):
        batch = [item("a", block), item("b", block)]
        stage.run(batch, torch.stack([latents(block, 2 if block == 0 else 1)] * 2))
    return stage


def blocks_watched(stage: Stage, watch: Watch) -> None:
    """Tell the mode when the fixed sequence of kernels begins and ends."""
    forward = stage._forward

    def watched(step: StepInputs) -> torch.Tensor:
        watch.in_blocks = True
        try:
            return forward(step)
        finally:
            watch.in_blocks = False

    stage._forward = watched


def test_a_full_step_with_adaptive_sinks_never_reads_the_device(stage: Stage) -> None:
    watch = Watch()
    blocks_watched(stage, watch)
    batch = [item("a", 7), item("b", 7)]
    with watch:
        x0 = stage.run(batch, torch.stack([latents(7)] * 2))
        stage.renoise(batch, x0)
    assert watch.operators > 100


def test_slot_operations_and_mixed_fill_levels_never_read_the_device(stage: Stage) -> None:
    ops = (SlotOp(SlotOpKind.REROTATE, 0, frames=-3), SlotOp(SlotOpKind.FORK, 1, source=0))
    watch = Watch()
    blocks_watched(stage, watch)
    with watch:
        stage.run([with_ops(item("a", 7), *ops), item("b", 7)], torch.stack([latents(7)] * 2))
        stage.run([item("b", 8, slot=2), item("a", 8)], torch.stack([latents(8)] * 2))
        stage.run([item("b", 0)], latents(0, 2)[None])
    assert watch.operators > 300


def test_the_watch_itself_sees_a_read() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), Watch():
        torch.ones(2).sum().item()


def test_more_items_do_not_mean_more_operators(stage: Stage) -> None:
    counts = []
    for names in ("a", "ab"):
        watch = Watch()
        blocks_watched(stage, watch)
        with watch:
            stage.run([item(n, 7) for n in names], torch.stack([latents(7)] * len(names)))
        counts.append(watch.inside)
    # One prompt is expanded, two are gathered: but never is anything done item by item.
    assert counts[0] > 100
    assert counts[1] <= counts[0] + 4
