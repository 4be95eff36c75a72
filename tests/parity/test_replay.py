"""The engine replays what the public code did, by the stage's own step function, however the blocks are split."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.parity.replay import TOLERANCE, Recording, main, replay, replay_dit, worst_of

DATA = Path(__file__).parent / "data"
DIT_FILES = (
    "two_step_adaptive_sink",
    "one_step_rope_refresh",
    "four_step_fixed_sink",
    "three_step_rope_refresh_fixed_sink",
    "three_frame_block_no_sink",
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", DIT_FILES)
def test_every_tick_of_a_recorded_stream_is_met(name: str) -> None:
    kind, errors = replay(DATA / f"{name}.safetensors")
    assert kind == "dit"
    assert len(errors) >= 11
    assert worst_of(errors) <= TOLERANCE / 10


@pytest.mark.parametrize("cuts", [(1,), (1, 2)])
def test_a_recorded_stream_is_met_over_several_stages(cuts: tuple[int, ...]) -> None:
    recording = Recording.read(DATA / "two_step_adaptive_sink.safetensors")
    assert worst_of(list(replay_dit(recording, cuts))) <= TOLERANCE / 10


def test_the_tiny_autoencoder_meets_its_recording_whole_and_streamed() -> None:
    kind, errors = replay(DATA / "taehv.safetensors")
    assert kind == "taehv"
    assert worst_of(errors) <= TOLERANCE / 5


def test_the_wan_autoencoder_meets_its_recording_whole_and_streamed() -> None:
    kind, errors = replay(DATA / "wan_vae_streaming.safetensors")
    assert kind == "wan_vae"
    assert worst_of(errors) <= TOLERANCE / 5


def test_a_replay_that_comes_out_as_nan_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert math.isnan(worst_of([0.0, math.nan, 1.0]))
    assert math.isnan(worst_of([]))
    assert worst_of([1e-6, 2e-6]) == 2e-6
    original = DATA / "one_step_rope_refresh.safetensors"
    tensors = dict(Recording.read(original).tensors)
    spoilt = tensors["chunk.003.output"].clone()
    spoilt.view(-1)[5] = math.nan
    with safe_open(original, framework="pt") as file:
        save_file({**tensors, "chunk.003.output": spoilt}, tmp_path / "nan.safetensors", file.metadata())
    assert main([str(tmp_path / "nan.safetensors")]) == 1
    assert '"max_abs_error": null' in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("name", DIT_FILES)
def test_every_tick_is_met_on_the_gpu(name: str) -> None:
    recording = Recording.read(DATA / f"{name}.safetensors")
    assert worst_of(list(replay_dit(recording, device="cuda"))) <= TOLERANCE
