"""Two stories of a long stream: what a static scene does to the sinks, and what a RoPE refresh does to attention.

The public code has a fault in each (docs/engine.md). The default here is right; the reference form shows the fault.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shared.engine.model.loading import random_dit_weights
from shared.engine.model.rope import rotate
from shared.engine.stage import Stage
from tests.support.engine import HEIGHT, NANO, WIDTH, item, latents, open_on

ROWS, COLUMNS = HEIGHT // 2, WIDTH // 2


def sinks_after_a_static_scene(*, public_rule: bool, blocks: int = 24) -> Tensor:
    """Nothing moves. Returns the latent frame in every sink place, [blocks of the model, sinks]."""
    torch.set_num_threads(1)
    stage = Stage.load(NANO, random_dit_weights(NANO, range(NANO.layers)), public_rule=public_rule)
    open_on([stage], "still")
    scene = latents(5)
    for block in range(blocks):
        calm = replace(item("still", block, steps=(700,)), noise_scale=0.3)
        stage.run([calm], scene.expand(calm.frames, -1, -1, -1)[None])
    return stage.sinks("still")[0][:, : NANO.sinks]


def test_in_a_static_scene_the_first_sinks_stay_for_good() -> None:
    assert sinks_after_a_static_scene(public_rule=False).tolist() == [[0, 1, 2]] * NANO.layers


def test_the_public_rule_destroys_a_good_sink_in_a_static_scene() -> None:
    """Its test ran against places not yet written, similar to nothing: that sink is evicted once the ring is full."""
    kept = sinks_after_a_static_scene(public_rule=True)
    assert (kept[:, :2] == torch.tensor([0, 1])).all(), "these were written with the first block, before any test"
    assert (kept[:, 2] == 6).all(), (
        "the third sink, as good as the others, gave way to the first frame that did not fit"
    )


def scores(stage: Stage, query: Tensor, position: int) -> Tensor:
    """Attention scores of a query frame at a RoPE position over all that slot 0 holds in its first DiT block."""
    pool = stage._streams.pool(HEIGHT, WIDTH)
    keys = pool.keys[0, stage._streams.slot("a", 0)].flatten(0, 1).unflatten(-1, (NANO.heads, -1))
    turned = rotate(query, stage.model.rope.table([position], 1, ROWS, COLUMNS))[0]
    return torch.einsum("qhd,khd->hqk", turned, keys)


def test_a_refresh_with_rerotated_keys_leaves_attention_as_it_was() -> None:
    torch.set_num_threads(1)
    stage = Stage.random(NANO)
    open_on([stage], "a")
    for block in range(45):
        stage.run([item("a", block)], latents(block, 2 if block == 0 else 1)[None])
    query = torch.randn(1, ROWS * COLUMNS, NANO.heads, NANO.head_dim, generator=torch.Generator().manual_seed(1))
    before, after = 46, NANO.ring - 1
    old = scores(stage, query, before)
    reference = scores(stage, query, after)  # positions go back, the cached keys keep their rotation
    pool = stage._streams.pool(HEIGHT, WIDTH)
    with torch.inference_mode():
        pool.rerotate(stage._streams.slot("a", 0), stage.model.rope.shift(after - before))
    assert torch.allclose(scores(stage, query, after), old, atol=1e-4)
    assert float((reference - old).abs().max()) > 1.0
