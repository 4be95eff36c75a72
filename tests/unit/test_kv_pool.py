"""A KV pool that grows: what it holds stays, what it needs meanwhile is bounded, and want of room breaks nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared.engine.model import kv_cache
from shared.engine.model.kv_cache import KvPool, NoSlotError
from tests.support.engine import NANO

NAMES = ("keys", "values", "means", "inputs")


def pool_of(slots: int = 2, max_slots: int = 64, *, public_rule: bool = False, tokens: int = 256) -> KvPool:
    """Every slot is in use, and every tensor holds numbers of its own."""
    spec = replace(NANO, ring=4)
    pool = KvPool(
        spec,
        2,
        tokens,
        torch.device("cpu"),
        torch.float32,
        slots=slots,
        max_slots=max_slots,
        public_rule=public_rule,
        inputs_shape=(1, 2, 2),
    )
    for _ in range(slots):
        pool.take()
    for seed, name in enumerate(NAMES):
        getattr(pool, name).normal_(generator=torch.Generator().manual_seed(seed))
    return pool


def copies(pool: KvPool) -> dict[str, Tensor]:
    return {name: getattr(pool, name).clone() for name in NAMES}


def held_as(pool: KvPool, before: dict[str, Tensor], slots: int) -> bool:
    axes = (1, 1, 1, 0)
    return all(
        torch.equal(getattr(pool, name).narrow(axis, 0, slots), before[name])
        for name, axis in zip(NAMES, axes, strict=True)
    )


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once: ``known`` tensors, and those made meanwhile."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._seen = [weakref.ref(tensor) for tensor in known]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._seen.append(weakref.ref(result))
        alive = [tensor.untyped_storage() for ref in self._seen if (tensor := ref()) is not None]
        self.bytes = max(self.bytes, sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values()))
        return result


@pytest.mark.parametrize("public_rule", [False, True])
def test_what_the_slots_hold_stays_as_it_was(public_rule: bool) -> None:
    pool = pool_of(public_rule=public_rule)
    before, generation = copies(pool), pool.generation
    assert pool.take() == 2
    assert pool.slots == 4
    assert held_as(pool, before, 2)
    assert not any(getattr(pool, name)[:, 2:].any() for name in NAMES[:3])
    assert {len(record[0]) for record in pool.rule.records().values()} == {4}
    assert pool.generation > generation
    assert all(getattr(pool, name).is_contiguous() for name in NAMES)


def test_doubling_never_holds_all_of_the_old_beside_all_of_the_new() -> None:
    pool = pool_of()
    held = pool.nbytes()
    with Peak([getattr(pool, name) for name in NAMES]) as peak:
        pool.reserve(4)
    assert pool.nbytes() == 2 * held
    assert peak.bytes < 2.6 * held


def test_where_twice_as_many_would_not_fit_it_grows_by_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(slots=4)
    monkeypatch.setattr(kv_cache, "room_on", lambda device: 7 * pool.slot_bytes())
    assert pool.take() == 4
    assert pool.slots == 5
    pool.reserve(7)
    assert pool.slots == 7


@pytest.mark.parametrize("made", range(4))
def test_where_the_device_has_no_room_the_slots_stay_and_a_later_try_goes_on(
    made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(max_slots=8)
    before, generation, longer = copies(pool), pool.generation, kv_cache._longer

    def refuse(tensor: Tensor, size: int, axis: int) -> Tensor:
        if tensor is getattr(pool, NAMES[made]):
            raise torch.OutOfMemoryError("no room")
        return longer(tensor, size, axis)

    monkeypatch.setattr(kv_cache, "_longer", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        pool.reserve(6)
    assert (pool.slots, pool.free, pool.idle) == (2, 0, False)
    assert pool.generation > generation, "addresses changed"
    assert held_as(pool, before, 2)
    with pytest.raises(NoSlotError):
        pool.expect(7)
    monkeypatch.undo()
    assert pool.take() == 2
    assert (pool.slots, pool.free) == (4, 1)
    assert held_as(pool, before, 2)
    pool.reserve(8)
    assert {getattr(pool, name).shape[1] for name in NAMES[:3]} == {pool.inputs.shape[0]} == {8}
    assert held_as(pool, before, 2)
