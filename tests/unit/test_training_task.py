"""The training task is what serving does: its mask is the rolling cache, its forward the DiT's, its encoder the module's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.engine.model.dit import Dit
from shared.engine.model.head import CELLS, CELLS_OUT, GATES
from shared.engine.model.loading import load_dit, random_dit_weights
from shared.engine.model.tiny_vae import LEAD, TinyVae, VaeMemory
from shared.engine.plan.items import Item
from shared.engine.plan.noise_controller import first_timestep, step_timesteps
from shared.engine.plan.registry import model_folder
from shared.engine.plan.spec import ModelSpec, spec_of
from shared.engine.plan.stream_plan import StreamPlan
from shared.engine.random import KeyedNoise
from shared.engine.stage import Stage
from training.fast_dit import block_forward, predict, score_bias
from training.linear_decoder import frames_to_cells, start_decoder
from training.linear_encoder import LinearCode, fit, markov_clips, measure
from training.muon import orthogonalise
from training.procedural import make_clip
from training.publish import mean_of, publish
from training.runs import Progress, learning_rate
from training.streaming_task import FIRST, draw_task, frame_positions, look_back, sigmas
from training.train_text import style_codes
from training.warm_start import NormalCode, begin_with, code_of


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_the_mask_is_the_rolling_cache():
    seen = look_back(9, 1, 6, 3)
    rows = [[k for k in range(9) if seen[q, k]] for q in range(9)]
    assert rows[0] == rows[1] == [0, 1]
    assert rows[2] == [0, 1, 2]
    assert rows[5] == [0, 1, 2, 3, 4, 5]
    assert rows[6] == [0, 1, 2, 4, 5, 6]
    assert rows[8] == [0, 1, 2, 6, 7, 8]


def test_a_masked_clip_gives_what_the_served_stream_gives():
    """The proof that training sees what serving does: one step, 8 latent frames, first as a clip, then streamed."""
    spec = spec_of("nano")
    weights = random_dit_weights(spec, range(spec.layers), seed=1)
    model = Dit(spec)
    model.load_state_dict(weights)
    text = torch.randn(spec.text_len, spec.text_dim, generator=torch.Generator().manual_seed(2))
    source = torch.randn(8, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    stage = Stage.load(_fixed_sinks(spec), weights)
    stage.open("a", 4, 6)
    stage.set_prompt("a", 1, text)
    plan = StreamPlan.for_model("a", 0, spec)
    streamed, entered = [], []
    for start, frames in [(0, FIRST), *((f, 1) for f in range(FIRST, 8))]:
        item = plan.enter(frames, 0.5, (400,), seed=5, prompt_version=1)
        streamed.append(stage.run([item], source[None, start : start + frames])[0])
        plan.done(item)
        entered.append(_entry(item, source[start : start + frames]))
    times = torch.full((1, 8), 400.0)
    noisy = torch.cat(entered)[None]
    with torch.no_grad():
        flow = model(noisy, times, text[None], mask=look_back(8, 6, spec.ring, spec.sinks))
    clip = noisy - sigmas(times, spec) * flow
    assert torch.allclose(torch.cat(streamed), clip[0], atol=2e-4)


def _fixed_sinks(spec):
    return replace(spec, sink_threshold=None)


def _entry(item: Item, latents: torch.Tensor) -> torch.Tensor:
    noise = KeyedNoise().draw([item], 0, (16, 4, 6))[0]
    return noise * item.noise_scale + latents * (1 - item.noise_scale)


def test_the_fast_forward_is_the_models_own():
    spec = spec_of("nano")
    model = Dit(spec)
    model.load_state_dict(random_dit_weights(spec, range(spec.layers), seed=4))
    generator = torch.Generator().manual_seed(0)
    latents, text = (
        torch.randn(2, 8, 16, 4, 6, generator=generator),
        torch.randn(2, spec.text_len, spec.text_dim, generator=generator),
    )
    times, mask = torch.full((2, 8), 300.0), look_back(8, 6, spec.ring, spec.sinks)
    with torch.no_grad():
        sigma = sigmas(times, spec)
        fast = predict(model, latents, times, sigma, text, list(range(8)), score_bias(mask), block_forward)
        plain = model(latents, times, text, mask=mask)
    assert (fast - plain).square().mean().sqrt() < 0.03 * plain.square().mean().sqrt()


def test_tasks_stay_within_what_the_plan_allows():
    rng = np.random.default_rng(0)
    spec = spec_of("nano")
    for _ in range(200):
        task = draw_task(rng, spec)
        assert 1 <= task.steps <= len(spec.steps)
        assert list(task.timesteps) == sorted(set(task.timesteps), reverse=True)
        served = step_timesteps(
            first_timestep(task.noise_scale, spec.noise.first_step_margin), spec.steps[: task.steps]
        )
        assert task.timesteps == served, (
            "how much noise there is and what the model is told belong together, in every block"
        )
        assert task.step < task.steps
    assert all(draw_task(rng, spec, fewest=2).steps >= 2 for _ in range(30))
    assert {draw_task(rng, spec, exactly=1).steps for _ in range(30)} == {1}
    for _ in range(50):
        places = frame_positions(rng, 8, spec.rope_refresh_at)
        assert places[:3] == [0, 1, 2]
        assert all(b > a for a, b in zip(places, places[1:], strict=False))
        assert places[-1] < spec.rope_refresh_at


@pytest.mark.parametrize("channels", [16, 48])
def test_the_fitted_encoder_is_one_linear_map_and_the_decoder_starts_as_its_inverse(channels: int):
    torch.manual_seed(0)
    vae = TinyVae((24, 16, 8, 8), channels, channels, shortcut=True)
    video = torch.stack([torch.from_numpy(make_clip(seed, 13, 64, 64)) for seed in range(8)]).float() / 255
    whole = torch.cat([video[:, :1].expand(-1, LEAD, -1, -1, -1), video], 1)
    code = fit(vae, whole)
    latents = code.encode(video)
    with torch.no_grad():
        assert torch.allclose(vae.encode_clip(video), latents, atol=5e-4)
    assert torch.allclose(measure(vae).matrix, code.matrix)
    start_decoder(vae, zip(video.split(2), latents.split(2), strict=True))
    # The best linear map of a cell by itself; its neighbours can only help.
    blocks = frames_to_cells(whole).movedim(1, -1).flatten(0, -2)
    own = latents.movedim(2, -1).flatten(0, -2)
    own = torch.cat([own, torch.ones_like(own[:, :1])], 1)
    alone = (own @ torch.linalg.lstsq(own, blocks).solution - blocks).square().mean()
    with torch.no_grad():
        error = (vae.decode_unclamped(latents, VaeMemory(started=True)) - whole).square().mean()
    assert error < alone
    with pytest.raises(ValueError, match="no shortcut"):
        start_decoder(TinyVae((24, 16, 8, 8), channels, channels), [])


def test_muon_makes_all_directions_equally_long():
    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(-1, 1, 60))
    lengths = torch.linalg.svdvals(orthogonalise(matrix))
    assert lengths.min() > 0.5
    assert lengths.max() < 1.4


def test_the_learning_rate_rises_and_falls_and_a_resumed_run_goes_on():
    assert learning_rate(0.0, 1.0) < learning_rate(0.03, 1.0)
    assert learning_rate(1.0, 1.0) < 0.05
    assert Progress(100, 0).at(25) == 0.25
    assert Progress(100, 1, spent_s=45).at(0) >= 0.75


def test_noise_clips_remember_and_go_together_in_colour():
    clip = markov_clips((4, 8, 3, 64, 64), 3, time=0.8, space=0.9, grey=0.9)
    flat = (clip - 0.5) / 0.2
    assert flat.std() == pytest.approx(1.0, abs=0.1)
    assert (flat[:, 1:] * flat[:, :-1]).mean() == pytest.approx(0.8, abs=0.1)
    assert (flat[..., 1:] * flat[..., :-1]).mean() == pytest.approx(0.9, abs=0.1)
    assert (flat[:, :, 0] * flat[:, :, 1]).mean() == pytest.approx(0.9, abs=0.1)


def test_a_style_that_joins_leaves_the_codes_of_the_others():
    assert torch.equal(style_codes(16, 4, 8)[:12], style_codes(12, 4, 8))
    assert not torch.equal(style_codes(16, 4, 8)[12:], style_codes(16, 4, 8)[:4])


def test_a_dit_begins_with_another_ones_skill_on_a_new_code():
    """On a code that is a rotation of the old one nothing is lost: the new DiT's x0 is the old one's, rotated."""
    torch.manual_seed(0)
    folder = model_folder("rheo-tiny")
    spec, old = code_of(folder)
    turn = torch.linalg.qr(torch.randn(spec.latent_channels, spec.latent_channels))[0]
    scaled = LinearCode(turn @ (old.code.matrix / old.scale[:, None]), turn @ ((old.code.bias - old.mean) / old.scale))
    new = NormalCode(scaled, torch.zeros(spec.latent_channels), torch.ones(spec.latent_channels))
    video = torch.rand(4, 5, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model, before = Dit(spec), load_dit(spec, folder, range(spec.layers), "cpu", torch.float32)
    assert not begin_with(model, new, folder, video), (
        "gates go channel by channel: on another code there are no such paths"
    )
    x, text = torch.randn(1, 2, spec.latent_channels, 4, 6), torch.randn(1, spec.text_len, spec.text_dim)
    times = torch.full((1, 2), 400.0)
    with torch.no_grad():
        whole = before(x, times, text)
        for name, parameter in before.named_parameters():
            if name.startswith((*GATES, *CELLS_OUT)):
                parameter.zero_()
        expected = torch.einsum("oc,bfchw->bfohw", turn, before(x, times, text))
        made = model(torch.einsum("oc,bfchw->bfohw", turn, x), times, text)
    assert (made - expected).square().mean() < 1e-3 * expected.square().mean()
    assert begin_with(model, old, folder, video), "on the same code paths come along"
    with torch.no_grad():
        assert (model(x, times, text) - whole).square().mean() < 1e-3 * whole.square().mean()
    louder = NormalCode(old.code, old.mean, old.scale / 2)
    assert begin_with(model, louder, folder, video), "and on the same code, twice as loud"
    with torch.no_grad():
        assert (model(2 * x, times, text) - 2 * whole).square().mean() < 1e-3 * (2 * whole).square().mean()
    with pytest.raises(ValueError, match="another dim"):
        begin_with(Dit(replace(spec, dim=128)), new, folder, video)


def test_a_dit_that_has_no_cell_mlp_yet_begins_as_the_old_one_was(tmp_path: Path):
    torch.manual_seed(0)
    published = model_folder("rheo-tiny")
    spec = replace(ModelSpec.from_json(published / "spec.json"), cell_dim=0)
    weights = {k: v for k, v in load_file(published / "dit.safetensors").items() if not k.startswith(CELLS)}
    save_file(weights, tmp_path / "dit.safetensors")
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    shutil.copy(published / "vae.safetensors", tmp_path)
    model = Dit(replace(spec, cell_dim=8))
    _, code = code_of(tmp_path)
    assert begin_with(model, code, tmp_path, torch.rand(4, 5, 3, 64, 64)), "gated paths come along all the same"
    x, text = torch.randn(1, 2, spec.latent_channels, 4, 6), torch.randn(1, spec.text_len, spec.text_dim)
    times = torch.full((1, 2), 400.0)
    with torch.no_grad():
        before = load_dit(spec, tmp_path, range(spec.layers), "cpu", torch.float32)(x, times, text)
        assert (model(x, times, text) - before).square().mean() < 1e-3 * before.square().mean()
    assert model.head.cells is not None
    assert model.head.cells.near.weight.abs().max() > 0, "only what comes out is zero"


def test_the_mean_of_two_models_needs_the_same_tensors():
    one, other = {"a": torch.tensor([1.0, 3.0])}, {"a": torch.tensor([3.0, 3.0], dtype=torch.float16)}
    assert mean_of(one, other)["a"].tolist() == [2.0, 3.0]
    with pytest.raises(ValueError, match="no mean"):
        mean_of(one, {"a": torch.zeros(3)})


def test_no_mean_is_published_of_models_for_latents_of_another_loudness(tmp_path: Path):
    there = model_folder("rheo-tiny")
    spec = ModelSpec.from_json(there / "spec.json")
    louder = {"mean": list(spec.latent_shift), "scale": [scale / 2 for scale in spec.latent_scale]}
    (tmp_path / "latents.json").write_text(json.dumps(louder))
    with pytest.raises(ValueError, match="another mean or scale"):
        publish(tmp_path, tmp_path / "model", mean_with=there)
    assert not (tmp_path / "model").exists()


def test_nothing_is_published_where_something_is_missing_or_does_not_fit(tmp_path: Path):
    there, run, folder = model_folder("rheo-tiny"), tmp_path / "run", tmp_path / "model"
    run.mkdir()
    spec = ModelSpec.from_json(there / "spec.json")
    (run / "latents.json").write_text(json.dumps({"mean": spec.latent_shift, "scale": spec.latent_scale}))
    for name in ("vae", "text"):
        shutil.copy(there / f"{name}.safetensors", run)
    with pytest.raises(FileNotFoundError):
        publish(run, folder)
    save_file({"another": torch.zeros(2)}, run / "dit.safetensors")
    with pytest.raises(ValueError, match="no mean"):
        publish(run, folder, mean_with=there)
    assert not folder.exists()
    shutil.copy(there / "dit.safetensors", run)
    publish(run, folder, mean_with=there)
    assert sorted(path.name for path in folder.iterdir()) == [
        "dit.safetensors",
        "spec.json",
        "text.safetensors",
        "vae.safetensors",
    ]
    published, before = load_file(folder / "dit.safetensors"), load_file(there / "dit.safetensors")
    assert all(torch.equal(published[name], before[name]) for name in before)
