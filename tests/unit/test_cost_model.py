"""Costs are learnt from measurements, and one stall must not poison them."""

from __future__ import annotations

import random

import pytest

from services.scheduler.cost_model import CostModel


def fed(pairs: list[tuple[float, float]]) -> CostModel:
    model = CostModel()
    for units, ms in pairs:
        model.observe("stage.0", units, ms)
    return model


def test_nothing_measured_costs_nothing_and_is_unknown() -> None:
    model = CostModel()
    assert model.predict("stage.0", 240) == 0.0
    assert not model.known("stage.0")


def test_one_size_is_scaled_in_proportion() -> None:
    model = fed([(240, 40.0)] * 5)
    assert model.predict("stage.0", 240) == pytest.approx(40.0)
    assert model.predict("stage.0", 480) == pytest.approx(80.0)


def test_two_sizes_give_the_fixed_part_too() -> None:
    model = fed([(240, 10 + 24.0), (480, 10 + 48.0)] * 10)
    assert model.predict("stage.0", 960) == pytest.approx(106.0, rel=1e-6)
    assert model.predict("stage.0", 1) == pytest.approx(10.1, rel=1e-3)


def test_one_stall_moves_the_prediction_little() -> None:
    model = fed([(240, 40.0)] * 30 + [(240, 4000.0)])
    assert model.predict("stage.0", 240) < 45.0


def test_a_lasting_slowdown_is_learnt() -> None:
    model = fed([(240, 40.0)] * 30 + [(240, 160.0)] * 120)
    assert model.predict("stage.0", 240) == pytest.approx(160.0, rel=0.05)


def test_nonsense_is_ignored() -> None:
    model = fed([(0, 5.0), (240, -1.0)])
    assert not model.known("stage.0")


def test_a_stall_of_twenty_times_moves_no_prediction_by_a_tenth_wherever_it_falls() -> None:
    for before in (3, 4, 6, 30, 100):
        model = fed([(240, 40.0 + 0.5 * (i % 3)) for i in range(before)])
        was = model.predict("stage.0", 240), model.predict("stage.0", 720)
        model.observe("stage.0", 240, 800.0)
        model.observe("stage.0", 240, 40.0)
        model.observe("stage.0", 240, 800.0)
        for units, predicted in zip((240, 720), was, strict=True):
            assert model.predict("stage.0", units) == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.5, 8.0])
def test_a_lasting_change_is_followed_within_ten_measurements_by_every_shape(factor: float) -> None:
    model = fed([(240, 50.0), (480, 90.0), (960, 170.0)] * 20)
    for _ in range(10):
        model.observe("stage.0", 240, 50.0 * factor)
    for units, ms in ((240, 50.0), (480, 90.0), (960, 170.0), (720, 130.0)):
        assert model.predict("stage.0", units) == pytest.approx(ms * factor, rel=0.1), "those not seen since included"


def test_items_and_units_are_told_apart() -> None:
    model = CostModel()
    for _ in range(3):
        for items, frames in ((1, 1), (2, 1), (1, 2), (2, 3)):
            units = 240 * items * frames
            model.observe("stage.0", units, 5 + 3 * items + 0.1 * units, items)
    assert model.predict("stage.0", 240 * 8, 8) == pytest.approx(5 + 24 + 192, rel=0.02)
    assert model.predict("stage.0", 240 * 4, 4) == pytest.approx(5 + 12 + 96, rel=0.02)
    assert model.knows_batches("stage.0")


def test_a_shape_that_is_off_the_line_is_known_by_itself() -> None:
    model = fed([(240, 40.0), (480, 80.0), (960, 160.0)] * 10)
    for _ in range(8):
        model.observe("stage.0", 480, 60.0, 2)
    assert model.predict("stage.0", 480, 2) == pytest.approx(60.0, rel=0.05)
    assert model.predict("stage.0", 480, 1) == pytest.approx(80.0, rel=0.05)


