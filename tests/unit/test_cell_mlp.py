"""The MLP over cells behind the DiT's blocks: what a cell sees, where its values go, who gates them, and a cut pipeline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as fn

from shared.engine.model.dit import Dit
from shared.engine.model.head import by_token, neighbourhoods
from shared.engine.model.loading import random_dit_weights
from shared.engine.plan.spec import spec_of
from shared.engine.plan.stream_plan import StreamPlan
from shared.engine.stage import Stage

PLAIN = spec_of("nano")
C = PLAIN.latent_channels
SPEC = replace(PLAIN, cell_dim=C)
OPEN, SHUT = 30.0, -30.0  # through a sigmoid: 1 and 0


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(own: float = 0.0, right: float = 0.0, gate: float = OPEN) -> Dit:
    """Its cell MLP gives ``own`` times x_t's cell and ``right`` times the one to the right of it, if its gate is open."""
    dit = Dit(SPEC)
    dit.load_state_dict(random_dit_weights(SPEC, range(SPEC.layers), seed=1))
    assert dit.head.cells is not None
    with torch.no_grad():
        for parameter in dit.head.cells.parameters():
            parameter.zero_()
        near = dit.head.cells.near.weight.view(2, C, 9, C)
        near[0, :, 4], near[0, :, 5] = own * torch.eye(C), right * torch.eye(C)
        dit.head.cells.token.bias.view(4, 2, C)[:, 1] = gate
        dit.head.cells.out.weight[:, :C] = torch.eye(C)
    return dit


def predict(dit: Dit, x: torch.Tensor, timestep: float = 300.0) -> torch.Tensor:
    with torch.no_grad():
        return dit(x, torch.full((1, x.shape[1]), timestep), random(2, 1, SPEC.text_len, SPEC.text_dim))


@pytest.mark.parametrize("timestep", [300.0, 50.0])
def test_an_open_gate_lets_a_cell_and_its_neighbours_in_at_every_step(timestep: float) -> None:
    x, plain = random(3, 1, 2, C, 4, 6), Dit(PLAIN)
    plain.load_state_dict({k: v for k, v in model().state_dict().items() if ".cells." not in k})
    without = predict(plain, x, timestep)
    assert torch.equal(predict(model(own=1.0, gate=SHUT), x, timestep), without), "a shut gate"
    assert torch.allclose(predict(model(own=2.0), x, timestep), without + 2 * x, atol=1e-4)
    moved = fn.pad(x, (0, 1))[..., 1:]
    assert torch.allclose(predict(model(own=2.0, right=-1.0), x, timestep), without + 2 * x - moved, atol=1e-4)


def test_cells_are_told_apart_within_their_token() -> None:
    cells = torch.arange(24.0).view(1, 1, 4, 6, 1)
    assert by_token(cells)[0, :, :, 0].tolist() == [
        [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]
    ]  # fmt: skip
    dit, x = model(own=1.0, gate=SHUT), random(4, 1, 1, C, 4, 6)
    without = predict(dit, x)
    with torch.no_grad():
        dit.head.cells.token.bias.view(4, 2, C)[2, 1] = OPEN  # type: ignore[union-attr]
    added = predict(dit, x) - without
    lower_left = torch.zeros_like(x)
    lower_left[..., 1::2, 0::2] = x[..., 1::2, 0::2]
    assert torch.allclose(added, lower_left, atol=1e-4)


def test_the_prompt_opens_gates_and_an_items_values_do_not_depend_on_its_company() -> None:
    dit, x = model(own=1.0, gate=SHUT), random(5, 2, 1, C, 4, 6)
    assert dit.head.cells is not None
    prompt, tokens = random(6, 2, SPEC.dim), random(7, 2, 6, SPEC.dim)
    with torch.no_grad():
        dit.head.cells.prompt.weight.view(4, C, SPEC.dim)[1] = 20 * random(8, C, SPEC.dim)
        near = neighbourhoods(x)
        both = dit.head.cells(tokens, near, prompt)
        assert torch.equal(both[:1], dit.head.cells(tokens[:1], near[:1], prompt[:1]))
        gate = (SHUT + prompt @ dit.head.cells.prompt.weight.view(4, C, SPEC.dim)[1].T).sigmoid()
    expected = by_token(x.movedim(2, -1)) * gate[:, None, None]
    assert torch.allclose(both, expected.flatten(2), atol=1e-5)


def test_the_second_layer_gates_what_the_first_one_found_by_prompt_or_by_itself() -> None:
    dit, x = model(own=1.0), random(9, 1, 1, C, 4, 6)
    cells = dit.head.cells
    assert cells is not None
    with torch.no_grad():
        cells.out.weight.zero_()[:, C:] = torch.eye(C)
        cells.mix.weight[:C], cells.mix.bias[C:] = torch.eye(C), OPEN
        tokens, near, prompt = random(7, 1, 6, SPEC.dim), neighbourhoods(x), random(6, 1, SPEC.dim)
        own = by_token(x.movedim(2, -1)).flatten(2)
        assert torch.allclose(cells(tokens, near, prompt), own, atol=1e-4)
        cells.mix.bias[C:] = 0
        cells.prompt.weight.view(4, C, SPEC.dim)[3] = random(8, C, SPEC.dim)
        gate = (prompt @ random(8, C, SPEC.dim).T).sigmoid()
        assert torch.allclose(cells(tokens, near, prompt), own * gate.repeat(1, 4), atol=1e-4)
        cells.prompt.weight.zero_()
        cells.mix.weight[C:] = torch.eye(C)
        assert torch.allclose(cells(tokens, near, prompt), fn.silu(own), atol=1e-4)


def test_a_stage_cut_in_two_gives_what_a_whole_one_gives() -> None:
    spec = replace(SPEC, gated_paths=2)
    weights = random_dit_weights(spec, range(spec.layers), seed=6)
    stages = [Stage.load(spec, weights, blocks=run) for run in (range(3), range(1), range(1, 3))]
    for stage in stages:
        stage.open("a", 4, 6)
        stage.set_prompt("a", 1, random(7, spec.text_len, spec.text_dim))
    whole, first, last = stages
    plans = [StreamPlan.for_model("a", 0, spec) for _ in range(2)]
    source = random(8, 1, 4, C, 4, 6)
    for start, frames in [(0, 2), (2, 1), (3, 1)]:
        items = [plan.enter(frames, 0.6, (500,), seed=5, prompt_version=1) for plan in plans]
        x = source[:, start : start + frames]
        assert torch.equal(whole.run([items[0]], x), last.run([items[1]], first.run([items[1]], x)))
        for plan, item in zip(plans, items, strict=True):
            plan.done(item)
