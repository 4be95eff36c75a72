"""Costs are learnt from measurements, and one stall must not poison them."""

from __future__ import annotations

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
