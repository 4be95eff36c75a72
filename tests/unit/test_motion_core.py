"""Which chunks get an estimate from motion, from which state, and what a restart goes on from."""

from __future__ import annotations

import msgpack
import pytest

from services.motion.core import MotionCore, Refusal
from shared.contracts.events import LatentsEncoded
from shared.engine.plan.noise_controller import NoiseEstimate, NoiseForm
from shared.engine.plan.spec import NoiseSpec
from tests.support.messages import ref, stamp

SPEC = NoiseSpec()


def chunk(
    number: int, *, epoch: int = 1, rmse: float = 0.05, stream: str = "s1", signature: tuple[float, ...] = ()
) -> LatentsEncoded:
    return LatentsEncoded(
        stamp=stamp(stream, number, epoch), latents=ref(), latent_frames=1, rmse=(0.0, rmse), signature=signature
    )


def estimate(core: MotionCore, message: LatentsEncoded, now: float = 0.0) -> NoiseEstimate:
    result = core.estimate(message, now)
    assert isinstance(result, NoiseEstimate), result
    return result


@pytest.fixture
def core() -> MotionCore:
    core = MotionCore()
    assert core.take("s1", 1, 0.8, SPEC) is None
    return core


def test_a_still_picture_gets_all_the_noise_and_a_moving_one_less(core: MotionCore) -> None:
    still = estimate(core, chunk(0, rmse=0.0))
    assert (still.motion, still.first_timestep) == (0.0, 700)
    assert still.noise_scale == pytest.approx(0.8)
    moving = estimate(core, chunk(1, rmse=0.2))
    assert moving.motion == 1.0
    assert moving.noise_scale == pytest.approx(0.9 * 0.7 + 0.1 * 0.8)
    again = estimate(core, chunk(2, rmse=0.2))
    assert again.noise_scale == pytest.approx(0.9 * 0.7 + 0.1 * moving.noise_scale)


def test_a_chunk_counts_once(core: MotionCore) -> None:
    first = estimate(core, chunk(0, rmse=0.2))
    assert core.estimate(chunk(0, rmse=0.2), 0.0) is Refusal.DUPLICATE
    assert core.streams["s1"].controller.noise_scale == first.noise_scale
    assert core.counts == {"duplicate": 1}


def test_an_overtaken_chunk_is_passed_on_with_the_newest_noise_and_changes_nothing(core: MotionCore) -> None:
    estimate(core, chunk(0))
    newest = estimate(core, chunk(2, rmse=0.2))
    late = estimate(core, chunk(1, rmse=0.0))
    assert late == newest
    assert core.streams["s1"].controller.noise_scale == newest.noise_scale
    assert core.estimate(chunk(1), 0.0) is Refusal.DUPLICATE
    assert core.counts["overtaken"] == 1


def test_streams_do_not_touch_each_other(core: MotionCore) -> None:
    core.take("s2", 1, 0.8, SPEC)
    for number in range(5):
        estimate(core, chunk(number, rmse=0.2))
    assert estimate(core, chunk(0, rmse=0.0, stream="s2")).noise_scale == pytest.approx(0.8)


def test_an_older_epoch_is_refused_and_a_newer_one_is_not_known_yet(core: MotionCore) -> None:
    core.take("s1", 3, 0.8, SPEC)
    assert core.estimate(chunk(0, epoch=2), 0.0) is Refusal.OLD_EPOCH
    assert core.estimate(chunk(0, epoch=4), 0.0) is Refusal.UNKNOWN_STREAM
    assert core.take("s1", 2, 0.5, SPEC) is Refusal.OLD_EPOCH
    assert core.streams["s1"].controller.s0 == 0.8
    assert estimate(core, chunk(0, epoch=3))


def test_a_new_epoch_keeps_the_controller_and_counts_its_chunks_anew(core: MotionCore) -> None:
    moving = [estimate(core, chunk(number, rmse=0.2)) for number in range(3)][-1]
    core.take("s1", 2, 0.8, SPEC)
    after = estimate(core, chunk(1, epoch=2, rmse=0.2))
    assert after.noise_scale == pytest.approx(0.9 * 0.7 + 0.1 * moving.noise_scale)


