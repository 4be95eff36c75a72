"""A new stream goes where there is room; a refusal says what to do, and whether to come back."""

from __future__ import annotations

import pytest

from services.scheduler.admitting import Admitting
from services.scheduler.cost_model import CostModel
from services.scheduler.fleet import Fleet, Pipeline
from services.scheduler.messenger import RefusedError
from services.scheduler.placing import place
from services.scheduler.records import StreamRecord
from services.scheduler.settings import Settings
from shared.clock import SystemClock
from shared.contracts.commands import StartStream, StreamSpec
from shared.contracts.events import Beat
from shared.contracts.tiers import CapacityAsked, Refusal
from shared.engine.plan.registry import model_spec
from tests.support.costs import KnownCosts

SPEC = StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon"})


def fleet(*pipelines: str, services: tuple[str, ...] = ("ingest", "egress", "motion")) -> Fleet:
    made = Fleet(1.5)
    for pipeline in pipelines:
        beat = {"service": "worker", "instance": f"w-{pipeline}", "incarnation": "a", "pipeline": pipeline, "stage": 0}
        more = {"stages": 1, "roles": ("text", "encode", "stage", "decode"), "model": "rheo-tiny"}
        made.beat(Beat.model_validate({**beat, **more}), 0.0)
    for service in services:
        made.beat(Beat(service=service, instance=f"{service}-0", incarnation="a"), 0.0)
    return made


def start(stream: str = "a", spec: StreamSpec = SPEC) -> StartStream:
    return StartStream(command="c", stream=stream, spec=spec)


def admitting_on(made: Fleet, max_streams: int = 16, costs: KnownCosts | None = None) -> Admitting:
    settings = Settings(max_streams=max_streams)
    return Admitting(settings, made, SystemClock(), lambda _: costs or CostModel())


def placed(command: StartStream, made: Fleet) -> tuple[StreamRecord, Pipeline]:
    return place(command, made, admitting_on(made).admit)


def test_the_pipeline_with_the_fewest_streams_is_chosen() -> None:
    both = fleet("p0", "p1")
    admitting = admitting_on(both, max_streams=2)
    records: dict[str, StreamRecord] = {}
    for name in "abcd":
        record, pipeline = place(start(name), both, admitting.admit)
        records[name] = record
        assert record.pipeline == pipeline.name
        assert record.workers == pipeline.workers
        assert record.promise is not None
        assert record.promise.tier.steps == SPEC.steps
    assert sorted(record.pipeline for record in records.values()) == ["p0", "p0", "p1", "p1"]
    with pytest.raises(RefusedError, match="full") as error:
        place(start("e"), both, admitting.admit)
    assert error.value.retry_after_s > 0
    assert error.value.refusal is Refusal.CAPACITY
    admitting.leave("b")
    place(start("e"), both, admitting.admit)


def test_what_is_refused_for_another_reason_reserves_nothing() -> None:
    half = fleet("p0", services=("ingest",))
    admitting = admitting_on(half)
    with pytest.raises(RefusedError, match="egress"):
        place(start(), half, admitting.admit)
    assert admitting.admission.books == {}


def test_capacity_names_the_tiers_and_agrees_with_what_is_placed() -> None:
    one = fleet("p0")
    admitting = admitting_on(one, 64, KnownCosts())
    asked = CapacityAsked(width=160, height=96, fps=8.0, deadline_ms=900)
    told = admitting.capacity(asked)
    assert told.known
    assert (told.streams, told.pipelines, told.error) == (0, 1, None)
    first = told.tiers[0]
    assert (first.tier.steps, first.tier.fps, first.tier.width) == (2, 8.0, 160)
    assert 0 < first.load < 1
    assert first.latency_ms > 375
    assert told.tiers[1].tier.steps == 1
    assert told.tiers[1].more > first.more
    spec = SPEC.model_copy(update={"width": 160, "height": 96, "fps": 8.0, "deadline_ms": 900})
    for number in range(first.more):
        place(start(f"s{number}", spec), one, admitting.admit)
    with pytest.raises(RefusedError) as error:
        place(start("more", spec), one, admitting.admit)
    assert error.value.tier is not None
    assert admitting.capacity(asked).tiers[0].more == 0
    assert "sora" in str(admitting.capacity(CapacityAsked(model="sora")).error)
    assert "1…" in str(admitting.capacity(CapacityAsked(steps=9)).error)
    unready = admitting_on(fleet()).capacity(CapacityAsked())
    assert unready.refusal is Refusal.NOT_READY
    assert unready.retry_after_s > 0


def test_the_models_defaults_fill_what_the_spec_leaves_open() -> None:
    record, _ = placed(start(), fleet("p0"))
    assert (record.width, record.height) == (320, 192)
    assert record.noise == 0.5


def test_what_is_still_starting_may_be_asked_again_and_an_unknown_model_may_not() -> None:
    with pytest.raises(RefusedError, match="still starting") as not_ready:
        placed(start(), fleet())
    assert not_ready.value.retry_after_s > 0
    with pytest.raises(RefusedError, match="egress") as missing:
        placed(start(), fleet("p0", services=("ingest", "motion")))
    assert missing.value.retry_after_s > 0
    with pytest.raises(RefusedError, match="sora") as unknown:
        placed(start(spec=SPEC.model_copy(update={"model": "sora"})), fleet("p0"))
    assert unknown.value.retry_after_s == 0


def test_a_stream_is_steadied_as_its_model_wants_or_as_it_asks() -> None:
    assert placed(start(), fleet("p0"))[0].steadying == model_spec("rheo-tiny").steadying > 0
    without = SPEC.model_copy(update={"steadying": 0.0})
    assert placed(start(spec=without), fleet("p0"))[0].steadying == 0
