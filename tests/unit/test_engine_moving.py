"""A stream's state moves: to other stages, other cuts, the host and back. What goes on computes the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shared.engine.blocks import runs
from shared.engine.model.autoencoder import Autoencoder
from shared.engine.model.kv_cache import NoSlotError
from shared.engine.model.loading import load_vae, random_dit_weights, random_vae_weights
from shared.engine.model.mixed_vae import MixedVae
from shared.engine.model.tiny_vae_serving import ServingTinyVae
from shared.engine.model.wan_vae import WanVae
from shared.engine.moving import Carried, carried_memory, carry_memory
from shared.engine.plan.items import Item
from shared.engine.plan.noise_controller import step_timesteps
from shared.engine.plan.spec import ModelSpec, VaeKind, spec_of
from shared.engine.plan.stream_plan import PlanPhase, StreamPlan
from shared.engine.stage import Stage, StageError
from shared.engine.state_parts import StatePartsError, from_parts, to_parts
from tests.support.engine import HEIGHT, WIDTH, clip, latents, prompt, run, stages_of
from tests.support.wan_files import tiny_wan, wan_vae

NANO = replace(spec_of("nano"), layers=4)
ADAPTIVE = replace(NANO, sink_threshold=0.98)
CUTS = [[range(4)], [range(1), range(1, 4)], [range(3), range(3, 4)], [range(1), range(1, 3), range(3, 4)]]


def cut(spec: ModelSpec, blocks: Sequence[range]) -> list[Stage]:
    torch.set_num_threads(1)
    return [Stage.random(spec, each, 0) for each in blocks]


def opened(stages: Sequence[Stage], *streams: str) -> list[Stage]:
    for stage in stages:
        for stream in streams:
            stage.open(stream, HEIGHT, WIDTH)
            stage.set_prompt(stream, 1, prompt(sum(map(ord, stream)), stage.spec))
    return list(stages)


class Driven:
    """One stream, planned as in serving: K steps in the lock step, every x0 kept; pending steps live between ticks."""

    def __init__(self, stages: list[Stage], stream: str = "s", *, steps: int = 2, frames: int = 1) -> None:
        self.stages, self.stream, self.frames = stages, stream, frames
        self.spec = stages[0].spec
        self.plan = StreamPlan.for_model(stream, 0, self.spec)
        self.steps = step_timesteps(700, self.spec.steps[:steps])
        self.pending: list[tuple[Item, Tensor]] = []
        self.shown: list[Tensor] = []
        self.blocks = 0
        self.blend = (0, 0.0)
        self.prompt = 1

    def tick(self) -> None:
        """Enter one block; everything that has steps left goes one step on in the same batch."""
        frames = 2 if self.blocks == 0 else self.frames
        ready, self.pending = self.pending, []
        batch = [(self.plan.next(item), x) for item, x in ready]
        version, share = self.blend
        entering = self.plan.enter(frames, 0.7, self.steps, 5, self.prompt, blend_version=version, blend=share)
        batch.append((entering, latents(self.blocks, frames)))
        self.blocks += 1
        while batch:
            batch = self._run(batch)

    def _run(self, batch: list[tuple[Item, Tensor]]) -> list[tuple[Item, Tensor]]:
        at_once: list[tuple[Item, Tensor]] = []
        for frames in sorted({item.frames for item, _ in batch}):
            items = [item for item, _ in batch if item.frames == frames]
            x0 = run(self.stages, items, torch.stack([x for item, x in batch if item.frames == frames]))
            for item, clean in zip(items, x0, strict=True):
                if item.is_last_step:
                    self.plan.done(item)
                    self.shown.append(clean)
                    continue
                again = self.stages[-1].renoise([item], clean[None])[0]
                alone = self.plan.phase is PlanPhase.FIRST
                self.plan.done(item)
                (at_once if alone else self.pending).append(
                    (item, again) if not alone else (self.plan.next(item), again)
                )
        return at_once


def moved(stages: Sequence[Stage], blocks: Sequence[range], stream: str = "s") -> list[Stage]:
    """The stream on other stages, by way of bytes; other streams are there already and prompts come along."""
    there = opened(cut(stages[0].spec, blocks), "other", "another")
    run(there, [first_of("other")], latents(7, 2)[None])
    for stage in there:
        stage.open(stream, HEIGHT, WIDTH)
    for source in stages:
        for carried in (source.export_stream(stream, range(2)), source.export_stream(stream, range(2, 99))):
            again = from_parts(*to_parts(carried, part_bytes=5000))
            for stage in there:
                stage.import_stream(stream, again)
    return there


def first_of(stream: str) -> Item:
    return StreamPlan.for_model(stream, 0, NANO).enter(2, 0.7, step_timesteps(700, NANO.steps[:1]), 1, 1)


def rebalanced(stages: list[Stage], blocks: Sequence[range], streams: Sequence[str] = ("s",)) -> list[Stage]:
    """The same stages cut anew: what each gains comes from who has it, then all cut over."""
    pieces = [stage.prepare(after) for stage, after in zip(stages, blocks, strict=True)]
    for stream in streams:
        for target, after in zip(stages, blocks, strict=True):
            for gained in runs([block for block in after if block not in target.blocks]):
                for source in stages:
                    if source is not target and any(block in source.blocks for block in gained):
                        target.import_stream(stream, source.export_stream(stream, gained))
    for stage, piece in zip(stages, pieces, strict=True):
        assert not set(streams) & set(stage.set_blocks(piece)), "what was carried is there"
    return stages


def suspended(stages: list[Stage], stream: str = "s") -> list[Stage]:
    for stage in stages:
        before = stage.memory().slots
        assert stage.suspend(stream) > 0
        assert stage.memory().slots < before
        assert stream in stage.suspended
        stage.open("thief", HEIGHT, WIDTH)  # takes and overwrites the room
        stage.set_prompt("thief", 1, prompt(3, stage.spec))
    run(stages, [first_of("thief")], latents(9, 2)[None])
    return stages


WAYS: dict[str, Callable[[list[Stage]], list[Stage]]] = {
    **{f"to {blocks}": lambda stages, blocks=blocks: moved(stages, blocks) for blocks in CUTS},
    "aside and back": suspended,
    "aside, then to others": lambda stages: moved(suspended(stages), CUTS[1]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("steps", "frames", "sinks"), [(1, 1, False), (2, 1, True), (3, 2, False), (2, 3, False)])
def test_a_stream_that_moves_in_the_middle_goes_on_to_the_last_bit(
    way: str, steps: int, frames: int, sinks: bool
) -> None:
    spec = ADAPTIVE if sinks else NANO
    still = Driven(opened(cut(spec, CUTS[2]), "s"), steps=steps, frames=frames)
    moving = Driven(opened(cut(spec, CUTS[2]), "s"), steps=steps, frames=frames)
    for tick in range(10):
        still.tick()
        if tick in (2, 7):  # rings filling, and full; with steps pending
            moving.stages = WAYS[way](moving.stages)
        moving.tick()
    assert len(still.shown) == len(moving.shown) > 6
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(moving.shown, still.shown, strict=True))


@pytest.mark.parametrize("sinks", [False, True])
def test_blocks_change_hands_while_streams_run_and_nothing_changes(sinks: bool) -> None:
    spec = ADAPTIVE if sinks else NANO
    orders = [[range(2), range(2, 4)], [range(3), range(3, 4)], [range(1), range(1, 4)], [range(2), range(2, 4)]]
    still, moving = (
        {name: Driven(stages, name) for name in ("s", "t")}
        for stages in (opened(cut(spec, orders[0]), "s", "t"), opened(cut(spec, orders[0]), "s", "t"))
    )
    for tick in range(9):
        for name in ("s", "t"):
            still[name].tick()
            moving[name].tick()
        if tick in (1, 4, 6):
            rebalanced(moving["s"].stages, orders[(1, 4, 6).index(tick) + 1], ("s", "t"))
    for name in ("s", "t"):
        for ours, theirs in zip(moving[name].shown, still[name].shown, strict=True):
            assert torch.equal(ours, theirs)


def test_a_blend_survives_blocks_that_change_hands() -> None:
    still, moving = (Driven(opened(cut(NANO, [range(2), range(2, 4)]), "s")) for _ in range(2))
    for tick in range(6):
        for driven in (still, moving):
            if tick == 2:
                for stage in driven.stages:
                    stage.set_prompt("s", 2, prompt(99))
                driven.prompt = 2
            driven.blend = (1, 0.5) if tick in (2, 3, 4) else (0, 0.0)
            driven.tick()
        if tick == 3:
            rebalanced(moving.stages, [range(1), range(1, 4)])
        if tick == 4:
            rebalanced(moving.stages, [range(2), range(2, 4)])
    assert torch.equal(still.shown[-1], moving.shown[-1])


def test_a_suspended_stream_has_its_blocks_moved_too() -> None:
    still, moving = (Driven(opened(cut(NANO, [range(2), range(2, 4)]), "s")) for _ in range(2))
    for tick in range(7):
        still.tick()
        if tick == 4:
            for stage in moving.stages:
                stage.suspend("s")
            rebalanced(moving.stages, [range(1), range(1, 4)])
            rebalanced(moving.stages, [range(2), range(2, 4)])
        moving.tick()
    assert all(torch.equal(a, b) for a, b in zip(still.shown, moving.shown, strict=True))
    assert not moving.stages[0].suspended


def test_a_stream_whose_slots_did_not_come_cannot_run_before_it_is_reset() -> None:
    stages = opened(cut(NANO, [range(2), range(2, 4)]), "s", "new")
    driven = Driven(stages)
    driven.tick()
    for stage, after in zip(stages, ([range(1), range(1, 4)]), strict=True):
        lacking = stage.set_blocks(stage.prepare(after))
        assert lacking == (("s",) if after.start else ())
    with pytest.raises(StageError, match="slots of stream s in blocks 1 have not come"):
        driven.tick()
    run(stages, [first_of("new")], latents(1, 2)[None])
    for stage in stages:
        stage.reset()
    fresh = Driven(stages)
    fresh.tick()
    assert torch.equal(fresh.shown[0], driven.shown[0]) or torch.allclose(fresh.shown[0], driven.shown[0], atol=1e-5)


def test_room_that_others_took_keeps_a_stream_suspended_and_nothing_is_lost() -> None:
    stage = Stage.load(NANO, random_dit_weights(NANO, range(NANO.layers)), max_slots=2)
    still, driven = Driven(opened(stages_of(NANO), "s")), Driven(opened([stage], "s", "other"))
    for tick in range(4):
        still.tick()
        driven.tick()
        if tick == 1:
            stage.suspend("s")
            other = Driven([stage], "other")
            other.tick()
            other.tick()
            with pytest.raises(NoSlotError):
                stage.resume("s")
            assert "s" in stage.suspended
            stage.close("other")
    assert all(torch.equal(a, b) for a, b in zip(still.shown, driven.shown, strict=True))


def test_state_of_another_size_model_or_moment_is_refused() -> None:
    here, there = opened(stages_of(NANO), "s"), opened(stages_of(NANO), "s")
    driven = Driven(here)
    driven.tick()
    early = here[0].export_stream("s")
    driven.tick()
    with pytest.raises(StageError, match="another moment"):
        here[0].import_stream("s", early)
    there[0].open("s", HEIGHT, WIDTH + 2)
    with pytest.raises(StageError, match="latents, the stream has"):
        there[0].import_stream("s", early)
    early.meta["slots"]["model"] = "larger"
    with pytest.raises(StageError, match="of model larger"):
        here[0].import_stream("s", early)
    with pytest.raises(StageError, match="not open"):
        there[0].import_stream("nobody", early)
    with pytest.raises(StageError, match="were not prepared"):
        cut(NANO, CUTS[1])[0].set_blocks(replace(cut(NANO, CUTS[1])[0].prepare(range(2)), blocks=range(3)))


def test_damaged_parts_are_told() -> None:
    layout, parts = to_parts(Carried({"a": 1}, {"x": torch.arange(6.0).reshape(2, 3).T}), part_bytes=7)
    assert len(parts) == 5  # 24 bytes and what aligns them
    again = from_parts(layout, parts)
    assert torch.equal(again.tensors["x"], torch.arange(6.0).reshape(2, 3).T)
    assert again.tensors["x"].stride() == (1, 3)
    for broken in (
        b"{}",
        b"[1]",
        b"not json",
        layout.replace(b'"at":0', b'"at":16'),
        layout.replace(b"float32", b"float9"),
    ):
        with pytest.raises(StatePartsError):
            from_parts(broken, parts)
    with pytest.raises(StatePartsError, match="bytes came"):
        from_parts(layout, parts[1:])


def tiny() -> ServingTinyVae:
    vae = load_vae(NANO, random_vae_weights(NANO, 0))
    assert isinstance(vae, ServingTinyVae)
    return vae


@pytest.mark.parametrize("kind", [VaeKind.TAEHV, VaeKind.WAN, VaeKind.MIXED])
def test_an_autoencoder_goes_on_from_a_copy_to_the_last_bit(kind: VaeKind) -> None:
    torch.set_num_threads(1)
    spec = tiny_wan(kind)
    small = load_vae(replace(spec, vae=VaeKind.TAEHV), random_vae_weights(spec, 0))
    assert isinstance(small, ServingTinyVae)
    full = WanVae(wan_vae())
    vae = small if kind == VaeKind.TAEHV else full if kind == VaeKind.WAN else MixedVae(full, small)
    coder = Autoencoder(vae, spec, torch.device("cpu"), torch.float32)
    still, moving = coder.encoder_state(), coder.encoder_state()
    still_out, moving_out = coder.decoder_state(), coder.decoder_state()
    for chunk in range(4):
        pixels = clip(chunk, 5 if chunk == 0 else 4, 32, 32)
        ours, theirs = coder.encode(moving, pixels), coder.encode(still, pixels)
        assert torch.equal(ours, theirs)
        assert torch.equal(coder.decode(moving_out, ours), coder.decode(still_out, theirs))
        carried = carry_memory("encode", moving.values())
        carried.join(carry_memory("decode", moving_out.values()))
        carried = from_parts(*to_parts(carried, part_bytes=1000))
        moving, moving_out = coder.encoder_state(), coder.decoder_state()
        moving.restore(carried_memory("encode", carried, torch.device("cpu")))
        moving_out.restore(carried_memory("decode", carried, torch.device("cpu")))


def test_the_memory_of_another_autoencoder_is_refused() -> None:
    small = tiny()
    mixed = MixedVae(WanVae(wan_vae()), small)
    with pytest.raises(ValueError, match="no values of a tiny"):
        small.new_memory().restore(mixed.new_memory().values())
    with pytest.raises(ValueError, match="no values of a memory of two"):
        mixed.new_memory().restore(small.new_memory().values())
    with pytest.raises(ValueError, match="no values of the Wan"):
        WanVae(wan_vae()).new_memory().restore(mixed.new_memory().values())