def test_taking_again_changes_the_noise_from_the_next_chunk_on(core: MotionCore) -> None:
    estimate(core, chunk(0, rmse=0.0))
    core.take("s1", 1, 0.4, SPEC)
    assert estimate(core, chunk(1, rmse=0.0)).noise_scale == pytest.approx(0.9 * 0.4 + 0.1 * 0.8)


def test_chunks_of_a_stream_that_left_are_refused_until_it_is_taken_again(core: MotionCore) -> None:
    estimate(core, chunk(0))
    core.leave("s1", 1, drain=False, now=0.0)
    assert core.has_left("s1", 1)
    assert core.estimate(chunk(1), 0.0) is Refusal.LEFT
    assert core.take("s1", 1, 0.8, SPEC) is None, "another stream of the same name"
    assert not core.has_left("s1", 1)
    assert estimate(core, chunk(0))


def test_an_older_leave_does_not_end_a_newer_epoch(core: MotionCore) -> None:
    core.take("s1", 2, 0.8, SPEC)
    core.leave("s1", 1, drain=False, now=0.0)
    assert core.knows("s1", 2)


def test_a_draining_stream_goes_on_until_its_chunks_have_ceased(core: MotionCore) -> None:
    core.leave("s1", 1, drain=True, now=100.0)
    estimate(core, chunk(0), now=120.0)
    assert core.forget_idle(145.0, 30.0, 600.0) == []
    assert core.forget_idle(151.0, 30.0, 600.0) == ["s1"]
    assert core.estimate(chunk(1), 152.0) is Refusal.LEFT


def test_a_stream_that_is_idle_for_long_is_forgotten_but_may_come_back(core: MotionCore) -> None:
    estimate(core, chunk(0), now=10.0)
    assert core.forget_idle(600.0, 30.0, 600.0) == []
    assert core.forget_idle(611.0, 30.0, 600.0) == ["s1"]
    assert core.estimate(chunk(1), 612.0) is Refusal.UNKNOWN_STREAM
    assert not core.has_left("s1", 1)


def test_a_restart_goes_on_exactly_where_the_mirror_was(core: MotionCore) -> None:
    for number in range(7):
        estimate(core, chunk(number, rmse=0.03 * number))
    stored = msgpack.unpackb(msgpack.packb(core.streams["s1"].mirror()))
    again = MotionCore()
    assert again.take("s1", 1, 0.8, SPEC, stored) is None
    assert again.counts == {"resumed": 1}
    assert again.estimate(chunk(6), 0.0) is Refusal.DUPLICATE
    assert estimate(again, chunk(7, rmse=0.1)) == estimate(core, chunk(7, rmse=0.1))


def test_the_latent_form_resumes_with_its_window() -> None:
    core = MotionCore(NoiseForm.LATENT)
    core.take("s1", 1, 0.8, SPEC)
    for number in range(4):
        estimate(core, chunk(number, signature=(0.1 * number, 0.2, 0.3)))
    again = MotionCore(NoiseForm.LATENT)
    again.take("s1", 1, 0.8, SPEC, msgpack.unpackb(msgpack.packb(core.streams["s1"].mirror())))
    last = chunk(4, signature=(0.9, 0.2, 0.3))
    assert estimate(again, last) == estimate(core, last)


@pytest.mark.parametrize(
    "mirror", [None, 3, {}, {"epoch": 1}, {"epoch": "x", "chunk": 1, "state": {}}, {"state": None}]
)
def test_a_mirror_that_is_none_begins_afresh(mirror: object) -> None:
    core = MotionCore()
    assert core.take("s1", 1, 0.6, SPEC, mirror) is None
    assert estimate(core, chunk(0, rmse=0.0)).noise_scale == pytest.approx(0.6)


def test_a_mirror_of_another_epoch_gives_its_controller_only(core: MotionCore) -> None:
    estimate(core, chunk(9, rmse=0.2))
    again = MotionCore()
    again.take("s1", 2, 0.8, SPEC, core.streams["s1"].mirror())
    assert estimate(again, chunk(3, epoch=2, rmse=0.2)).noise_scale < 0.71


def test_the_number_of_streams_is_bounded() -> None:
    core = MotionCore(max_streams=2)
    assert [core.take(f"s{i}", 1, 0.8, SPEC) for i in range(3)] == [None, None, Refusal.FULL]
