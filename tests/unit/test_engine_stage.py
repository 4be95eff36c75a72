"""A stage's promises: what an item gives depends on the item and its slots, not on its company or on the split."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.worker.roles.stage import StageRole
from shared.engine.model import kv_cache
from shared.engine.model.dit import MENDING, STEEPNESS
from shared.engine.model.head import openness
from shared.engine.model.kv_cache import NoSlotError
from shared.engine.model.loading import random_dit_weights
from shared.engine.plan.items import SlotOp, SlotOpKind
from shared.engine.plan.sigmas import sigma_of
from shared.engine.plan.spec import Prediction
from shared.engine.stage import Stage, StageError
from tests.support.engine import HEIGHT, NANO, WIDTH, item, latents, open_on, prompt, run, stages_of, with_ops

CLOSE = 1e-5


def stream_alone(name: str, blocks: int, stages: int = 1) -> list[Tensor]:
    """x0 of every block at K = 1, one item per batch."""
    pipe = stages_of(count=stages)
    open_on(pipe, name)
    return [run(pipe, [item(name, b, steps=(700,))], latents(b, 2 if b == 0 else 1)[None])[0] for b in range(blocks)]


@pytest.mark.parametrize("count", [2, 3])
def test_a_split_model_computes_what_the_whole_one_does(count: int) -> None:
    whole, split = stream_alone("s", 9), stream_alone("s", 9, count)
    for ours, theirs in zip(whole, split, strict=True):
        assert torch.allclose(ours, theirs, atol=CLOSE, rtol=0)


def test_the_wire_between_stages_carries_the_noisy_latents_exactly_even_in_bfloat16() -> None:
    first, last = stages_of(count=2, dtype=torch.bfloat16)
    noisy = latents(3, 2)[None]
    hidden = torch.zeros(1, 2 * HEIGHT * WIDTH // 4, NANO.dim, dtype=torch.bfloat16)
    wire = first._pack(hidden, noisy)
    assert wire.shape[-1] == first.wire_width
    assert wire.dtype == torch.bfloat16
    assert torch.equal(last._unpack(wire, HEIGHT // 2, WIDTH // 2)[1], noisy)


def test_a_stream_gives_the_same_alone_and_among_others_in_any_order() -> None:
    names = ["a", "b", "c", "d"]
    alone = {name: stream_alone(name, 9) for name in names}
    pipe = stages_of()
    open_on(pipe, *names)
    # Stream c joins three blocks late, so that the batch mixes full rings and filling ones.
    late = {"c": 3}
    for tick in range(9):
        due = [(name, tick - late.get(name, 0)) for name in reversed(names) if tick >= late.get(name, 0)]
        for frames in (1, 2):
            batch = [(n, b) for n, b in due if (2 if b == 0 else 1) == frames]
            if not batch:
                continue
            x = torch.stack([latents(b, frames) for _, b in batch])
            out = run(pipe, [item(n, b, steps=(700,)) for n, b in batch], x)
            for (name, block), x0 in zip(batch, out, strict=True):
                assert torch.allclose(x0, alone[name][block], atol=CLOSE, rtol=0), (name, block)


def test_streams_of_one_model_have_their_own_prompt_noise_and_cache() -> None:
    pipe = stages_of()
    open_on(pipe, "a", "b")
    x = torch.stack([latents(0, 2)] * 2)
    out = run(pipe, [item("a", 0), item("b", 0)], x)
    assert not torch.allclose(out[0], out[1], atol=1e-3), "the prompts differ"
    other = run(pipe, [item("a", 0), replace(item("a", 0), seed=12, stream="b")], x)
    assert torch.allclose(other[0], out[0], atol=CLOSE)
    assert not torch.allclose(other[1], out[1], atol=1e-3), "the seeds differ"


def test_a_later_step_takes_its_input_as_it_is_and_the_last_step_has_nothing_to_renoise() -> None:
    (stage,) = stages_of()
    open_on([stage], "a")
    entering = item("a", 0)
    x0 = stage.run([entering], latents(0, 2)[None])
    again = stage.renoise([entering], x0)
    assert again.shape == x0.shape
    sigma = 500 / 1000
    assert float((again - (1 - sigma) * x0).std()) == pytest.approx(sigma, rel=0.1), "fresh noise of σ(500)"
    second = entering.next_step(0, entering.ops)
    assert torch.allclose(stage.run([second], again), stage.run([second], again), atol=CLOSE)
    with pytest.raises(StageError, match="no step left"):
        stage.renoise([second], x0)


def test_full_noise_hides_the_source_and_none_keeps_it() -> None:
    (stage,) = stages_of()
    open_on([stage], "a")
    text_to_video = replace(item("a", 0), noise_scale=1.0)
    assert torch.equal(stage.run([text_to_video], latents(0, 2)[None]), stage.run([text_to_video], latents(1, 2)[None]))
    seen = replace(item("a", 0), noise_scale=0.5)
    assert not torch.equal(stage.run([seen], latents(0, 2)[None]), stage.run([seen], latents(1, 2)[None]))


def test_a_model_that_predicts_x0_gives_it_whole_through_much_noise_and_moves_x_t_through_little() -> None:
    flow, direct = stages_of(), stages_of(replace(NANO, prediction=Prediction.X0))
    for pipe in (flow, direct):
        open_on(pipe, "a")
    x = latents(0, 2)[None]
    for time in (700, 300, 150, 20):
        sigma = sigma_of(time, NANO.sigma_shift)
        whole = float(openness(torch.tensor(sigma)))
        share = whole + (1 - whole) * min(1.0, sigma / MENDING) ** STEEPNESS
        later = replace(item("a", 0, steps=(900, time)), step=1)
        predicted = (x - flow[0].run([later], x)) / sigma
        kept = (1 - share) * x / (1 - sigma) if share < 1 else torch.zeros_like(x)
        assert torch.allclose(direct[0].run([later], x), kept + share * predicted, atol=CLOSE)


def test_a_forked_slot_goes_on_as_its_source_did() -> None:
    pipe = stages_of()
    open_on(pipe, "a")
    for block in range(7):
        run(pipe, [item("a", block)], latents(block, 2 if block == 0 else 1)[None])
    forked = with_ops(item("a", 7, slot=3), SlotOp(SlotOpKind.FORK, 3, source=0))
    copy = run(pipe, [forked], latents(7)[None])
    assert torch.allclose(copy, run(pipe, [item("a", 7)], latents(7)[None]), atol=CLOSE)
    assert torch.equal(pipe[0].sinks("a")[3], pipe[0].sinks("a")[0])


def test_rerotated_keys_make_a_later_start_frame_look_like_an_earlier_one() -> None:
    def last_block(shift: int) -> Tensor:
        pipe = stages_of()
        open_on(pipe, "a")
        for block in range(8):
            run(pipe, [item("a", block)], latents(block, 2 if block == 0 else 1)[None])
        moved = replace(item("a", 8), start_frame=9 + shift)
        ops = (SlotOp(SlotOpKind.REROTATE, 0, frames=shift),) if shift else ()
        return run(pipe, [with_ops(moved, *ops)], latents(8)[None])

    assert torch.allclose(last_block(0), last_block(-4), atol=CLOSE)
    assert torch.allclose(last_block(0), last_block(30), atol=CLOSE)


def test_reset_and_reopen_leave_nothing_behind() -> None:
    fresh = stream_alone("a", 3)
    pipe = stages_of()
    open_on(pipe, "a", "b")
    for restart in (lambda: pipe[0].reset(), lambda: open_on(pipe, "a"), lambda: None):
        out = [run(pipe, [item("a", b, steps=(700,))], latents(b, 2 if b == 0 else 1)[None])[0] for b in range(3)]
        assert all(torch.allclose(x, y, atol=CLOSE) for x, y in zip(out, fresh, strict=True))
        restart()


def test_copied_slots_go_on_on_another_machine_as_if_nothing_had_happened() -> None:
    here, there = stages_of(), stages_of()
    open_on(here, "a")
    for block in range(9):
        run(here, [item("a", block)], latents(block, 2 if block == 0 else 1)[None])
    run(here, [with_ops(item("a", 8, step=1), SlotOp(SlotOpKind.FORK, 1, source=0))], latents(50)[None])
    open_on(there, "b", "a")
    there[0].import_stream("a", here[0].export_stream("a"))
    for block in range(9, 12):
        batch = [item("a", block), item("a", block - 1, step=1)]
        x = torch.stack([latents(block), latents(50 + block)])
        assert torch.equal(run(here, batch, x), run(there, batch, x))


def test_memory_can_be_reserved_and_has_a_limit() -> None:
    stage = Stage.load(NANO, random_dit_weights(NANO, range(NANO.layers)), max_slots=3)
    stage.reserve(HEIGHT, WIDTH, 3)
    held = stage.memory().kv
    open_on([stage], *"abcd")
    for name in "abc":
        stage.run([item(name, 0)], latents(0, 2)[None])
    assert stage.memory().kv == held
    with pytest.raises(NoSlotError, match="all 3 KV slots"):
        stage.run([item("d", 0)], latents(0, 2)[None])
    stage.close("a")
    stage.run([item("d", 0)], latents(0, 2)[None])


def test_a_size_no_longer_used_frees_its_memory() -> None:
    (stage,) = stages_of()
    open_on([stage], "a", "big")
    stage.open("big", 2 * HEIGHT, WIDTH)
    stage.run([item("a", 0)], latents(0, 2)[None])
    small = stage.memory().kv
    stage.run([item("big", 0)], torch.zeros(1, 2, 16, 2 * HEIGHT, WIDTH))
    assert stage.memory().kv > small
    stage.close("big")
    assert stage.memory().kv == small


def no_room_past(pool_count: int, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device whose memory holds so many pools and no more, and none that grow."""
    streams, longer = stage._streams, kv_cache._longer
    make = streams._make_pool

    def scarce_pool(height: int, width: int) -> kv_cache.KvPool:
        if len(streams.pools) >= pool_count:
            raise torch.OutOfMemoryError("no room for a pool")
        return make(height, width)

    def scarce(tensor: Tensor, size: int, axis: int) -> Tensor:
        if size > tensor.shape[axis]:
            raise torch.OutOfMemoryError("no room to grow")
        return longer(tensor, size, axis)

    monkeypatch.setattr(streams, "_make_pool", scarce_pool)
    monkeypatch.setattr(kv_cache, "_longer", scarce)


