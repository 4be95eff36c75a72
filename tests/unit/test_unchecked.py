"""Messages made without a check are the messages that a check would have made."""

from __future__ import annotations

import pytest

from services.scheduler.batch_messages import stage_batch, timing
from services.scheduler.works import Work
from shared.contracts.codec import decode, encode
from shared.contracts.events import BatchEntry, ChunkStamp, FrameStamp, StageBatch, StageTiming
from shared.contracts.refs import TensorPlace, TensorRef
from shared.engine.plan.spec import PRESETS
from shared.engine.plan.stream_plan import StreamPlan

REF = TensorRef(owner="w", host="h", place=TensorPlace.LOCAL, shape=(1, 16, 8, 8), dtype="float32")
EMPTY = REF.model_copy(update={"shape": (1, 16, 0, 8)})


def work(inputs: tuple[TensorRef, ...] = (REF,)) -> Work:
    stamp = ChunkStamp(stream="a", epoch=1, chunk=0, frames=(FrameStamp(index=0, pts=0, captured_ns=5),))
    item = StreamPlan.for_model("a", 1, PRESETS["rheo-tiny"]).enter(2, 0.7, (700,), 1, 1)
    return Work("a", 2, (stamp,), inputs, 0, 0, 3, item=item, timings=(timing("scheduler", 1.5, 0.0),))


def test_a_batch_is_equal_to_the_one_that_was_checked_and_reads_the_same() -> None:
    made = stage_batch("p", 2, 3, 4, [work()], 64, 96, 7)
    entry = BatchEntry(
        item=made.entries[0].item, stamps=work().stamps, inputs=(REF,),
        timings=(StageTiming(hop="scheduler", queue_ms=1.5, compute_ms=0.0),),
    )  # fmt: skip
    checked = StageBatch(
        pipeline="p", term=2, generation=3, seq=4, entries=(entry,), height=64, width=96, scheduled_ns=7
    )
    assert made == checked
    assert repr(made) == repr(checked)
    assert hash(made) == hash(checked)
    assert encode(made) == encode(checked), "field by field, in the same order"
    assert decode((StageBatch,), encode(made)) == checked
    assert made.model_copy(update={"seq": 5}).seq == 5


def test_what_a_chunk_without_a_source_carries_is_left_out_and_an_unbound_work_cannot_be_sent() -> None:
    assert stage_batch("p", 1, 1, 0, [work((EMPTY,))], 64, 96, 0).entries[0].inputs == ()
    unbound = work()
    unbound.item = None
    with pytest.raises(ValueError, match="without an item"):
        stage_batch("p", 1, 1, 0, [unbound], 64, 96, 0)
