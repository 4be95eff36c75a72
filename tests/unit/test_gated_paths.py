"""Paths past the DiT's blocks: what they give, who opens them, that a cut pipeline has them too, and how they are fitted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shared.engine.model.dit import Dit, unpatchify
from shared.engine.model.head import OPEN_FROM, SHUT_BELOW, few_rows, mean_prompt, neighbourhoods, openness
from shared.engine.model.loading import random_dit_weights
from shared.engine.plan.items import Item
from shared.engine.plan.sigmas import sigma_of
from shared.engine.plan.spec import SpecError, spec_of
from shared.engine.plan.stream_plan import StreamPlan
from shared.engine.random import KeyedNoise
from shared.engine.stage import Stage
from training.linear_paths import GateFit, StyleMaps, filters, gates_by_prompt, least_squares, patchify_last
from training.pairs import Pair

PLAIN = spec_of("nano")
SPEC = replace(PLAIN, gated_paths=2)
C = SPEC.latent_channels


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(seed: int, *shape: int) -> torch.Tensor:
    return random(seed, *shape, C, 4, 6)


def model(**gates: float) -> Dit:
    """A DiT whose first path passes x_t on and whose second one is the right-hand neighbour."""
    dit = Dit(SPEC)
    dit.load_state_dict(random_dit_weights(SPEC, range(SPEC.layers), seed=1))
    head = dit.head
    with torch.no_grad():
        paths = head.paths.weight.zero_().view(2, C, 9, C)
        paths[0, :, 4], paths[1, :, 5] = torch.eye(C), torch.eye(C)
        head.gates.weight.zero_()
        head.prompt_gates.weight.zero_()
        bias = head.gates.bias.zero_().view(3, -1)
        bias[0], bias[1], bias[2] = (gates.get(name, 0.0) for name in ("blocks", "own", "right"))
    return dit


def predict(dit: Dit, x: torch.Tensor, timestep: float = 300.0) -> torch.Tensor:
    text = random(2, 1, SPEC.text_len, SPEC.text_dim)
    with torch.no_grad():
        return dit(x, torch.full((1, x.shape[1]), timestep), text)


def gates_of(dit: Dit, values: torch.Tensor) -> torch.Tensor:
    return few_rows(dit.head.prompt_gates, mean_prompt(values))


def test_a_shut_path_changes_nothing_and_an_open_one_adds_x_t_cell_by_cell() -> None:
    x = latents(3, 1, 2)
    shut = predict(model(), x)
    plain = Dit(PLAIN)
    weights = {k: v for k, v in model().state_dict().items() if "paths" not in k and "gates" not in k}
    plain.load_state_dict(weights)
    assert torch.equal(shut, predict(plain, x))
    assert torch.allclose(predict(model(own=2.0), x), shut + 2 * x, atol=1e-5)
    moved = torch.nn.functional.pad(x, (0, 1))[..., 1:]
    assert torch.allclose(predict(model(own=2.0, right=-1.0), x), shut + 2 * x - moved, atol=1e-5)
    assert torch.allclose(predict(model(blocks=-1.0, own=2.0), x), 2 * x, atol=1e-5), "the blocks may be left out"


def test_a_later_step_sees_no_source_and_its_paths_are_shut() -> None:
    x = latents(3, 1, 2)
    assert torch.equal(predict(model(own=2.0), x, 150.0), predict(model(), x, 150.0))
    levels = openness(torch.tensor([0.0, SHUT_BELOW, (SHUT_BELOW + OPEN_FROM) / 2, OPEN_FROM, 1.0]))
    assert levels.tolist() == pytest.approx([0, 0, 0.5, 1, 1])
    # Frames of one clip may be at different steps.
    dit, text = model(own=2.0), random(2, 1, SPEC.text_len, SPEC.text_dim)
    with torch.no_grad():
        mixed = dit(x, torch.tensor([[150.0, 300.0]]), text) - model()(x, torch.tensor([[150.0, 300.0]]), text)
    assert torch.equal(mixed[:, 0], torch.zeros_like(x[:, 0]))
    assert torch.allclose(mixed[:, 1], 2 * x[:, 1], atol=1e-5)


def test_the_prompt_opens_paths_and_two_prompts_half_and_half_open_them_half() -> None:
    dit, x = model(), latents(4, 1, 1)
    with torch.no_grad():
        dit.head.prompt_gates.weight.copy_(random(9, *dit.head.prompt_gates.weight.shape) * 0.1)
        one, other = random(5, 1, 7, SPEC.heads, SPEC.head_dim), random(6, 1, 7, SPEC.heads, SPEC.head_dim)
        half = gates_of(dit, torch.lerp(one, other, 0.5))
        assert torch.allclose(half, (gates_of(dit, one) + gates_of(dit, other)) / 2, atol=1e-5)
        both = gates_of(dit, torch.cat([one, other]))
        assert torch.equal(both[:1], gates_of(dit, one)), "an item's gates do not depend on its company"
    assert not torch.allclose(predict(dit, x), predict(model(), x), atol=0.1)


def test_padding_counts_as_often_as_it_stands_for() -> None:
    """A long prompt's padding is kept once in serving: the gates are those of the whole prompt all the same."""
    spec = replace(SPEC, text_len=200)
    weights = random_dit_weights(spec, range(spec.layers), seed=6)
    text, x = random(7, 200, spec.text_dim) * (torch.arange(200) < 5)[:, None], latents(8, 1, 2)
    stage, plan = Stage.load(spec, weights), StreamPlan.for_model("a", 0, spec)
    stage.open("a", 4, 6)
    stage.set_prompt("a", 1, text)
    item = plan.enter(2, 0.6, (500,), seed=5, prompt_version=1)
    served = stage.run([item], x)
    whole = Dit(spec)
    whole.load_state_dict(weights)
    noisy = KeyedNoise().draw([item], 0, (C, 4, 6)) * item.noise_scale + x * (1 - item.noise_scale)
    with torch.no_grad():
        predicted = whole(noisy, torch.full((1, 2), 500.0), text[None])
        expected = whole.clean(noisy, sigma_of(500, spec.sigma_shift), predicted)
    assert torch.allclose(served, expected, atol=2e-4)


