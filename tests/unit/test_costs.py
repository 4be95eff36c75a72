"""What work costs is known when a worker joins: by its calibration, and by what was remembered of its device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.scheduler.costs import CostBook
from services.worker.calibration import Calibration, Measured
from services.worker.runtime import Runtime
from services.worker.settings import Settings
from shared.contracts.beats import Beat, MeasuredCost
from shared.session.memory import MemoryStore
from tests.support import wan_files
from tests.support.wan_files import tiny_wan

ROLES = ("text", "encode", "stage", "decode")


def beat(incarnation: str = "1", ms: float = 40.0, **changes: object) -> Beat:
    grid = tuple(
        MeasuredCost(role="stage", items=items, units=240 * items, ms=ms * (1 + items) / 2) for items in (1, 2, 4)
    )
    return Beat(
        service="worker",
        instance="w0",
        incarnation=incarnation,
        roles=ROLES,
        pipeline="p0",
        stage=0,
        stages=1,
        model="rheo-tiny",
        device="cpu/float32",
        calibration=(*grid, MeasuredCost(role="decode", items=1, units=240, ms=9.0)),
    ).model_copy(update=changes)


async def test_a_worker_that_joins_brings_its_costs() -> None:
    book = CostBook(MemoryStore())
    await book.beat(beat(ready=False))
    assert not book.of("p0").known("stage.0"), "it is still measuring"
    await book.beat(beat())
    assert book.of("p0").predict("stage.0", 480, 2) == pytest.approx(60.0)
    assert book.of("p0").predict("decode", 240) == pytest.approx(9.0)


async def test_beats_tell_what_decode_takes() -> None:
    book = CostBook(MemoryStore())
    for _ in range(8):
        await book.beat(beat(measured=(MeasuredCost(role="decode", items=1, units=240, ms=30.0),)))
    assert book.of("p0").predict("decode", 240) == pytest.approx(30.0, rel=0.05)


async def test_a_new_scheduler_remembers_and_another_device_does_not() -> None:
    store = MemoryStore()
    book = CostBook(store)
    await book.beat(beat())
    for _ in range(20):
        book.of("p0").observe("stage.0", 1920, 200.0, 8)
    await book.save()
    again = CostBook(store)
    await again.beat(beat(incarnation="2", calibration=()))
    assert again.of("p0").predict("stage.0", 1920, 8) == pytest.approx(200.0, rel=0.02)
    other = CostBook(store)
    await other.beat(beat(device="gpu/bfloat16", calibration=()))
    assert not other.of("p0").known("stage.0")


async def test_what_is_remembered_follows_the_speed_of_today() -> None:
    store = MemoryStore()
    book = CostBook(store)
    await book.beat(beat())
    for _ in range(20):
        book.of("p0").observe("stage.0", 1920, 180.0, 8)
    await book.save()
    again = CostBook(store)
    await again.beat(beat(ms=80.0))
    assert again.of("p0").predict("stage.0", 1920, 8) == pytest.approx(360.0, rel=0.05)


async def test_rubbish_in_the_store_is_not_believed() -> None:
    store = MemoryStore()
    await store.put_costs("cpu/float32:rheo-tiny:320x192", {"stage 0/1": {"speed": 0}})
    book = CostBook(store)
    await book.beat(beat())
    assert book.of("p0").predict("stage.0", 240) == pytest.approx(40.0)


def test_measured_times_are_medians_by_shape_and_bounded() -> None:
    measured = Measured()
    for ms in (5.0, 100.0, 6.0):
        measured.add("decode", 1, 240, ms)
    for units in range(100):
        measured.add("decode", 1, 1000 + units, 1.0)
    told = measured.take()
    assert (told[0].ms, told[0].runs, len(told)) == (6.0, 3, 16)
    assert measured.take() == ()


def test_a_calibration_measures_every_role_and_leaves_nothing_behind(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    wan_files.write_model(tiny_wan(), tmp_path / "tiny-wan")
    runtime = Runtime(Settings(model="tiny-wan", models_dir=tmp_path, device="cpu"))
    runtime.load()
    found = Calibration(runtime, 30.0).run()
    by_role = {role: {(cost.items, cost.units) for cost in found if cost.role == role} for role in ROLES}
    tokens = runtime.spec.tokens(runtime.spec.default_width, runtime.spec.default_height)
    assert by_role["encode"] == by_role["decode"] == {(1, tokens)}
    assert {(1, tokens), (2, 2 * tokens), (1, 2 * tokens), (8, 24 * tokens)} <= by_role["stage"]
    assert all(cost.ms > 0 for cost in found)
    assert runtime.memory_fields()["stream_bytes"] == {}
    assert Calibration(runtime, 0.0).run() == (), "asked not to"
