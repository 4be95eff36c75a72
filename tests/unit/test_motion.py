"""Motion gives each chunk its noise once, in order, and goes on from its mirror."""

from __future__ import annotations

import pytest

from services.motion.core import StreamMotion, Verdict
from shared.contracts.events import ChunkStamp, FrameStamp, LatentsEncoded
from shared.contracts.refs import TensorPlace, TensorRef
from shared.engine.plan.noise_controller import NoiseForm
from shared.engine.plan.spec import NoiseSpec

REF = TensorRef(owner="w", host="h", place=TensorPlace.LOCAL, shape=(1,), dtype="float32")


def chunk(number: int, rmse: float, epoch: int = 1) -> LatentsEncoded:
    frames = (FrameStamp(index=number, pts=number, captured_ns=1),)
    stamp = ChunkStamp(stream="a", epoch=epoch, chunk=number, frames=frames)
    return LatentsEncoded(stamp=stamp, latents=REF, latent_frames=1, rmse=(0.0, rmse))


def new() -> StreamMotion:
    return StreamMotion.new(1, NoiseSpec(), 0.8, NoiseForm.PIXEL)


def test_a_still_scene_gets_s0_and_a_moving_one_less() -> None:
    motion = new()
    _, still = motion.estimate(chunk(0, 0.0), 0.0)
    _, moving = motion.estimate(chunk(1, 0.2), 0.0)
    assert still is not None
    assert moving is not None
    assert (still.noise_scale, still.first_timestep) == (pytest.approx(0.8), 700)
    assert moving.noise_scale == pytest.approx(0.9 * 0.7 + 0.1 * 0.8)
    assert moving.first_timestep == int(1000 * (0.9 * 0.7 + 0.1 * 0.8)) - 100


def test_repeated_overtaken_and_old_chunks_do_not_move_the_controller() -> None:
    motion = new()
    motion.estimate(chunk(0, 0.2), 0.0)
    motion.estimate(chunk(2, 0.2), 0.0)
    before = motion.mirror()
    assert motion.estimate(chunk(2, 0.0), 0.0) == (Verdict.DUPLICATE, None)
    assert motion.estimate(chunk(1, 0.0), 0.0) == (Verdict.OVERTAKEN, None)
    assert motion.estimate(chunk(3, 0.0, epoch=0), 0.0) == (Verdict.OLD_EPOCH, None)
    assert motion.mirror() == before


def test_a_restarted_motion_goes_on_exactly_where_the_mirror_was() -> None:
    whole, first = new(), new()
    for number in range(6):
        whole.estimate(chunk(number, 0.03 * number), 0.0)
        if number < 3:
            first.estimate(chunk(number, 0.03 * number), 0.0)
    second = StreamMotion.resumed(first.mirror(), NoiseSpec(), 0.8)
    for number in range(2, 6):
        second.estimate(chunk(number, 0.03 * number), 0.0)
    assert second.mirror() == whole.mirror()


def test_a_mirror_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="mirror"):
        StreamMotion.resumed({"epoch": 1}, NoiseSpec(), 0.8)
