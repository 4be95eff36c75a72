"""What a training step is made of: pairs that are used again, errors weighed by style, several processes' one step."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import ProcessRaisedException

from training.filters import NO_STYLE
from training.linear_encoder import LinearCode
from training.pairs import Pair, PairSource
from training.prompts import all_styles, names_of
from training.runs import ClipPool
from training.shelf import Shelf
from training.side_by_side import Fellows, side_by_side
from training.style_weights import LIMITS, POWER, StyleWeights


class Drawn:
    """Couples whose pairs are named by number: 2n and 2n + 1 are of one clip."""

    def __init__(self) -> None:
        self.couples = 0

    def __call__(self, couples: int) -> list[Pair]:
        nothing = torch.empty(0)
        first, self.couples = self.couples, self.couples + couples
        return [Pair(nothing, nothing, n, nothing) for n in range(2 * first, 2 * (first + couples))]


def test_couples_stay_together_and_are_used_as_often_as_asked() -> None:
    drawn, rng, used = Drawn(), np.random.default_rng(0), Counter[int]()
    shelf = Shelf(drawn, places=20, uses=4)
    for _ in range(1000):
        styles = [pair.style for pair in shelf.take(rng, 3)]
        assert len(styles) == 6
        assert all(b == a + 1 and a % 2 == 0 for a, b in zip(styles[::2], styles[1::2], strict=True))
        assert len(set(styles)) == 6
        used.update(styles[::2])
    assert 3 * 1000 / drawn.couples == pytest.approx(4, rel=0.05)
    old = [count for couple, count in used.items() if couple < 2 * (drawn.couples - 20)]
    assert np.mean(old) == pytest.approx(4, rel=0.1)
    assert len(used) > 0.97 * (drawn.couples - 20), "hardly a couple is thrown away unseen"


def test_the_first_batches_are_all_new_and_a_shelf_of_no_places_still_serves() -> None:
    drawn, rng = Drawn(), np.random.default_rng(1)
    shelf = Shelf(drawn, places=6, uses=4)
    shelf.take(rng, 3)
    shelf.take(rng, 3)
    assert drawn.couples == 6
    assert len(Shelf(Drawn(), places=0, uses=1).take(rng, 2)) == 4


def test_errors_count_by_their_ratios() -> None:
    weights = StyleWeights(4)
    assert weights.of([0, 3]).tolist() == [1.0, 1.0], "nothing is known yet"
    for _ in range(400):
        weights.note([0, 1, 2], torch.tensor([8.0, 2.0, 0.5]))
    loud, middle, soft, unseen = weights.of([0, 1, 2, 3]).tolist()
    assert middle == pytest.approx(1.0)
    assert loud == pytest.approx(0.25**POWER)
    assert soft == pytest.approx(4**POWER)
    assert unseen == 1.0
    # A style whose error has halved counts for more, but not at once.
    weights.note([0], torch.tensor([4.0]))
    assert loud < weights.of([0]).item() < 1.05 * loud
    weights.note([2] * 400, torch.full((400,), 1e-6))
    assert weights.of([2]).item() == pytest.approx(LIMITS[1]), "one easy style does not drown the others"


def learn(args: Namespace, fellows: Fellows) -> None:
    """One step on a sum of this process's numbers; what came out goes to a file of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(fellows.rank)
    model = torch.nn.Linear(2, 1, bias=False)
    fellows.begin_alike(model)
    begun = model.weight.detach().clone()
    model(torch.tensor([[1.0, 10.0 * (fellows.rank + 1)]])).sum().backward()
    progress = fellows.agree(model.parameters(), 0.25 * (fellows.rank + 1))
    gradient = model.weight.grad
    assert gradient is not None
    known = fellows.mean_known(torch.tensor([[0.0, 2.0, 6.0], [0.0, 0.0, 2.0]][fellows.rank]))
    if args.fails and not fellows.first:
        raise ValueError("this one cannot")
    seen = {"weight": begun.tolist(), "gradient": gradient.tolist(), "progress": progress, "known": known.tolist()}
    (args.out / f"{fellows.rank}.json").write_text(json.dumps(seen))


def test_two_processes_begin_alike_and_take_the_mean_step(tmp_path: Path) -> None:
    side_by_side(2, learn, Namespace(out=tmp_path, fails=False))
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    assert one["gradient"] == [[1.0, 15.0]]
    assert one["progress"] == 0.375
    assert one["known"] == [0.0, 2.0, 4.0], "who has never seen a style has no say in its error"
    side_by_side(1, learn, Namespace(out=tmp_path, fails=False))
    assert json.loads((tmp_path / "0.json").read_text())["gradient"] == [[1.0, 10.0]]


def test_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match="this one cannot"):
        side_by_side(2, learn, Namespace(out=tmp_path, fails=True))


def test_styles_to_draw_more_often_are_known_ones() -> None:
    assert names_of("pencil, pixel art,") == ("pencil", "pixel art")
    with pytest.raises(argparse.ArgumentTypeError, match="no such pencl; known: pencil"):
        names_of("pencl")
    with pytest.raises(argparse.ArgumentTypeError, match="no such none"):
        names_of("pencil, none")


def test_a_style_that_a_run_is_about_is_drawn_more_often() -> None:
    code, pool = cast("LinearCode", None), cast("ClipPool", None)  # only shares are asked for
    styles, one = all_styles(), torch.ones(48)

    def share(style: str, *often: str) -> float:
        source = PairSource(code, pool, 0 * one, one, styles, often=often)
        rng = np.random.default_rng(0)
        return sum(source.style(rng) == styles.index(style) for _ in range(4000)) / 4000

    assert share("pixel art", "pixel art") > 2 * share("pixel art")
    assert share("pixel art", "pixel art", "pixel art") > 1.5 * share("pixel art", "pixel art")
    assert share("neon", "pixel art") == pytest.approx(1.5 * share("thermal", "pixel art"), rel=0.25)
    assert share(NO_STYLE, "pixel art") == pytest.approx(0.08, abs=0.015)
