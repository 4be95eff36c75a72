"""Messages made without a check are the messages that a check would have made."""

from __future__ import annotations

from typing import Any

import pytest

from services.scheduler import batch_messages
from services.scheduler.batch_messages import stage_batch
from services.scheduler.policies import POLICIES
from services.scheduler.simulator import pipelines, sessions
from services.scheduler.simulator.run import simulate
from services.scheduler.simulator.scenario import load_scenario
from services.scheduler.works import Work
from shared.contracts import timing
from shared.contracts.codec import decode, encode
from shared.contracts.events import BatchEntry, ChunkStamp, FrameStamp, StageBatch, StageTiming
from shared.contracts.refs import TensorPlace, TensorRef, Wire
from shared.contracts.timing import timing_of
from shared.contracts.unchecked import unchecked
from shared.engine.plan.spec import PRESETS
from shared.engine.plan.stream_plan import StreamPlan

REF = TensorRef(owner="w", host="h", place=TensorPlace.LOCAL, shape=(1, 16, 8, 8), dtype="float32")
EMPTY = REF.model_copy(update={"shape": (1, 16, 0, 8)})


def work(inputs: tuple[TensorRef, ...] = (REF,)) -> Work:
    stamp = ChunkStamp(stream="a", epoch=1, chunk=0, frames=(FrameStamp(index=0, pts=0, captured_ns=5),))
    item = StreamPlan.for_model("a", 1, PRESETS["rheo-tiny"]).enter(2, 0.7, (700,), 1, 1)
    return Work(
        "a",
        2,
        (stamp,),
        inputs,
        0,
        0,
        3,
        item=item,
        timings=(timing_of("scheduler", 0, 2_500_000, 4_000_000, pipeline="p"),),
    )


def test_a_batch_is_equal_to_the_one_that_was_checked_and_reads_the_same() -> None:
    made = stage_batch("p", 2, 3, 4, [work()], 64, 96, 7)
    entry = BatchEntry(
        item=made.entries[0].item, stamps=work().stamps, inputs=(REF,),
        timings=(StageTiming(hop="scheduler", queue_ms=1.5, compute_ms=0.0, begin_ns=4_000_000, pipeline="p"),),
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


def test_all_that_the_simulator_and_the_core_make_would_have_passed_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    made: set[str] = set()

    def checked(kind: type[Wire], fields: dict[str, Any]) -> Wire:
        made.add(kind.__name__)
        assert list(fields) == list(kind.model_fields), "a field that a contract gained is missing here"
        message = unchecked(kind, fields)
        assert kind.model_validate(fields, strict=True) == message
        return message

    for module in (batch_messages, pipelines, sessions, timing):
        monkeypatch.setattr(module, "unchecked", checked)
    small = load_scenario("straggler").model_copy(update={"seconds": 3.0})
    result = simulate("small", small, POLICIES["slack"])
    assert result["frames"]["on_time"] > 0
    assert made == {
        "FrameStamp", "ChunkStamp", "MotionEstimated", "StageTiming", "BatchEntry", "StageBatch", "ItemResult", "BatchDone"
    }  # fmt: skip
