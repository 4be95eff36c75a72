"""Changes while a stream runs, in virtual time: each binds whole blocks, and is told with the chunk it is bound to."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from pydantic import ValidationError

from services.motion.core import MotionCore
from services.scheduler.ladder import Wish
from services.scheduler.messenger import RefusedError, credits_for
from services.scheduler.placing import check_settings
from services.scheduler.pricing import Demand
from services.scheduler.records import StreamRecord
from services.scheduler.stream_queue import Applied, Change, Fade, StreamQueue, StreamSettings
from services.scheduler.tiering import patched
from shared.contracts.commands import PatternSource, StreamPatch, StreamSpec
from shared.contracts.events import LatentsEncoded
from shared.contracts.tiers import Quality
from shared.engine.plan.items import Item
from shared.engine.plan.noise_controller import NoiseEstimate
from shared.engine.plan.prompts import mix_digest, mix_text
from shared.engine.plan.spec import NoiseSpec, spec_of
from tests.unit.test_scheduler_core import MS, REF, Bench, chunk

NANO = spec_of("nano")


def feed(bench: Bench, *numbers: int, noise_version: int = 0) -> list[Item]:
    """Offer chunks and run everything; returns the step-0 items in order."""
    seen = len(bench.ran)
    for number in numbers:
        event = chunk("a", number, live=False).model_copy(update={"noise_version": noise_version})
        bench.offer(event)
        bench.run()
    return [e.item for batch in bench.ran[seen:] for e in batch.entries if e.item.step == 0]


def told(bench: Bench) -> list[Applied]:
    return [applied for decisions in bench.said for applied in decisions.applied]


def settings(queue: StreamQueue, **changes: int) -> StreamSettings:
    return replace(queue.settings, **changes)


def test_a_blend_falls_evenly_and_ends_at_the_new_prompt_alone() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=1, live=False)
    feed(bench, 0, 1)
    queue.change("fade", Change(settings(queue, prompt_version=2), blend_chunks=3))
    items = feed(bench, 2, 3, 4, 5, 6)
    assert [round(item.blend, 3) for item in items] == [0.75, 0.5, 0.25, 0.0, 0.0]
    assert [item.prompts for item in items] == [(2, 1), (2, 1), (2, 1), (2,), (2,)]
    (applied,) = told(bench)
    assert (applied.command, applied.chunk, applied.until, applied.version) == ("fade", 2, 5, 2)


def test_the_old_prompt_is_kept_until_nothing_reads_it() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=1, live=False)
    feed(bench, 0)
    queue.change("fade", Change(settings(queue, prompt_version=2), blend_chunks=2))
    assert queue.prompts_used == {1, 2}
    feed(bench, 1, 2)
    assert queue.prompts_used == {1, 2}
    feed(bench, 3)
    assert queue.prompts_used == {2}


def test_a_new_prompt_during_a_blend_starts_from_the_one_that_is_seen_more() -> None:
    for chunks_before, shown in ((1, 1), (4, 2)):
        bench = Bench()
        queue = bench.stream("a", steps=1, live=False)
        feed(bench, 0)
        queue.change("first", Change(settings(queue, prompt_version=2), blend_chunks=4))
        feed(bench, *range(1, 1 + chunks_before))
        queue.change("second", Change(settings(queue, prompt_version=3), blend_chunks=4))
        (item,) = feed(bench, 1 + chunks_before)
        assert item.prompts == (3, shown)


def test_a_blend_never_starts_from_a_prompt_that_was_not_seen() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=1, live=False)
    queue.change("unseen", Change(settings(queue, prompt_version=2), blend_chunks=4))
    feed(bench, 0)
    assert bench.ran[0].entries[0].item.prompts == (2,), "nothing was seen before: there is nothing to fade from"
    queue.change("blink", Change(settings(queue, prompt_version=3), blend_chunks=1))
    queue.change("cut", Change(settings(queue, prompt_version=4)))
    queue.change("fade", Change(settings(queue, prompt_version=5), blend_chunks=1))
    assert queue.prompts_used == {2, 5}, "2 is on the screen, 3 and 4 never were"
    assert [item.prompts for item in feed(bench, 1, 2)] == [(5, 2), (5,)]
    assert [(a.command, a.chunk, a.until) for a in told(bench)] == [
        ("unseen", 0, -1),
        ("blink", 1, -1),
        ("cut", 1, -1),
        ("fade", 1, 2),
    ]


def test_the_end_of_a_blend_is_told_right_for_longer_blocks_and_beside_a_noise_change() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=1, live=False, frames_per_block=2)
    feed(bench, 0, 1)
    change = Change(settings(queue, prompt_version=2), blend_chunks=3, noise_version=1)
    queue.change("fade", change)
    items = feed(bench, 2, 3, 4, 5, 6, 7)
    assert [round(item.blend, 2) for item in items] == [0.75, 0.25, 0.0]
    assert told(bench) == [], "the noise has not changed yet"
    feed(bench, 8, 9, noise_version=1)
    assert [(a.command, a.chunk, a.until) for a in told(bench)] == [("fade", 8, 6)]


def test_a_blend_ends_where_it_was_told_even_if_blocks_grow_meanwhile() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=1, live=False)
    feed(bench, 0)
    queue.change("fade", Change(settings(queue, prompt_version=2), blend_chunks=3))
    feed(bench, 1)
    queue.change("longer", Change(settings(queue, frames_per_block=3)))
    (item,) = feed(bench, 2, 3, 4)
    assert told(bench)[0].until == 4
    assert item.prompts == (2,), "the block reaches past the end, so nothing is left of the old prompt"


def test_a_live_pause_lets_a_short_block_go_and_a_lossless_one_keeps_it() -> None:
    for live in (True, False):
        bench = Bench()
        queue = bench.stream("a", steps=1, live=live, frames_per_block=3)
        for number in range(4):
            bench.offer(chunk("a", number, live=live))
        bench.run()
        assert len(queue.waiting) == 1
        queue.paused = True
        bench.run()
        assert len(queue.waiting) == (0 if live else 1)
        queue.paused = False
        for number in (4, 5, 6):
            bench.offer(chunk("a", number, live=live, captured_ms=bench.now // 1_000_000))
        blocks = [[s.chunk for s in e.stamps] for batch in bench.run() for e in batch.entries]
        assert blocks == ([[0, 1, 2], [3], [4, 5, 6]] if live else [[0, 1, 2], [3, 4, 5]])


def test_credits_are_enough_for_the_longest_blocks() -> None:
    spec = StreamSpec(source=PatternSource(), prompt="neon", fps=4, deadline_ms=100)
    record = StreamRecord("a", 1, spec, 96, 64, 0.5)
    assert credits_for(record) == 2
    record.frames_per_block = 3
    assert credits_for(record) == 6


def test_a_hard_change_ends_a_blend() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=1, live=False)
    feed(bench, 0)
    queue.change("fade", Change(settings(queue, prompt_version=2), blend_chunks=8))
    feed(bench, 1)
    queue.change("cut", Change(settings(queue, prompt_version=3)))
    assert [item.prompts for item in feed(bench, 2)] == [(3,)]


def test_a_blend_passes_with_the_chunks_even_when_some_are_dropped() -> None:
    fade = Fade(1, 4, first=10)
    assert [round(fade.share(n), 2) for n in (10, 11, 13, 14, 20)] == [0.8, 0.6, 0.2, 0.0, 0.0]
    shares = [fade.share(n) for n in range(10, 20)]
    assert all(a >= b for a, b in pairwise(shares))


def test_a_recache_rides_with_the_first_block_under_the_new_prompt_only() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=2, live=False)
    feed(bench, 0, 1, 2, 3)
    queue.change("anew", Change(settings(queue, prompt_version=2), recache=True))
    before = len(bench.ran)
    items = feed(bench, 4, 5)
    assert [item.context for item in items] == [NANO.ring - 1, 0]
    later = [e.item for batch in bench.ran[before:] for e in batch.entries if e.item.block == 4]
    assert [item.context for item in later] == [NANO.ring - 1] * 2, "at every step"
    for batch in bench.ran:
        assert len({(e.item.frames, e.item.context) for e in batch.entries}) == 1


def test_after_a_blend_the_window_is_made_anew_once_nothing_of_the_old_prompt_is_left() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=1, live=False)
    feed(bench, 0, 1, 2, 3)
    queue.change("both", Change(settings(queue, prompt_version=2), blend_chunks=3, recache=True))
    items = feed(bench, 4, 5, 6, 7, 8)
    assert [item.blend > 0 for item in items] == [True, True, True, False, False]
    assert [item.context for item in items] == [0, 0, 0, NANO.ring - 1, 0]


def test_a_window_that_does_not_fit_the_deadline_makes_one_block_late_and_not_all_of_them() -> None:
    bench = Bench(step_ms=70.0)
    queue = bench.stream("a", steps=1)
    for number in range(30):
        bench.now = max(bench.now, number * 150 * MS)
        bench.offer(chunk("a", number, captured_ms=number * 150))
        if number == 12:
            queue.change("anew", Change(settings(queue, prompt_version=2), recache=True))
        bench.run()
    assert [applied.command for applied in told(bench)] == ["anew"]
    assert len(bench.ran) >= 28


def test_t_changes_at_a_block() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=1, live=False)
    feed(bench, 0)
    queue.change("longer", Change(settings(queue, frames_per_block=2)))
    assert [item.frames for item in feed(bench, 1, 2, 3, 4)] == [2, 2]
    assert [(a.command, a.chunk) for a in told(bench)] == [("longer", 1)]


def test_a_noise_change_is_told_with_the_first_chunk_that_was_estimated_with_it() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=1, live=False)
    feed(bench, 0)
    queue.change("louder", Change(settings(queue, steps=2), noise_version=1))
    feed(bench, 1, 2)
    assert told(bench) == [], "the steps changed, but these chunks' noise was estimated before"
    feed(bench, 3, noise_version=1)
    assert [(a.command, a.chunk) for a in told(bench)] == [("louder", 3)]


def test_motion_marks_its_estimates_with_the_noise_they_were_made_with() -> None:
    core, spec = MotionCore(), NoiseSpec()
    core.take("a", 1, 0.8, spec)
    core.take("a", 1, 0.4, spec, noise_version=3)
    assert core.streams["a"].noise_version == 3
    resumed = MotionCore()
    resumed.take("a", 1, 0.4, spec, core.streams["a"].mirror())
    assert resumed.streams["a"].noise_version == 3


def test_an_older_noise_that_is_delivered_again_changes_nothing() -> None:
    core, spec = MotionCore(), NoiseSpec()
    for noise, version in ((0.8, 0), (0.6, 1), (0.4, 2), (0.6, 1)):
        core.take("a", 1, noise, spec, noise_version=version)
    assert (core.streams["a"].noise_version, core.streams["a"].controller.s0) == (2, 0.4)
    assert core.counts == {"old_noise": 1}
    resumed = MotionCore()
    resumed.take("a", 1, 0.6, spec, core.streams["a"].mirror(), noise_version=1)
    assert (resumed.streams["a"].noise_version, resumed.streams["a"].controller.s0) == (2, 0.4)
    anew = MotionCore()
    anew.take("a", 2, 0.7, spec, core.streams["a"].mirror())
    assert (anew.streams["a"].noise_version, anew.streams["a"].controller.s0) == (0, 0.7), "another life counts anew"


def test_without_a_source_every_chunk_is_pure_noise() -> None:
    core = MotionCore()
    core.take("a", 1, 0.5, NoiseSpec(), pure_noise=1000)
    encoded = LatentsEncoded(stamp=chunk("a", 0).stamp, latents=REF, latent_frames=2, rmse=(0.0,) * 5)
    assert core.estimate(encoded, 0.0) == NoiseEstimate(0.0, 1.0, 1000)


def test_text_to_video_takes_the_models_own_steps_for_it() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=3, live=False)
    queue.from_text, queue.model = True, replace(NANO, text_steps=(1000, 750, 500, 250))
    event = chunk("a", 0, live=False).model_copy(update={"noise_scale": 1.0, "first_timestep": 1000})
    bench.offer(event)
    bench.run()
    assert bench.ran[0].entries[0].item.timesteps == (1000, 750, 500)


@pytest.mark.parametrize(("steps", "frames", "word"), [(5, None, "1…4"), (None, 4, "1…3")])
def test_what_the_model_cannot_run_is_refused_with_what_it_can(steps: int, frames: int, word: str) -> None:
    with pytest.raises(RefusedError, match=word):
        check_settings(NANO, steps, frames)
    check_settings(NANO, 4, 3)
    few = replace(NANO, text_steps=(1000, 500))
    with pytest.raises(RefusedError, match="1…2"):
        check_settings(few, 3, 1, from_text=True)
    with pytest.raises(RefusedError, match="leave noise out"):
        check_settings(few, 2, 1, noise=0.5, from_text=True)


@pytest.mark.parametrize(
    ("patch", "word"),
    [
        ({"blend_chunks": 3}, "go with a new prompt"),
        ({"recache": True}, "go with a new prompt"),
        ({"paused": True, "steps": 1}, "comes alone"),
        ({"prompt": "neon", "blend_chunks": 65}, "64"),
        ({"frames_per_block": 0}, "frames_per_block"),
    ],
)
def test_changes_that_do_not_fit_together_are_refused(patch: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        StreamPatch.model_validate(patch)


def test_a_reset_lets_what_is_under_way_through_and_begins_anew() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=2, live=False)
    before = feed(bench, 0, 1, 2)
    assert before[-1].start_frame > 0
    queue.change("again", Change(settings(queue), recache=True, reset=True))
    first, second = feed(bench, 3, 4)
    assert (first.start_frame, first.block, first.context) == (0, 3, 0), "block numbers go on, so noise does not repeat"
    assert [op.kind.value for op in first.ops] == ["reset"]
    assert second.start_frame == first.frames
    assert {op.kind.value for op in second.ops} == {"fork"}, "the first block's KV fills the other slots"
    assert [(applied.command, applied.chunk) for applied in told(bench)] == [("again", 3)]
    assert feed(bench, 5)[0].ops == (), "once"


def test_a_reset_ends_a_blend_and_waits_for_older_blocks() -> None:
    bench = Bench()
    queue = bench.stream("a", steps=3, live=False)
    feed(bench, 0, 1)
    queue.change("fade", Change(settings(queue, prompt_version=2), blend_chunks=4))
    feed(bench, 2)
    queue.change("again", Change(settings(queue), reset=True))
    for number in (3, 4, 5):
        bench.offer(chunk("a", number, live=False))
    for _ in range(40):
        bench.run()
    items = [e.item for batch in bench.ran for e in batch.entries]
    restart = next(n for n, item in enumerate(items) if item.block == 3 and item.step == 0)
    assert all(item.block >= 3 for item in items[restart:]), "nothing older is left once it begins"
    assert items[restart].prompts == (2,)
    assert max(item.block for item in items) == 5


def test_the_rate_a_user_asks_for_is_the_ladders_top() -> None:
    wish = Wish(Demand(width=96, height=64, tokens=24, fps=16.0, steps=2, min_fps=8.0), Quality.BALANCED)
    slower = patched(wish, StreamPatch(fps=6.0))
    assert (slower.asked.fps, slower.asked.min_fps) == (6.0, 6.0)
    assert patched(slower, StreamPatch(fps=12.0)).asked.fps == 12.0
    assert patched(wish, StreamPatch(fps=240.0), 30.0).asked.fps == 30.0, "nobody pays for more than the source gives"


@pytest.mark.parametrize(
    ("patch", "word"),
    [
        ({"prompt": "a", "prompts": [{"text": "b"}]}, "not both"),
        ({"prompts": [{"text": " "}]}, "empty"),
        ({"prompts": [{"text": "a", "weight": 0}]}, "greater than 0"),
        ({"prompts": [{"text": "a"}] * 9}, "8"),
        ({"paused": True, "reset": True}, "alone"),
        ({"paused": True, "fps": 8}, "alone"),
        ({"fps": 0}, "greater than 0"),
    ],
)
def test_patches_that_cannot_be(patch: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        StreamPatch.model_validate(patch)


def test_a_mix_is_known_by_its_proportions() -> None:
    mix = [("pencil", 3.0), ("neon", 1.0)]
    assert mix_digest("m", mix) == mix_digest("m", [("neon", 0.5), ("pencil", 1.5)])
    assert mix_digest("m", mix) != mix_digest("m", [("pencil", 1.0), ("neon", 1.0)])
    assert mix_digest("m", mix) != mix_digest("n", mix)
    assert mix_text(mix) == "75 % pencil + 25 % neon"
