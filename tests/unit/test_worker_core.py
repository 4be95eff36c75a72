"""Which job the device runs next, and what a stage makes of a batch's number."""

from __future__ import annotations

from services.worker.core import BatchSequencer, Job, JobQueue, Rank, SequenceVerdict
from shared.contracts.events import StageBatch


def batch(seq: int, generation: int = 1, term: int = 1) -> StageBatch:
    return StageBatch(pipeline="p0", term=term, generation=generation, seq=seq, entries=(), height=64, width=96)


def order(*jobs: Job[str]) -> list[str]:
    queue: JobQueue[str] = JobQueue()
    for job in jobs:
        assert queue.put(job)
    picked: list[str] = []
    while (job := queue.pick()) is not None:
        picked.append(job.work)
    return picked


def test_without_deadlines_jobs_run_as_they_came_and_the_one_nearest_to_the_picture_wins_a_tie() -> None:
    assert order(
        Job(Rank.ENCODE, 0, 1, "encode"), Job(Rank.STAGE, 0, 2, "stage"), Job(Rank.DECODE, 0, 2, "decode")
    ) == ["encode", "decode", "stage"]


def test_the_nearest_deadline_goes_first_and_live_goes_before_lossless() -> None:
    assert order(
        Job(Rank.DECODE, 0, 1, "lossless decode"), Job(Rank.STAGE, 900, 2, "later"), Job(Rank.ENCODE, 500, 3, "sooner")
    ) == ["sooner", "later", "lossless decode"]


def test_a_role_keeps_the_order_its_jobs_came_in_even_against_deadlines() -> None:
    assert order(Job(Rank.STAGE, 900, 1, "first"), Job(Rank.STAGE, 100, 2, "second")) == ["first", "second"]


def test_control_goes_before_everything() -> None:
    assert order(Job(Rank.DECODE, 1, 1, "decode"), Job(Rank.CONTROL, 0, 2, "open"))[0] == "open"


def test_a_full_queue_refuses_and_counts() -> None:
    queue: JobQueue[str] = JobQueue(size=1)
    assert queue.put(Job(Rank.STAGE, 0, 1, "a"))
    assert not queue.put(Job(Rank.STAGE, 0, 2, "b"))
    assert queue.refused == 1


def test_batches_run_in_their_dense_order_and_a_held_one_follows_the_missing_one() -> None:
    sequencer = BatchSequencer()
    verdict, run, fresh = sequencer.arrive(batch(0), 10)
    assert (verdict, [b.seq for b in run], fresh) == (SequenceVerdict.RUN, [0], True)
    verdict, run, fresh = sequencer.arrive(batch(2), 20)
    assert (verdict, run, fresh) == (SequenceVerdict.HELD, [], False)
    assert sequencer.gap_age_ns(50) == 30
    verdict, run, _ = sequencer.arrive(batch(1), 60)
    assert (verdict, [b.seq for b in run]) == (SequenceVerdict.RUN, [1, 2])
    assert sequencer.gap_age_ns(99) == 0


def test_a_repeated_batch_is_never_run_twice() -> None:
    sequencer = BatchSequencer()
    sequencer.arrive(batch(0), 1)
    assert sequencer.arrive(batch(0), 2)[0] is SequenceVerdict.REPEATED
    sequencer.arrive(batch(2), 3)
    assert sequencer.arrive(batch(2), 4)[0] is SequenceVerdict.REPEATED


def test_a_new_generation_empties_the_slots_and_an_old_one_is_fenced() -> None:
    sequencer = BatchSequencer()
    sequencer.arrive(batch(0), 1)
    sequencer.arrive(batch(5), 2)
    verdict, run, fresh = sequencer.arrive(batch(0, generation=2), 3)
    assert (verdict, [b.generation for b in run], fresh) == (SequenceVerdict.RUN, [2], True)
    assert sequencer.arrive(batch(1), 4)[0] is SequenceVerdict.OLD
    assert sequencer.arrive(batch(0, generation=1, term=2), 5)[0] is SequenceVerdict.RUN, "a new term counts from anew"


def test_what_waits_behind_a_gap_is_bounded() -> None:
    sequencer = BatchSequencer(max_held=2)
    verdicts = [sequencer.arrive(batch(seq), seq)[0] for seq in (1, 2, 3)]
    assert verdicts == [SequenceVerdict.HELD, SequenceVerdict.HELD, SequenceVerdict.FULL]
