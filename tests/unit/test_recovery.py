"""What becomes of streams whose worker is lost, and what a worker does that stood still."""

from __future__ import annotations

import pytest

from services.scheduler.fleet import Pipeline
from services.scheduler.records import Phase, StreamRecord
from services.scheduler.recovery import Fate, Recovery, choose, fate, renewed
from services.scheduler.stream_queue import Change, Offer, StreamQueue, StreamSettings
from services.worker.core import Job, JobQueue, Rank
from services.worker.device_thread import Outcome
from services.worker.fencing import Fence, Lives, is_stale
from shared.contracts.commands import Mode, PatternSource, StreamSpec
from shared.contracts.events import ChunkStamp, FrameStamp, MotionEstimated
from shared.contracts.refs import TensorPlace, TensorRef
from shared.engine.plan.registry import model_spec
from shared.engine.plan.stream_plan import StreamPlan

MODEL = model_spec("rheo-tiny")


def record(stream: str = "a", mode: Mode = Mode.LIVE, pipeline: str = "p0") -> StreamRecord:
    spec = StreamSpec(source=PatternSource(), prompt="a drawing", mode=mode)
    made = StreamRecord(
        stream=stream,
        epoch=1,
        spec=spec,
        width=160,
        height=96,
        noise=0.5,
        pipeline=pipeline,
        workers=(f"{pipeline}-w",),
        ingest="ingest-0",
        egress="egress-0",
        motion="motion-0",
    )
    made.move(Phase.RUNNING)
    return made


def queue(stream: str = "a", epoch: int = 1) -> StreamQueue:
    return StreamQueue(
        stream=stream,
        epoch=epoch,
        live=True,
        height=96,
        width=160,
        model=MODEL,
        plan=StreamPlan.for_model(stream, epoch, MODEL),
        settings=StreamSettings(steps=2, seed=5, prompt_version=3),
    )


def estimated(chunk: int, epoch: int) -> MotionEstimated:
    frames = tuple(FrameStamp(index=4 * chunk + i, pts=i, captured_ns=1, deadline_ns=10**18) for i in range(4))
    ref = TensorRef(owner="w", host="", place=TensorPlace.INLINE, shape=(0,), dtype="uint8", data=b"")
    return MotionEstimated(
        stamp=ChunkStamp(stream="a", epoch=epoch, chunk=chunk, frames=frames, live=True),
        latents=ref,
        latent_frames=1,
        motion=0.0,
        noise_scale=0.5,
        first_timestep=400,
    )


def test_what_workers_and_egress_hold_can_be_made_anew_for_live_streams() -> None:
    live, lossless = record(), record(mode=Mode.LOSSLESS)
    assert fate(live, "p1-w") is Fate.NOTHING
    assert fate(live, "motion-0") is Fate.NOTHING
    assert fate(live, "p0-w") is Fate.RECOVERS
    assert fate(lossless, "p0-w") is Fate.FAILS
    assert fate(live, "ingest-0") is fate(lossless, "egress-0") is Fate.FAILS
    assert fate(live, "egress-0") is Fate.RECOVERS, "its sinks are opened again"
    live.move(Phase.RECOVERING)
    assert fate(live, "p0-w") is fate(live, "egress-0") is Fate.RECOVERING
    assert fate(live, "ingest-0") is Fate.FAILS
    live.move(Phase.STOPPING)
    assert fate(live, "egress-0") is Fate.FAILS, "another closes its ledger"
    assert fate(live, "p0-w") is Fate.CLOSES, "what is being stopped ends as it was told to"
    live.failure = "something else"
    assert fate(live, "p0-w") is Fate.FAILS


