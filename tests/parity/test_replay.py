"""The engine replays what the public code did, by the stage's own step function, however the blocks are split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.replay import TOLERANCE, Recording, replay, replay_dit

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
    assert max(errors) <= TOLERANCE / 10


@pytest.mark.parametrize("cuts", [(1,), (1, 2)])
def test_a_recorded_stream_is_met_over_several_stages(cuts: tuple[int, ...]) -> None:
    recording = Recording.read(DATA / "two_step_adaptive_sink.safetensors")
    assert max(replay_dit(recording, cuts)) <= TOLERANCE / 10


def test_the_tiny_autoencoder_meets_its_recording_whole_and_streamed() -> None:
    kind, errors = replay(DATA / "taehv.safetensors")
    assert kind == "taehv"
    assert max(errors) <= TOLERANCE / 5


def test_the_wan_autoencoder_meets_its_recording_whole_and_streamed() -> None:
    kind, errors = replay(DATA / "wan_vae_streaming.safetensors")
    assert kind == "wan_vae"
    assert max(errors) <= TOLERANCE / 5


@pytest.mark.gpu
@pytest.mark.parametrize("name", DIT_FILES)
def test_every_tick_is_met_on_the_gpu(name: str) -> None:
    recording = Recording.read(DATA / f"{name}.safetensors")
    assert max(replay_dit(recording, device="cuda")) <= TOLERANCE
