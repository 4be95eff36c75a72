"""A new stream goes where there is room; a refusal says what to do, and whether to come back."""

from __future__ import annotations

import pytest

from services.scheduler.fleet import Fleet
from services.scheduler.messenger import RefusedError
from services.scheduler.placing import place
from services.scheduler.records import StreamRecord
from shared.contracts.commands import StartStream, StreamSpec
from shared.contracts.events import Beat

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


def test_the_pipeline_with_the_fewest_streams_is_chosen() -> None:
    both = fleet("p0", "p1")
    records: dict[str, StreamRecord] = {}
    for name in "abcd":
        record, pipeline = place(start(name), both, records, 2)
        records[name] = record
        assert record.pipeline == pipeline.name
    assert sorted(record.pipeline for record in records.values()) == ["p0", "p0", "p1", "p1"]
    with pytest.raises(RefusedError, match="full") as error:
        place(start("e"), both, records, 2)
    assert error.value.retry_after_s > 0


def test_the_models_defaults_fill_what_the_spec_leaves_open() -> None:
    record, _ = place(start(), fleet("p0"), {}, 4)
    assert (record.width, record.height) == (320, 192)
    assert record.noise == 0.5


def test_what_is_still_starting_may_be_asked_again_and_an_unknown_model_may_not() -> None:
    with pytest.raises(RefusedError, match="still starting") as not_ready:
        place(start(), fleet(), {}, 4)
    assert not_ready.value.retry_after_s > 0
    with pytest.raises(RefusedError, match="egress") as missing:
        place(start(), fleet("p0", services=("ingest", "motion")), {}, 4)
    assert missing.value.retry_after_s > 0
    with pytest.raises(RefusedError, match="sora") as unknown:
        place(start(spec=SPEC.model_copy(update={"model": "sora"})), fleet("p0"), {}, 4)
    assert unknown.value.retry_after_s == 0
