"""The engine on a GPU: a warm stage never makes the host wait, whatever its items do to their slots."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shared.engine.plan.items import SlotOp, SlotOpKind
from shared.engine.stage import Stage
from tests.support.engine import NANO, item, latents, open_on, with_ops

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """Two streams with full rings: allocations, kernels and tables are made."""
    warm = Stage.random(NANO, device="cuda", dtype=request.param)
    open_on([warm], "a", "b")
    for block in range(8):
        frames = 2 if block == 0 else 1
        warm.run([item("a", block), item("b", block)], source(block, 2, frames))
    warm.run([item("a", 8, step=1), item("b", 8, step=1)], source(8, 2))
    torch.cuda.synchronize()
    yield warm
    torch.cuda.set_sync_debug_mode("default")


def source(seed: int, count: int, frames: int = 1) -> torch.Tensor:
    return torch.stack([latents(seed, frames)] * count).cuda()


def test_a_forward_does_not_wait(stage: Stage) -> None:
    batch, x = [item("a", 9), item("b", 9)], source(9, 2)
    torch.cuda.set_sync_debug_mode("error")
    x0 = stage.run(batch, x)
    again = stage.renoise(batch, x0)
    torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(again).all())


def test_slot_operations_do_not_wait(stage: Stage) -> None:
    ops = (SlotOp(SlotOpKind.REROTATE, 0, frames=-3), SlotOp(SlotOpKind.FORK, 1, source=0))
    one, two, first = source(9, 2), source(10, 2), source(0, 1, 2)
    torch.cuda.set_sync_debug_mode("error")
    stage.run([with_ops(item("a", 9), *ops), item("b", 9)], one)
    stage.run([item("b", 10, slot=1), item("a", 10)], two)
    # The block that resets its slot, and fills a ring from its beginning.
    x0 = stage.run([item("b", 0)], first)
    torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(x0).all())


def test_the_guard_itself_sees_a_wait() -> None:
    value = torch.ones(2, device="cuda").sum()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            value.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