def test_a_stream_goes_on_where_it_was_or_where_there_is_room() -> None:
    lost = record()
    lost.move(Phase.RECOVERING)
    own, other, full = (Pipeline(name, "rheo-tiny", (f"{name}-w",)) for name in ("p0", "p1", "p2"))
    foreign = Pipeline("p3", "wan", ("p3-w",))
    records = {
        "a": lost,
        "b": record("b", pipeline="p1"),
        "c": record("c", pipeline="p2"),
        "d": record("d", pipeline="p2"),
    }
    assert choose(lost, [own, other], records, 2, {}) is own
    assert choose(lost, [full, other, foreign], records, 2, {}) is other
    assert choose(lost, [full, foreign], records, 2, {}) is None
    assert choose(lost, [], records, 2, {}) is None
    busy = {"p1": 0.6, "p2": 0.2}
    assert choose(lost, [full, other], records, 3, busy) is full, "two small streams may be less than a large one"
    assert choose(lost, [full, other], records, 2, busy) is other, "but there must be a place"


def test_what_is_renewed_keeps_settings_and_commands_and_nothing_of_the_lost_placement() -> None:
    kept = queue()
    assert kept.offer(estimated(7, 1), 5) is Offer.TAKEN
    kept.change("c1", Change(StreamSettings(steps=1, seed=5, prompt_version=3)))
    fresh = renewed(kept, 3, 4)
    assert fresh.settings == StreamSettings(steps=1, seed=5, prompt_version=4)
    assert list(fresh.pending) == ["c1"]
    assert fresh.offer(estimated(8, 1), 6) is Offer.OLD_EPOCH
    assert fresh.offer(estimated(6, 3), 6) is Offer.TAKEN, "its gate is new"
    work = fresh.candidate()
    assert work is not None
    bound, applied = fresh.enter(work)
    assert bound.item is not None
    assert (bound.item.block, bound.item.epoch) == (0, 3), "a new first block"
    assert [told.command for told in applied] == ["c1"]


def test_a_recovery_that_takes_too_long_says_what_was_wrong() -> None:
    recovery = Recovery(queue(), "w was restarted", 10.0, "p0")
    assert recovery.expired(39.0, 30.0) is None
    assert recovery.expired(41.0, 30.0) == "w was restarted, and in 30 s no pipeline had room for the stream"
    recovery.error = "w did not answer in time"
    assert recovery.expired(41.0, 30.0) == "w was restarted, and in 30 s w did not answer in time"


def test_illegal_moves_are_named() -> None:
    stopped = record()
    stopped.move(Phase.STOPPING)
    with pytest.raises(ValueError, match="stopping → recovering"):
        stopped.move(Phase.RECOVERING)


def test_a_worker_notices_that_it_stood_still() -> None:
    fence = Fence(1.5)
    assert not fence.check(100.0)
    assert not fence.check(101.2), "a second is no fault"
    assert fence.check(103.0)
    assert not fence.check(103.1), "once"


def test_what_was_begun_in_an_earlier_life_comes_to_nothing() -> None:
    lives, told = Lives(), list[str]()
    outcome = Outcome(None, None, 0, 0.0, 0.0)
    early = lives.of_this(lambda _: told.append("early"))
    lives.end()
    late = lives.of_this(lambda _: told.append("late"))
    early(outcome)
    late(outcome)
    assert told == ["late"]


def test_only_a_live_chunk_whose_last_frame_is_too_late_is_stale() -> None:
    stamp = estimated(0, 1).stamp
    assert not is_stale(stamp, 10**18)
    assert is_stale(stamp, 10**18 + 1)
    assert not is_stale(stamp.model_copy(update={"live": False}), 10**18 + 1)


def test_forgotten_jobs_are_those_of_the_named_ranks() -> None:
    jobs: JobQueue[str] = JobQueue()
    for rank in (Rank.ENCODE, Rank.DECODE, Rank.STAGE, Rank.CONTROL):
        jobs.put(Job(rank, 0, 0, rank.name))
    assert jobs.forget(Rank.ENCODE, Rank.DECODE) == 2
    left = [job.work for job in (jobs.pick(), jobs.pick()) if job is not None]
    assert left == ["CONTROL", "STAGE"]
    assert jobs.pick() is None
