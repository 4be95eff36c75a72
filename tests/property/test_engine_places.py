"""The device's choice of ring places, against the plain rings of the plan, over any sequence of writes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.engine.model.places import OldestFirst, PlaceRule, PublicRule
from shared.engine.plan.ring import ReferenceRing, Ring

DEVICE = torch.device("cpu")
THRESHOLD = 0.2


@st.composite
def rings(draw: st.DrawFn) -> tuple[int, int]:
    length = draw(st.integers(2, 8))
    return length, draw(st.integers(0, length - 1))


def drive(
    rule: PlaceRule, slot: int, frames: int, filled: int, ring: int, first: int, likeness: Tensor | None
) -> list[int]:
    """One write of one slot of block 0, as the cache does it; returns the places."""
    slots = torch.tensor([slot])
    plan = rule.plan(slots, frames, [filled])
    places = rule.choose(0, slots, plan[0], likeness, torch.tensor([filled >= ring]))
    rule.written(slots, places[None], (first + torch.arange(frames))[None])
    return places[0].tolist()


@settings(max_examples=150, deadline=None)
@given(shape=rings(), data=st.data())
def test_oldest_first_writes_where_the_plain_ring_does(shape: tuple[int, int], data: st.DataObject) -> None:
    ring, sinks = shape
    rule, plain = OldestFirst(1, 3, ring, sinks, THRESHOLD, DEVICE), Ring(ring, sinks)
    first, filled = 0, 0
    for _ in range(data.draw(st.integers(1, 25))):
        frames = data.draw(st.integers(1, ring if filled == 0 else ring - sinks))
        likeness, hit = None, None
        if frames == 1 and sinks:
            values = data.draw(st.lists(st.floats(0.0, 1.0, width=32), min_size=sinks, max_size=sinks))
            likeness = torch.tensor([values])
            least = min(range(sinks), key=values.__getitem__)
            if filled >= ring and values[least] < torch.tensor(THRESHOLD).item():
                hit = least
        expected = plain.write(first, frames) if hit is None else plain.write_sink(first, hit)
        places = drive(rule, 1, frames, filled, ring, first, likeness)
        assert tuple(places) == expected
        filled = min(filled + frames, ring)
        first += frames
        contents = [None if latent < 0 else latent for latent in rule.latents[0, 1].tolist()]
        assert tuple(contents) == plain.contents
        assert plain.valid == filled
    assert (rule.latents[0, [0, 2]] < 0).all(), "other slots are untouched"
    rule.fork(1, 2)
    assert torch.equal(rule.latents[0, 2], rule.latents[0, 1])
    rule.reset(1)
    assert (rule.latents[0, 1] < 0).all()


@settings(max_examples=150, deadline=None)
@given(shape=rings(), data=st.data())
def test_the_public_rule_evicts_as_the_public_queue_does(shape: tuple[int, int], data: st.DataObject) -> None:
    ring, sinks = shape
    frames = data.draw(st.integers(1, max(1, min(3, (ring - sinks) // 2 or 1))))
    hits: list[int | None] = []
    plain = ReferenceRing(ring, sinks, (lambda _: hits[-1]) if frames == 1 and sinks else None)
    rule = PublicRule(1, 1, ring, sinks, THRESHOLD, DEVICE)
    filled = first = 0
    for tick in range(data.draw(st.integers(1, 25))):
        likeness = None
        hits.append(None)
        if frames == 1 and sinks and tick:
            values = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9]), min_size=sinks, max_size=sinks))
            likeness = torch.tensor([values])
            least = min(range(sinks), key=values.__getitem__)
            hits[-1] = least if values[least] < THRESHOLD else None
        if filled + frames > ring and not plain.queue and hits[-1] is None:
            return  # nothing to evict: the public code has no answer either
        expected = plain.write(first, frames)
        assert tuple(drive(rule, 0, frames, filled, ring, first, likeness)) == expected
        filled = min(filled + frames, ring)
        first += frames


def test_growing_keeps_what_is_held() -> None:
    for rule in (OldestFirst(2, 1, 4, 1, THRESHOLD, DEVICE), PublicRule(2, 1, 4, 1, THRESHOLD, DEVICE)):
        drive_both = torch.tensor([0])
        rule.written(drive_both, torch.tensor([[[0, 1]], [[0, 1]]]), torch.tensor([[5, 6]]))
        rule.grow(5)
        assert rule.latents.shape == (2, 5, 4)
        assert rule.latents[:, 0].tolist() == [[5, 6, -1, -1]] * 2
        assert (rule.latents[:, 1:] < 0).all()
