"""The noise controller: a still picture keeps s₀, motion lowers the noise, and the steps stay usable."""

from __future__ import annotations

import json
import random
from itertools import pairwise

import pytest

from shared.engine.plan.noise_controller import MIN_TIMESTEP, NoiseController, NoiseForm, first_timestep, step_timesteps
from shared.engine.plan.sigmas import sigma_of
from shared.engine.plan.spec import NoiseSpec

STEPS = (700, 500, 400, 200)


def test_a_still_picture_keeps_s0_and_starts_at_700():
    controller = NoiseController()
    for _ in range(50):
        estimate = controller.update_pixels([0.0] * 4)
    assert estimate.noise_scale == pytest.approx(0.8)
    assert (estimate.motion, estimate.first_timestep) == (0.0, 700)


def test_full_motion_takes_a_tenth_off_and_smoothing_lags_by_a_tenth():
    controller = NoiseController()
    first = controller.update_pixels([0.0, 0.5, 0.0, 0.0])  # one cut is enough: the largest frame counts
    assert first.motion == 1.0
    assert first.noise_scale == pytest.approx(0.9 * 0.7 + 0.1 * 0.8)
    assert first.first_timestep == 610
    second = controller.update_pixels([0.5] * 4)
    assert second.noise_scale == pytest.approx(0.9 * 0.7 + 0.1 * first.noise_scale)
    half = NoiseController().update_pixels([0.1])
    assert half.motion == pytest.approx(0.5)
    assert half.noise_scale == pytest.approx(0.9 * 0.75 + 0.08)


def test_a_broken_measurement_counts_as_no_motion():
    assert NoiseController().update_pixels([float("nan"), float("inf")]).noise_scale == pytest.approx(0.8)
    assert NoiseController().update_pixels([]).motion == 0.0


def test_the_latent_form_averages_a_window_and_forgets_what_left_it():
    controller = NoiseController(form=NoiseForm.LATENT)
    assert controller.update([9.9], [0.0] * 8).motion == 0.0  # the first signature has nothing to differ from
    assert controller.update([9.9], [0.2] * 8).motion == pytest.approx(1.0)
    assert controller.update([9.9], [0.2] * 8).motion == pytest.approx(0.5)
    for _ in range(2):
        controller.update([9.9], [0.2] * 8)
    estimate = controller.update([9.9], [0.2] * 8)  # the jump has left the window of four
    assert estimate.motion == 0.0


def test_the_latent_form_goes_from_s_max_to_s_min_and_moves_with_the_streams_own_s0():
    spec = NoiseSpec(s0=0.8, s_max=0.9, s_min=0.5, smoothing=1.0)
    still, moving = [0.0] * 4, [1.0] * 4
    model = NoiseController(spec, form=NoiseForm.LATENT)
    assert model.update_latents(still).noise_scale == pytest.approx(0.9)
    assert model.update_latents(moving).noise_scale == pytest.approx(0.5)
    own = NoiseController(spec, s0=0.6, form=NoiseForm.LATENT)
    assert own.update_latents(still).noise_scale == pytest.approx(0.7)
    assert own.update_latents(moving).noise_scale == pytest.approx(0.3)


def test_a_new_size_starts_the_latent_window_anew():
    controller = NoiseController(form=NoiseForm.LATENT)
    controller.update_latents([0.0] * 8)
    controller.update_latents([1.0] * 8)
    assert controller.update_latents([5.0] * 12).motion == 0.0


def test_without_a_signature_the_latent_form_uses_the_pixels():
    assert NoiseController(form=NoiseForm.LATENT).update([0.4]).motion == 1.0


@pytest.mark.parametrize("form", NoiseForm)
def test_another_instance_goes_on_exactly_where_the_mirror_says(form: NoiseForm):
    rng = random.Random(4)
    chunks = [([rng.random() / 4 for _ in range(4)], [rng.random() for _ in range(6)]) for _ in range(12)]
    alone, moved = NoiseController(s0=0.65, form=form), NoiseController(s0=0.65, form=form)
    for index, chunk in enumerate(chunks):
        if index % 3 == 2:
            moved = NoiseController.from_state(json.loads(json.dumps(moved.state())))
        assert moved.update(*chunk) == alone.update(*chunk)


def test_s0_may_change_while_streaming():
    controller = NoiseController()
    controller.update_pixels([0.0])
    controller.set_s0(0.4)
    assert controller.update_pixels([0.0]).noise_scale == pytest.approx(0.9 * 0.4 + 0.1 * 0.8)
    with pytest.raises(ValueError, match="from 0 to 1"):
        controller.set_s0(1.2)


def test_state_of_something_else_is_refused():
    with pytest.raises(ValueError, match="noise controller"):
        NoiseController.from_state({"previous": 0.5})


@pytest.mark.parametrize("s0", [0.0, 0.02, 0.3, 1.0])
def test_every_s0_gives_a_noise_scale_and_a_timestep_that_can_run(s0: float):
    controller = NoiseController(s0=s0)
    for rmse in (0.0, 0.05, 3.0, 0.0):
        estimate = controller.update_pixels([rmse])
        assert 0.0 <= estimate.noise_scale <= 1.0
        assert MIN_TIMESTEP <= estimate.first_timestep <= 900


def test_first_timestep_is_a_hundred_below_the_noise():
    assert [first_timestep(s) for s in (0.8, 0.71, 0.7999, 0.0)] == [700, 610, 699, MIN_TIMESTEP]


def test_the_models_steps_stay_as_they_are_while_they_decrease():
    assert step_timesteps(700, STEPS) == (700, 500, 400, 200)
    assert step_timesteps(610, STEPS[:2]) == (610, 500)
    assert step_timesteps(655, STEPS[:1]) == (655,)


def test_a_small_first_step_pulls_the_later_ones_along():
    assert step_timesteps(350, STEPS) == (350, 250, 200, 100)
    assert step_timesteps(0, STEPS) == (40, 30, 20, 10)


@pytest.mark.parametrize("steps", range(1, 5))
def test_whatever_the_first_step_the_noise_levels_strictly_decrease(steps: int):
    for first in range(-200, 1001):
        timesteps = step_timesteps(first, STEPS[:steps])
        assert len(timesteps) == steps
        assert timesteps[-1] >= MIN_TIMESTEP
        levels = [sigma_of(timestep) for timestep in timesteps]
        assert all(a > b for a, b in pairwise(timesteps))
        assert all(a > b for a, b in pairwise(levels)), timesteps
        if first > 510:
            assert timesteps[1:] == STEPS[1:steps]


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        step_timesteps(700, ())