def test_its_error_is_what_nine_in_ten_predictions_kept() -> None:
    assert fed([]).error("stage.0") > 0.1, "nothing is known"
    assert fed([(240, 40.0)] * 40 + [(240, 800.0)]).error("stage.0") < 0.02
    swinging = fed([(240, 40.0 if i % 2 else 30.0) for i in range(80)])
    assert 0.1 < swinging.error("stage.0") < 0.4


def test_a_calibration_is_known_at_once() -> None:
    model = CostModel()
    model.seed("stage.0", [(1, 240, 40.0), (2, 480, 70.0)])
    assert model.known("stage.0")
    assert model.predict("stage.0", 480, 2) == pytest.approx(70.0)
    assert model.predict("stage.0", 960, 4) == pytest.approx(130.0, rel=0.1)


def test_what_was_learnt_outlives_a_restart_and_follows_todays_calibration() -> None:
    model = fed([(240, 50.0), (480, 90.0), (960, 170.0)] * 10)
    again = CostModel()
    again.restore(model.snapshot())
    for units in (240, 480, 720, 960):
        assert again.predict("stage.0", units) == pytest.approx(model.predict("stage.0", units), rel=1e-6)
    again.seed("stage.0", [(1, 240, 100.0)])
    assert again.predict("stage.0", 960) == pytest.approx(340.0, rel=0.02), "the device is half as fast today"


@pytest.mark.parametrize(
    "plain",
    [{}, {"speed": 1.0}, {"speed": "x", "cells": [], "errors": []}, {"speed": -1.0, "cells": [], "errors": []},
     {"speed": 1.0, "cells": [[1, 240]], "errors": []}, {"speed": 1.0, "cells": [[1, 240, float("nan"), 3]], "errors": []}],
)  # fmt: skip
def test_a_snapshot_that_is_none_is_refused(plain: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not the snapshot"):
        CostModel().restore({"stage.0": plain})


def test_costs_are_scaled_when_a_stage_gets_other_blocks() -> None:
    model = fed([(240, 40.0)] * 20)
    model.scale("stage.0", 0.5)
    assert model.predict("stage.0", 240) == pytest.approx(20.0, rel=0.02)
    with pytest.raises(ValueError, match="positive"):
        model.scale("stage.0", 0.0)


def test_a_shape_that_nobody_runs_any_more_costs_what_it_did() -> None:
    """Many times a day cores fill up and empty again: forwards alone take three times as long, by and by or at once."""
    model = CostModel()
    for _ in range(12):
        for items, ms in ((1, 11.0), (2, 19.0), (8, 55.0)):
            model.observe("stage.0", 60 * items, ms, items)
    rng = random.Random(5)
    for day in range(8):
        most = 1.0 + 0.4 * day
        ways = [most] * 30 if day % 2 else [1.0 + (most - 1.0) * i / 60 for i in range(60)]
        for factor in [*ways, *[most] * 40, *([1.0] * 60 if day % 3 else [*reversed(ways), *[1.0] * 60])]:
            model.observe("stage.0", 60, 11.0 * factor * rng.uniform(0.97, 1.03))
        assert model.predict("stage.0", 60) == pytest.approx(11.0, rel=0.05)
        assert model.predict("stage.0", 480, 8) == pytest.approx(55.0, rel=0.1)
        assert model.predict("stage.0", 480, 8) * model.settled("stage.0") == pytest.approx(55.0, rel=0.1)


def test_a_shape_that_is_slow_by_itself_makes_the_others_no_slower_for_good() -> None:
    model = CostModel()
    for _ in range(12):
        for items, ms in ((1, 11.0), (3, 28.0), (8, 55.0)):
            model.observe("stage.0", 60 * items, ms, items)
    for _ in range(60):  # threes are run where much else goes on
        model.observe("stage.0", 60, 11.0)
        model.observe("stage.0", 180, 56.0, 3)
    assert model.predict("stage.0", 60) == pytest.approx(11.0, rel=0.05)
    assert model.predict("stage.0", 180, 3) == pytest.approx(56.0, rel=0.05)
    for _ in range(80):
        model.observe("stage.0", 60, 11.0)
    assert model.predict("stage.0", 60) == pytest.approx(11.0, rel=0.05)
    assert model.predict("stage.0", 480, 8) == pytest.approx(55.0, rel=0.1)