def test_memory_of_a_size_that_nobody_uses_is_given_to_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (stage,) = stages_of()
    no_room_past(1, stage, monkeypatch)
    open_on([stage], "a")
    stage.run([item("a", 0)], latents(0, 2)[None])
    stage.close("a")
    assert len(stage._streams.pools) == 1, "kept for the next stream of its size"
    stage.open("big", 2 * HEIGHT, WIDTH, 2)
    assert [pool.tokens for pool in stage._streams.pools] == [2 * HEIGHT * WIDTH // 4]


def test_a_stream_that_finds_no_room_is_refused_before_it_costs_others_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (stage,) = stages_of()
    open_on([stage], "a")
    stage.run([item("a", 0)], latents(0, 2)[None])
    no_room_past(1, stage, monkeypatch)
    with pytest.raises(StageError, match="no room for 4 KV slots"):
        stage.open("b", HEIGHT, WIDTH, 4)
    with pytest.raises(StageError, match="not open"):
        stage.set_prompt("b", 1, prompt(1))
    with pytest.raises(StageError, match="no room"):
        stage.open("big", 2 * HEIGHT, WIDTH, 1)
    stage.open("c", HEIGHT, WIDTH, 1)  # there are two slots
    stage.run([item("a", 1)], latents(1, 1)[None])


def test_items_of_a_former_epoch_run_after_the_stream_was_taken_anew() -> None:
    stage = StageRole(stages_of()[0])
    for _ in range(2):
        stage.open("a", 8 * HEIGHT, 8 * WIDTH, 2)
        stage.set_prompt("a", 1, prompt(1))
    expected = stage.run([item("a", 0)], [latents(0, 2)]).latents[0]
    stage.open("a", 8 * HEIGHT, 8 * WIDTH, 2)
    stage.run([item("a", 5)], [latents(5, 1)])  # its prompt is there
    again = stage.run([item("a", 0)], [latents(0, 2)]).latents[0]
    assert torch.equal(again, expected), "the first block empties what the late one left"


def test_slots_are_given_back_and_used_again() -> None:
    (stage,) = stages_of()
    open_on([stage], *"abcdefgh")
    for name in "abcdefgh":
        stage.run([item(name, 0)], latents(0, 2)[None])
    held = stage.memory()
    assert held.slots == 8
    assert held.weights > 0
    assert held.prompts > 0
    for name in "abcdefgh":
        stage.close(name)
    stage.close("never opened")
    assert stage.memory().slots == 0
    open_on([stage], *"ijklmnop")
    for name in "ijklmnop":
        stage.run([item(name, 0)], latents(0, 2)[None])
    assert stage.memory().kv == held.kv


def test_a_prompt_takes_effect_by_its_version_only() -> None:
    pipe = stages_of()
    open_on(pipe, "a")
    old, new = item("a", 0), replace(item("a", 0), prompt_version=2)
    before = run(pipe, [old], latents(0, 2)[None])
    pipe[0].set_prompt("a", 2, prompt(99))
    assert torch.equal(before, run(pipe, [old], latents(0, 2)[None]))
    assert not torch.allclose(before, run(pipe, [new], latents(0, 2)[None]), atol=1e-3)
    pipe[0].drop_prompts("a", {2})
    assert not pipe[0].has_prompt("a", 1)
    with pytest.raises(StageError, match="prompt 1 of stream a is not ready"):
        run(pipe, [old], latents(0, 2)[None])


@pytest.mark.parametrize(
    ("items", "shape", "message"),
    [
        ([], (0, 1, 16, HEIGHT, WIDTH), "empty batch"),
        ([item("x", 0)], (1, 2, 16, HEIGHT, WIDTH), "stream x is not open"),
        ([item("a", 0)], (1, 1, 16, HEIGHT, WIDTH), "the batch needs"),
        ([item("a", 1), item("a", 2)], (2, 1, 16, HEIGHT, WIDTH), "touch slot 0 of stream a"),
        ([item("a", 0), item("b", 1)], (2, 2, 16, HEIGHT, WIDTH), "cannot share a batch"),
        ([replace(item("a", 0), frames=7)], (1, 7, 16, HEIGHT, WIDTH), "its slot takes 6"),
        ([replace(item("a", 0), prompt_version=5)], (1, 2, 16, HEIGHT, WIDTH), "prompt 5"),
        ([item("a", 1), item("big", 1)], (2, 1, 16, HEIGHT, WIDTH), "differ in size"),
    ],
)
def test_a_batch_that_cannot_run_is_refused_before_anything_changes(
    items: list, shape: tuple[int, ...], message: str
) -> None:
    (stage,) = stages_of()
    open_on([stage], "a", "b")
    stage.open("big", HEIGHT * 2, WIDTH)
    stage.set_prompt("big", 1, prompt(0))
    with pytest.raises(StageError, match=message):
        stage.run(items, torch.zeros(shape))
    assert stage.memory().slots == 0


def test_sizes_that_do_not_fit_the_patch_or_the_text_are_refused() -> None:
    (stage,) = stages_of()
    with pytest.raises(StageError, match="patch"):
        stage.open("a", 7, 12)
    open_on([stage], "a")
    with pytest.raises(StageError, match="the model needs"):
        stage.set_prompt("a", 2, torch.zeros(3, NANO.text_dim))


def test_bfloat16_stays_near_float32() -> None:
    def outputs(dtype: torch.dtype) -> list[Tensor]:
        pipe: list[Stage] = stages_of(dtype=dtype)
        open_on(pipe, "a")
        return [run(pipe, [item("a", b)], latents(b, 2 if b == 0 else 1)[None]) for b in range(8)]

    for exact, rough in zip(outputs(torch.float32), outputs(torch.bfloat16), strict=True):
        assert float((exact - rough).square().mean().sqrt() / exact.std()) < 0.05


def test_a_mixture_of_prompts_lies_between_them_and_ends_at_the_new_one() -> None:
    def under(new: int, old: int, share: float) -> Tensor:
        pipe = stages_of()
        open_on(pipe, "a")
        pipe[0].set_prompt("a", 2, prompt(99))
        mixed = replace(item("a", 0), prompt_version=new, blend_version=old, blend=share)
        return run(pipe, [mixed], latents(0, 2)[None])

    new, old = under(2, 1, 0.0), under(1, 2, 0.0)
    assert torch.allclose(under(2, 1, 1.0), old, atol=CLOSE)
    distances = [float((under(2, 1, share) - new).norm()) for share in (0.25, 0.5, 0.75, 1.0)]
    assert distances == sorted(distances)
    assert 0 < distances[0] < distances[-1] / 2


def test_a_mixture_of_a_prompt_that_is_not_there_is_refused() -> None:
    pipe = stages_of()
    open_on(pipe, "a")
    with pytest.raises(StageError, match="prompt 7 of stream a is not ready"):
        run(pipe, [replace(item("a", 0), blend_version=7, blend=0.5)], latents(0, 2)[None])


def test_mixtures_do_not_pile_up() -> None:
    (stage,) = stages_of()
    open_on([stage], "a")
    stage.set_prompt("a", 2, prompt(99))
    for turn in range(40):
        mixed = replace(item("a", 0), blend_version=2, blend=(turn + 1) / 41)
        stage.run([mixed], latents(0, 2)[None])
    assert stage._streams.prompts.used <= 10
    stage.drop_prompts("a", {1})
    assert stage._streams.prompts.used == 1
    stage.close("a")
    assert stage._streams.prompts.used == 0


def test_a_block_that_takes_its_window_along_sees_it_under_the_new_prompt() -> None:
    """A re-cache is what a stream would have cached, had its newest frames entered together under the new prompt."""

    def rolled(stages: int = 1) -> list[Stage]:
        pipe = stages_of(count=stages)
        open_on(pipe, "a")
        for stage in pipe:
            stage.set_prompt("a", 2, prompt(99))
        for block in range(8):
            run(pipe, [item("a", block)], latents(block, 2 if block == 0 else 1)[None])
        return pipe

    plain = replace(item("a", 8), prompt_version=2)
    anew = with_ops(replace(plain, context=5), SlotOp(SlotOpKind.RESET, 0))
    pipe = rolled()
    recached = run(pipe, [anew], latents(8)[None])
    assert not torch.allclose(recached, run(rolled(), [plain], latents(8)[None]), atol=1e-3)
    assert torch.allclose(recached, run(rolled(3), [anew], latents(8)[None]), atol=CLOSE)
    assert pipe[0].sinks("a")[0].tolist() == [[4, 5, 6, 7, 8, 9]] * NANO.layers

    # The same frames as one block of six, noised as they were.
    noisy = pipe[0]._streams.pool(HEIGHT, WIDTH).kept([pipe[0]._streams.slot("a", 0)], 6)
    together = replace(item("b", 0), frames=6, first_latent=4, start_frame=4, prompt_version=2, noise_scale=0.0)
    other = stages_of()
    other[0].open("b", HEIGHT, WIDTH)
    other[0].set_prompt("b", 2, prompt(99))
    assert torch.allclose(run(other, [together], noisy)[:, -1:], recached, atol=CLOSE)
    after = [replace(item(name, 9), prompt_version=2) for name in "ab"]
    assert torch.allclose(run(pipe, after[:1], latents(9)[None]), run(other, after[1:], latents(9)[None]), atol=CLOSE)


def test_memory_is_told_by_stream() -> None:
    (stage,) = stages_of()
    open_on([stage], "a", "b")
    stage.run([item("a", 0)], latents(0, 2)[None])
    held = stage.memory()
    slot = NANO.layers * NANO.kv_bytes(96, 64, bytes_per_value=4)
    assert held.streams["a"] - held.streams["b"] >= slot
    assert held.streams["b"] == held.prompts // 2
