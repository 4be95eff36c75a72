"""The real engine under hot changes: a stream computes what it computes alone, whoever shares its batches and stages.

Every block of every stream is bound to settings of its own (T, K, noise, seed, prompt, mixture of prompts, re-cache). Alone, a
stream runs block after block through one stage, one item a batch. Together, hypothesis picks which items share the next
batch, and where the DiT blocks are cut into stages.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.engine.plan.items import Item
from shared.engine.plan.noise_controller import step_timesteps
from shared.engine.plan.stream_plan import StreamPlan
from shared.engine.stage import Stage
from tests.support.engine import HEIGHT, NANO, WIDTH, latents, prompt, run

CLOSE = 1e-5
PROMPTS = (1, 2, 3)


@dataclass(frozen=True)
class Wish:
    """What one block is bound to."""

    frames: int = 1
    steps: int = 2
    noise: float = 0.8
    seed: int = 0
    prompt: int = 1
    fading: int = 1
    blend: float = 0.0
    recache: bool = False


WISHES = st.builds(
    Wish,
    frames=st.sampled_from((1, 1, 1, 2, 3)),
    steps=st.integers(1, 4),
    noise=st.sampled_from((0.8, 0.65, 1.0)),
    seed=st.integers(0, 1),
    prompt=st.sampled_from(PROMPTS),
    fading=st.sampled_from(PROMPTS),
    blend=st.sampled_from((0.0, 0.0, 0.5)),
    recache=st.sampled_from((False, False, True)),
)


@dataclass
class Live:
    """A stream under way: wishes not yet bound, inputs of blocks that wait for a later step, and finished x0."""

    plan: StreamPlan
    wishes: deque[Wish]
    later: dict[int, tuple[Item, Tensor]] = field(default_factory=dict)
    made: dict[int, Tensor] = field(default_factory=dict)

    def candidates(self) -> list[tuple[int | None, tuple[int, int]]]:
        """(block, or None for one that enters; its frames and context)."""
        found: list[tuple[int | None, tuple[int, int]]] = [
            (block, (item.frames, item.context)) for block, (item, _) in self.later.items() if self.plan.can_next(item)
        ]
        if self.wishes and self.plan.can_enter(self.wishes[0].steps):
            frames = self._frames(self.wishes[0])
            found.append((None, (frames, self.plan.context_of(frames) if self.wishes[0].recache else 0)))
        return found

    def bind(self, block: int | None) -> tuple[Item, Tensor]:
        """The item and its input."""
        if block is not None:
            item, x = self.later.pop(block)
            return self.plan.next(item), x
        wish = self.wishes.popleft()
        item = self.plan.enter(
            self._frames(wish),
            wish.noise,
            step_timesteps(int(1000 * wish.noise) - 100, NANO.steps[: wish.steps]),
            wish.seed,
            wish.prompt,
            blend_version=wish.fading,
            blend=wish.blend,
            recache=wish.recache,
        )
        return item, latents(sum(map(ord, self.plan.stream)) + item.block, item.frames)

    def _frames(self, wish: Wish) -> int:
        return 2 if self.plan.next_start_frame == 0 else wish.frames


def drive(stages: Sequence[Stage], wishes: dict[str, list[Wish]], picks: Sequence[int]) -> dict[str, dict[int, Tensor]]:
    """Run all blocks; ``picks`` decides which items share each batch. Returns every stream's x0 by block."""
    streams = {name: Live(StreamPlan.for_model(name, 0, NANO), deque(of_stream)) for name, of_stream in wishes.items()}
    for stage, name in itertools.product(stages, streams):
        stage.open(name, HEIGHT, WIDTH)
        for version in PROMPTS:
            stage.set_prompt(name, version, prompt(100 * version + sum(map(ord, name))))
    for pick in itertools.cycle(picks):
        ready = [(name, *found) for name, live in streams.items() for found in live.candidates()]
        if not ready:
            assert not any(live.wishes or live.later for live in streams.values())
            return {name: live.made for name, live in streams.items()}
        first = ready[pick % len(ready)]
        mates = [one for one in ready if one is not first and one[2] == first[2]]
        chosen = [first, *(mate for at, mate in enumerate(mates) if pick >> (at + 2) & 1)]
        bound = [streams[name].bind(block) for name, block, _ in chosen]
        items, x0 = (
            [item for item, _ in bound],
            run(stages, [item for item, _ in bound], torch.stack([x for _, x in bound])),
        )
        for at, item in enumerate(items):
            live = streams[item.stream]
            if live.plan.done(item):
                live.made[item.block] = x0[at]
            else:
                live.later[item.block] = (item, stages[-1].renoise([item], x0[at : at + 1])[0])
    raise AssertionError("no picks")


def stages_cut(cuts: set[int]) -> list[Stage]:
    edges = [0, *sorted(cuts), NANO.layers]
    return [Stage.random(NANO, range(a, b)) for a, b in itertools.pairwise(edges)]


# Shrinking real forwards takes minutes; the picks and wishes of a failure are short enough to read.
@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    wishes=st.dictionaries(st.sampled_from("abc"), st.lists(WISHES, min_size=3, max_size=7), min_size=2, max_size=3),
    cuts=st.sets(st.integers(1, NANO.layers - 1)),
    picks=st.lists(st.integers(0, 255), min_size=3, max_size=40),
)
def test_any_company_split_and_order_of_changes_gives_what_the_stream_has_alone(
    wishes: dict[str, list[Wish]], cuts: set[int], picks: list[int]
) -> None:
    torch.set_num_threads(1)
    together = drive(stages_cut(cuts), wishes, picks)
    for name, of_stream in wishes.items():
        alone = drive(stages_cut(set()), {name: of_stream}, [0])[name]
        assert len(alone) == len(together[name]) == len(of_stream)
        for block, theirs in alone.items():
            assert torch.allclose(together[name][block], theirs, atol=CLOSE, rtol=0), (name, block, of_stream[block])
