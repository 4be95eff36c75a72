"""The engine's bench: what it asks, what it refuses, and that its figures hang together."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

from bench.ceilings import measure_ceilings
from bench.engine import settings_of
from bench.lockstep import LockStep
from bench.measure import measure
from bench.peer import PeerError, import_peer, records
from bench.setting import Setting, spec_for
from bench.weights import Models
from shared.engine.plan.spec import SpecError
from tests.support.engine import NANO, stages_of

NANO_SETTING = Setting("nano", 96, 64, 2, 2, 2, "own", "float32", 1, "cpu")


def test_every_combination_is_a_setting() -> None:
    args = argparse.Namespace(
        model=["nano", "rheo-tiny"], size=["96x64"], steps=[1, 2], streams=[1], stages=[1, 2], vae=["own"],
        dtype=["float32"], threads=[1], compile=["off", "on"], device="cpu",
    )  # fmt: skip
    assert len(set(settings_of(args))) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [({"vae": "none"}, "no autoencoder 'none'"), ({"steps": 5}, "at most 4 steps"), ({"model": "x"}, "no model 'x'")],
)
def test_a_setting_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    values = {name: getattr(NANO_SETTING, name) for name in Setting.__dataclass_fields__}
    with pytest.raises(SpecError, match=message):
        spec_for(Setting(**{**values, **change}))  # type: ignore[arg-type]


def test_figures_hang_together() -> None:
    ceilings = measure_ceilings(NANO, (96, 64), NANO_SETTING.items, torch.device("cpu"), torch.float32)
    assert min(ceilings.matmul, ceilings.attention, ceilings.memory) > 0
    figures = measure(NANO_SETTING, 2, Models(True), ceilings)
    assert figures.forward == pytest.approx(4 * figures.step)
    assert figures.least_forward <= figures.forward
    assert figures.share == pytest.approx(4 * figures.floor_step / figures.forward)
    assert min(figures.fps, figures.pipelined_fps) > 0
    # 2 steps × 3 blocks × K and V of 6 frames of 24 tokens × 64 × 4 bytes
    assert figures.kv_mib * 2**20 == 2 * 3 * 2 * 6 * 24 * 64 * 4
    assert figures.vae_mib > 0


def test_lock_step_reads_neighbouring_slots_where_they_lie() -> None:
    loop = LockStep(NANO, stages_of(), (96, 64), steps=3, streams=2)
    for _ in range(12):
        loop.tick()
    assert [(item.stream, item.step) for _, item, _ in loop.waiting] == [
        (f"bench-{stream}", step) for stream in range(2) for step in range(2)
    ]


def test_a_folder_without_the_public_code_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"has no models/wan/causal_model\.py"):
        import_peer(tmp_path)
    assert "models" not in sys.modules


def test_the_settings_of_record_cover_both_text_lengths_and_threads() -> None:
    plain = [r for r in records() if r.dtype == "float32" and not r.compiled]
    assert {(r.text_len, r.threads) for r in plain} == {(16, 1), (16, 2), (512, 1), (512, 2)}
