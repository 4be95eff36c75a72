"""The scheduler knows who is there from heartbeats alone."""

from __future__ import annotations

from services.scheduler.fleet import Fleet, Health
from shared.contracts.events import Beat


def worker(
    instance: str, stage: int, stages: int, roles: tuple[str, ...], incarnation: str = "a", **more: object
) -> Beat:
    values = {
        "service": "worker",
        "instance": instance,
        "incarnation": incarnation,
        "roles": roles,
        "model": "rheo-tiny",
    }
    return Beat.model_validate({**values, "pipeline": "p0", "stage": stage, "stages": stages, **more})


def test_a_pipeline_is_complete_when_every_stage_and_role_is_there() -> None:
    fleet = Fleet(1.5)
    fleet.beat(worker("w0", 0, 2, ("text", "encode", "stage")), 0.0)
    assert fleet.pipelines() == []
    fleet.beat(worker("w1", 1, 2, ("stage", "decode")), 0.0)
    (pipeline,) = fleet.pipelines()
    assert pipeline.workers == ("w0", "w1")
    assert pipeline.stages == 2


def test_a_worker_that_is_not_ready_or_serves_another_model_makes_no_pipeline() -> None:
    fleet = Fleet(1.5)
    fleet.beat(worker("w0", 0, 2, ("encode", "stage"), ready=False), 0.0)
    fleet.beat(worker("w1", 1, 2, ("stage", "decode")), 0.0)
    assert fleet.pipelines() == []
    fleet.beat(worker("w0", 0, 2, ("encode", "stage"), model="other"), 0.1)
    assert fleet.pipelines() == []


def test_missed_beats_are_told_once_and_a_worker_that_was_lost_comes_back_empty() -> None:
    fleet = Fleet(1.5)
    beat = worker("w0", 0, 1, ("encode", "stage", "decode"))
    assert fleet.beat(beat, 0.0) is Health.NEW
    assert fleet.beat(beat, 1.0) is Health.ALIVE
    assert fleet.newly_lost(2.4) == []
    assert fleet.newly_lost(2.6) == ["w0"]
    assert fleet.newly_lost(9.0) == []
    assert fleet.pipelines() == []
    assert fleet.beat(beat, 9.1) is Health.RETURNED, "a worker that missed its beats is fenced (rule 6)"


def test_who_stood_still_itself_gives_up_nobody_for_it() -> None:
    fleet = Fleet(1.5)
    fleet.beat(worker("w0", 0, 1, ("encode", "stage", "decode")), 10.0)
    assert fleet.newly_lost(10.1) == []
    assert fleet.newly_lost(15.1) == [], "its beats of five seconds may wait to be heard"
    assert fleet.newly_lost(15.2) == []
    lost = [name for step in range(1, 20) for name in fleet.newly_lost(15.2 + 0.1 * step)]
    assert lost == ["w0"], "but then it is lost as any other"


def test_a_new_incarnation_is_a_restart_even_without_a_gap() -> None:
    fleet = Fleet(1.5)
    fleet.beat(worker("w0", 0, 1, ("stage",)), 0.0)
    assert fleet.beat(worker("w0", 0, 1, ("stage",), incarnation="b"), 0.2) is Health.RETURNED


def test_the_instance_with_the_fewest_streams_is_picked() -> None:
    fleet = Fleet(1.5)
    for name, streams in (("e1", ("a", "b")), ("e2", ("c",))):
        fleet.beat(Beat(service="egress", instance=name, incarnation="x", streams=streams), 0.0)
    assert fleet.pick("egress") == "e2"
    assert fleet.pick("ingest") is None


def test_stages_that_do_not_count_up_or_whose_blocks_do_not_join_take_no_stream() -> None:
    def fleet_of(second_stage: int, second_stages: int, first: int, begins: int = 0) -> Fleet:
        fleet = Fleet(1.5)
        fleet.beat(worker("w0", 0, 2, ("encode", "stage"), first_block=begins, last_block=2), 0.0)
        more = {"first_block": first, "last_block": 5}
        fleet.beat(worker("w1", second_stage, second_stages, ("stage", "decode"), **more), 0.0)
        return fleet

    (pipeline,) = fleet_of(1, 2, 3).pipelines()
    assert pipeline.blocks == (range(3), range(3, 6))
    assert fleet_of(1, 2, 4).pipelines() == [], "block 3 is nowhere"
    assert fleet_of(1, 2, 2).pipelines() == [], "block 2 is twice"
    assert fleet_of(1, 2, 3, begins=1).pipelines() == [], "block 0 is nowhere"
    assert len(fleet_of(1, 2, 4).pipelines(usable=False)) == 1, "but it is seen, to be mended"
    assert fleet_of(2, 2, 3).pipelines(usable=False) == [], "there is no stage 1"
    assert fleet_of(1, 3, 3).pipelines(usable=False) == [], "its workers do not agree how many they are"