def test_gates_and_values_lie_in_the_same_order() -> None:
    dit, x = model(), latents(5, 1, 1)
    gate = unpatchify(torch.arange(4 * C, dtype=torch.float32).expand(1, 6, -1), 2, 3)
    with torch.no_grad():
        dit.head.gates.bias.view(3, -1)[1] = torch.arange(4 * C) * 1.0
        made = predict(dit, x) - predict(model(), x)
    assert torch.allclose(made, gate * x, atol=1e-3)
    assert torch.equal(unpatchify(patchify_last(x), 2, 3), x)


def test_a_stage_cut_in_two_gives_what_a_whole_one_gives() -> None:
    weights = random_dit_weights(SPEC, range(SPEC.layers), seed=6)
    text = random(7, SPEC.text_len, SPEC.text_dim)
    stages = [Stage.load(SPEC, weights, blocks=run) for run in (range(3), range(1), range(1, 3))]
    for stage in stages:
        stage.open("a", 4, 6)
        stage.set_prompt("a", 1, text)
    whole, first, last = stages
    plans = [StreamPlan.for_model("a", 0, SPEC) for _ in range(2)]
    source = latents(8, 1, 4)
    for start, frames in [(0, 2), (2, 1), (3, 1)]:
        items: list[Item] = [plan.enter(frames, 0.6, (500,), seed=5, prompt_version=1) for plan in plans]
        x = source[:, start : start + frames]
        one = whole.run([items[0]], x)
        two = last.run([items[1]], first.run([items[1]], x))
        assert torch.equal(one, two)
        for plan, item in zip(plans, items, strict=True):
            plan.done(item)


@pytest.mark.parametrize("name", ["gated_paths", "cell_dim"])
def test_a_negative_number_is_refused_and_an_old_spec_has_none(name: str) -> None:
    with pytest.raises(SpecError, match=f"{name} -1"):
        replace(SPEC, **{name: -1})
    old = {key: value for key, value in PLAIN.to_dict().items() if key != name}
    assert getattr(type(PLAIN).from_dict(old), name) == 0


def test_filters_span_what_the_styles_do_to_a_cell() -> None:
    """Two styles that are linear maps of a cell and its neighbours: two paths hold both."""
    truth = random(10, 2, C, 9 * C)
    maps = StyleMaps(3, C)
    for seed in range(30):
        source = latents(20 + seed, 2)
        for style in (0, 1):
            target = (neighbourhoods(source[None]) @ truth[style].T)[0].movedim(-1, 1)
            maps.add(Pair(source, target, style, torch.empty(0)))
    solved = maps.solve(ridge=1e-5)
    assert torch.allclose(solved[:2], truth, atol=0.02)
    assert solved[2].abs().max() == 0, "a style that was never seen"
    found = filters(solved, 2).unflatten(0, (2, C))
    for channel in range(C):
        span = found[:, channel]
        assert torch.allclose(truth[:, channel] @ span.T @ span, truth[:, channel], atol=0.05)


def test_gates_are_what_least_squares_says_for_each_style_and_follow_its_prompts() -> None:
    dit, wanted = model(), random(11, 2, 3, C)
    fit = GateFit(2, C, 2)
    for style in (0, 1):
        gated = random(12 + style, 50, 3, 4 * C)
        left = (gated.unflatten(-1, (4, C)) * wanted[style][:, None]).sum(1).flatten(1)
        fit.add(style, gated, left)
    gates = fit.solve(ridge=1e-6)
    for cell in range(4):
        assert torch.allclose(gates.unflatten(1, (3, 4, C))[:, :, cell], wanted, atol=1e-3)
    prompts = [random(30 + style, 1, SPEC.text_len, SPEC.text_dim).expand(4, -1, -1) for style in (0, 1)]
    gates_by_prompt(dit, prompts, gates, ridge=1e-6)
    for style in (0, 1):
        values = dit.context_kv(prompts[style][:1])[-1][1]
        assert torch.allclose(gates_of(dit, values) + dit.head.gates.bias, gates[style][None], atol=0.05)
    with pytest.raises(RuntimeError):
        least_squares(torch.full((2, 2), float("nan")), torch.zeros(2, 1), 0.0)
