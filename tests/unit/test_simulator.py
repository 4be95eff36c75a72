"""The scheduler under a virtual clock: what it must show, on small versions of the shipped scenarios."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from services.egress.core import Rules, StreamCore
from services.egress.stats import StreamMeter
from services.scheduler.policies import POLICIES
from services.scheduler.simulator import fleet_sim
from services.scheduler.simulator.clock import VirtualClock
from services.scheduler.simulator.measures import Histogram, Timeline
from services.scheduler.simulator.run import run_world, simulate
from services.scheduler.simulator.scenario import Scenario, ScenarioError, load_scenario, parse_scenario, shipped
from services.scheduler.simulator.sessions import Ledger, Session
from services.scheduler.simulator.trace import arrivals
from services.scheduler.simulator.workers import Rank, Worker, noise_table
from shared.contracts.events import SourceTotals

MS = 1_000_000


@cache
def result(scenario: str, policy: str = "slack") -> dict[str, Any]:
    return simulate(scenario, small(scenario), POLICIES[policy])


def small(name: str) -> Scenario:
    """The shipped scenario, shorter."""
    seconds = {"steady_095": 20, "overload_2x": 20, "rush_2x": 20, "burst_3x": 24, "straggler": 26, "worker_loss": 20}
    return load_scenario(name).model_copy(update={"seconds": float(seconds[name])})


# --- what it must show -----------------------------------------------------------------------------------------------


def test_at_095_of_what_fits_play_is_continuous_and_the_first_frame_comes_within_a_second() -> None:
    steady = result("steady_095")
    assert steady["cpr"] >= 0.99
    assert steady["on_time"] >= 0.99
    assert steady["first_frame_ms"]["p99"] <= 1000
    assert steady["utilisation"]["busiest"] >= 0.85, "it was really that busy"
    assert steady["sessions"]["refused"] == {}


def test_at_twice_what_fits_the_ladder_makes_room_while_fifo_collapses() -> None:
    slack, fifo, maxbatch = (result("overload_2x", policy) for policy in ("slack", "fifo", "maxbatch"))
    assert slack["sessions"] == fifo["sessions"], "the same trace, and nobody is refused"
    assert slack["cpr"] >= 0.95
    assert slack["on_time"] >= 0.95
    assert slack["first_frame_ms"]["p99"] <= 1000
    assert slack["tier_changes"] >= 1
    assert fifo["cpr"] <= 0.5
    assert maxbatch["cpr"] <= 0.5


def test_with_admission_as_well_those_that_are_let_in_keep_their_quality() -> None:
    rush = result("rush_2x")
    assert rush["sessions"]["refused"]["capacity"] >= 1
    assert rush["cpr"] >= 0.99
    assert rush["utilisation"]["busiest"] >= 0.6, "and the workers are not left idle for it"


def test_after_three_times_as_many_sessions_it_is_right_again_within_two_seconds() -> None:
    burst = result("burst_3x")
    assert burst["recovered_s"]["20"] is not None
    assert burst["recovered_s"]["20"] <= 2.0
    assert burst["cpr"] >= 0.95


def test_a_stage_that_became_slow_is_rebalanced_within_five_seconds() -> None:
    slow = result("straggler")
    moves = [move["at_s"] for move in slow["rebalanced"]]
    assert any(15.0 < at <= 20.0 for at in moves), moves
    assert slow["recovered_s"]["15"] is not None
    assert slow["recovered_s"]["15"] <= 5.0


def test_a_lost_worker_costs_its_streams_one_gap_each() -> None:
    lost = result("worker_loss")
    assert lost["lost_workers"] == 1
    assert lost["streams_moved"] >= 1
    assert lost["most_gaps"] == 1
    assert lost["frames"]["dropped"]


@pytest.mark.parametrize("seed", [8, 1])
def test_a_tenant_that_floods_changes_nothing_for_another(seed: int) -> None:
    shipped_one = load_scenario("tenant_flood").model_copy(update={"seconds": 24.0, "seed": seed})
    assert sum(flood.requests for flood in shipped_one.floods) == 100
    flooded = simulate("flooded", shipped_one, POLICIES["slack"])
    without = simulate("calm", shipped_one.model_copy(update={"floods": ()}), POLICIES["slack"])
    calm, flood, before = flooded["tenants"]["calm"], flooded["tenants"]["flood"], without["tenants"]["calm"]
    assert flood["sessions"]["admitted"] >= 1, "it gets what its quota allows"
    assert flood["sessions"]["refused"]["quota"] >= 90
    assert without["tenants"].keys() == {"calm"}
    assert calm["sessions"] == before["sessions"], "the same requests, and the same answers"
    assert calm["sessions"]["admitted"] == calm["sessions"]["asked"] >= 20
    assert calm["latency_ms"]["p95"] == pytest.approx(before["latency_ms"]["p95"], rel=0.1)
    assert calm["cpr"] == pytest.approx(before["cpr"], abs=0.005)
    assert min(calm["cpr"], flood["cpr"]) >= 0.99
    assert flooded["frames"]["reconciles"]


def test_without_a_quota_a_flood_gets_what_is_free_and_then_what_is_fair() -> None:
    plain = load_scenario("tenant_flood").model_dump(mode="json")
    told = simulate("no quota", parse_scenario({**plain, "seconds": 24.0, "tenants": {}}), POLICIES["slack"])["tenants"]
    assert told["flood"]["sessions"]["refused"].keys() == {"capacity"}
    assert told["calm"]["sessions"]["refused"].keys() <= {"capacity"}
    assert told["calm"]["sessions"]["admitted"] > told["flood"]["sessions"]["admitted"] > 8
    assert min(told["calm"]["cpr"], told["flood"]["cpr"]) >= 0.99, "nobody who was let in suffers"


@pytest.mark.parametrize("policy", ["slack", "fifo"])
@pytest.mark.parametrize("scenario", ["steady_095", "overload_2x", "burst_3x", "worker_loss"])
def test_every_frame_has_one_verdict_whatever_happens(scenario: str, policy: str) -> None:
    frames = result(scenario, policy)["frames"]
    assert frames["reconciles"]
    assert frames["in"] > 0


def test_a_run_is_repeated_to_the_last_figure_and_another_seed_is_another_run() -> None:
    first, again = result("worker_loss"), simulate("worker_loss", small("worker_loss"), POLICIES["slack"])
    assert {**first, "cpu_s": 0} == {**again, "cpu_s": 0}
    other = simulate("worker_loss", small("worker_loss").model_copy(update={"seed": 99}), POLICIES["slack"])
    assert other["frames"] != first["frames"]


def test_a_stall_shorter_than_the_beats_time_out_costs_no_pipeline() -> None:
    plain = small("worker_loss").model_dump(mode="json")
    plain["faults"] = [{"kind": "stall", "at_s": 8, "seconds": 1, "pipeline": 0}]
    stalled = simulate("stall", parse_scenario(plain), POLICIES["slack"])
    assert stalled["lost_workers"] == 0
    assert stalled["frames"]["reconciles"]
    assert stalled["recovered_s"]["8"] is not None
    assert stalled["recovered_s"]["8"] <= 2.5


def test_a_pipeline_that_is_alone_gets_its_streams_back_when_its_worker_returns() -> None:
    plain = small("worker_loss").model_dump(mode="json")
    plain["fleet"]["pipelines"], plain["streams"]["load"] = 1, 0.5
    plain["faults"] = [{"kind": "loss", "at_s": 8, "seconds": 4, "pipeline": 0}]
    world, _ = run_world(parse_scenario(plain), POLICIES["slack"])
    assert all(session.gaps() == 1 for session in world.sessions)
    assert world.ledger.timeline.right_again(8.0) is not None


# --- its parts -------------------------------------------------------------------------------------------------------


def test_the_player_gives_the_verdicts_that_egress_gives() -> None:
    """The same chunks through both: on time, late, stalled, and when their credits come back."""
    deadline = 500 * MS
    clock, ledger = VirtualClock(), Ledger(60)
    session = Session("s", clock, ledger, 16.0, deadline, 64, 1 << 60)
    egress = StreamCore(Rules(live=True, deadline_ns=deadline), 1)
    session.begin(0)
    # Compute times that swing: some chunks late in part, some altogether.
    takes = [120, 90, 150, 330, 100, 420, 610, 80, 80, 300, 520, 90] * 4
    closed, emitted, meter = list[int](), list[int](), StreamMeter(0)
    for number, ms in enumerate(takes):
        while session.chunk <= number:
            clock.run(clock.now + 5 * MS)
        stamp = session.open[number]
        ready = max(stamp.frames[-1].captured_ns + ms * MS, clock.now)
        egress.captured(stamp, SourceTotals(), clock.now)
        clock.run(ready)
        session.ready(number, ready)
        egress.ready(stamp, ready)
        # Egress acts in time: what is due is shown when it is due.
        last = max(ready, stamp.frames[-1].captured_ns + (session.playout.delay_ns or 0))
        for at in sorted({ready, *(max(ready, f.captured_ns + (session.playout.delay_ns or 0)) for f in stamp.frames)}):
            due = egress.due(at, 99)
            for emit in due.emits:
                meter.emitted(emit.frame, at)
                emitted.append(at)
            closed += [verdict.chunk for verdict in due.closes]
        assert closed[-1] == number
        assert last >= ready
    totals = egress.ledger.totals()
    assert (session.on_time, session.late) == (totals.on_time, totals.late)
    assert session.late > 0
    stats = meter.stats()
    assert session.stalled_ns / (emitted[-1] - emitted[0]) == pytest.approx(1.0 - stats.cpr, abs=1e-9)
    assert stats.cpr < 1.0


def test_a_source_without_credit_gives_its_newest_frames_and_counts_the_others() -> None:
    clock, ledger = VirtualClock(), Ledger(60)
    session = Session("s", clock, ledger, 10.0, 500 * MS, 1, 1 << 60)
    session.begin(0)
    clock.run(1900 * MS)  # 19 frames: five are in chunk 0, whose credit has not come back
    session.ready(0, 1900 * MS)
    clock.run(1950 * MS)
    assert session.chunk == 2
    newest = session.open[1].frames
    assert [frame.captured_ns // MS for frame in newest] == [1600, 1700, 1800, 1900]
    assert ledger.dropped == {"ingest:no_credit": 11}
    assert session.gaps() == 1, "chunk 0 was late, and what followed it was lost: one gap"


def test_a_lower_pace_leaves_frames_out_on_purpose() -> None:
    clock, ledger = VirtualClock(), Ledger(60)
    session = Session("s", clock, ledger, 16.0, 500 * MS, 99, 1 << 60)
    session.begin(0)
    session.pace(8.0)
    clock.run(2_400 * MS)
    assert ledger.dropped["ingest:rate"] == pytest.approx(ledger.frames_in / 2, abs=4)
    assert session.due == 0
    assert session.gaps() == 0


def test_a_worker_runs_what_is_due_first_and_says_nothing_once_it_is_lost() -> None:
    clock, done = VirtualClock(), list[tuple[str, float]]()
    worker = Worker("w", clock, noise_table(1, 0.0, 0.0, 1.0), 0)

    def tell(what: str, ms: float) -> None:
        done.append((what, ms))

    worker.submit(Rank.STAGE, 900 * MS, 10.0, tell, "first")
    worker.submit(Rank.ENCODE, 500 * MS, 10.0, tell, "urgent")
    worker.submit(Rank.STAGE, 900 * MS, 10.0, tell, "second")
    worker.submit(Rank.DECODE, 900 * MS, 10.0, tell, "picture")
    clock.run(35 * MS)
    assert [what for what, _ in done] == ["first", "urgent", "picture"]
    worker.slow = 3.0
    clock.run(40 * MS)
    worker.submit(Rank.STAGE, 0, 10.0, tell, "slow")
    worker.stall(100 * MS)
    clock.run(300 * MS)
    assert done[-1] == ("slow", pytest.approx(100.0)), "it was stopped in the middle, and went on"
    worker.submit(Rank.STAGE, 0, 10.0, tell, "never")
    lost = worker.lose()
    worker.submit(Rank.STAGE, 0, 10.0, tell, "not even taken")
    clock.run(900 * MS)
    assert lost == [(Rank.STAGE, "never")]
    assert done[-1][0] == "slow"


def test_the_trace_is_the_scenarios_alone() -> None:
    scenario = load_scenario("overload_2x")
    assert arrivals(scenario, 20.0) == arrivals(scenario, 20.0)
    assert arrivals(scenario, 20.0) != arrivals(scenario.model_copy(update={"seed": 7}), 20.0)
    burst = load_scenario("burst_3x")
    more = [arrival for arrival in arrivals(burst, 10.0) if arrival.burst]
    assert len(more) == 20
    assert all(arrival.at_s + arrival.life_s == pytest.approx(20.0) for arrival in more)
    flood = load_scenario("tenant_flood")
    both = arrivals(flood, 10.0)
    assert sum(arrival.tenant == "flood" for arrival in both) == 100
    assert [arrival for arrival in both if arrival.tenant == "calm"] == arrivals(
        flood.model_copy(update={"floods": ()}), 10.0
    )


def test_measures() -> None:
    histogram = Histogram()
    for ms in range(1, 101):
        histogram.add(ms * MS)
    assert (histogram.percentile(0.5), histogram.percentile(0.99)) == (50.0, 99.0)
    timeline = Timeline(10)
    for second in range(10):
        timeline.add(second * 1_000 * MS, 10, 0 if second in (4, 5) else 10)
    assert timeline.right_again(4.0) == pytest.approx(1.25)
    assert timeline.right_again(7.0) == 0.0


# --- scenarios -------------------------------------------------------------------------------------------------------


def test_the_shipped_scenarios_are_valid_and_have_titles() -> None:
    names = shipped()
    assert {
        "steady_095",
        "overload_2x",
        "rush_2x",
        "burst_3x",
        "straggler",
        "worker_loss",
        "fleet_10k",
        "tenant_flood",
    } <= names.keys()
    assert all(names.values())
    big = load_scenario("fleet_10k")
    assert big.fleet.pipelines * big.fleet.stages == 1000
    assert (big.streams.count, big.seconds) == (10_000, 60)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"fleet": {"device": "abacus"}}, "fleet|no device 'abacus'; known: cpu-2core"),
        ({"fleet": {"model": "nothing"}}, "no model 'nothing'"),
        ({"fleet": {"pipelins": 3}}, "fleet.pipelins: Extra inputs"),
        ({"fleet": {"width": 100}}, "multiples of 16"),
        ({"streams": {"load": 1, "count": 3}}, "either load or count"),
        ({"streams": {"load": 1, "fps": 0}}, "streams.fps"),
        ({"streams": {"load": 1, "poisson": True}}, "lifetime_s"),
        ({"faults": [{"kind": "loss", "at_s": 1, "pipeline": 9}]}, "pipeline 9"),
        ({"floods": [{"tenant": "", "at_s": 1}]}, "floods.0.tenant"),
        ({"tenants": {"flood": {"max_share": 2}}}, "tenants.flood.max_share"),
        ({"faults": [{"kind": "boredom", "at_s": 1}]}, "faults.0.kind"),
    ],
)
def test_what_cannot_be_run_is_one_line_that_names_the_field(change: dict[str, Any], line: str) -> None:
    with pytest.raises(ScenarioError, match=line) as refused:
        parse_scenario({"streams": {"load": 0.5}, **change})
    assert "\n" not in str(refused.value)


def test_a_users_file_in_toml_or_json(tmp_path: Any) -> None:
    toml = tmp_path / "mine.toml"
    toml.write_text("seconds = 5\n[streams]\nload = 0.5\n")
    assert load_scenario(str(toml)).seconds == 5
    plain = tmp_path / "mine.json"
    plain.write_text(json.dumps({"streams": {"count": 3}}))
    assert load_scenario(str(plain)).streams.count == 3
    plain.write_text("{")
    with pytest.raises(ScenarioError, match="is not JSON"):
        load_scenario(str(plain))
    toml.write_text("= 3")
    with pytest.raises(ScenarioError, match="is not TOML"):
        load_scenario(str(toml))
    with pytest.raises(ScenarioError, match="give one of burst_3x"):
        load_scenario("nothing")


def test_the_command_tells_one_json_line_and_refuses_in_one(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    from services.scheduler.simulator.__main__ import main

    assert main(["--scenario", "steady_095", "--seconds", "5", "--policy", "fifo", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["policy"], told["seconds"], told["scenario"]) == ("fifo", 5.0, "steady_095")
    assert err == ""
    assert main(["--scenario", "steady_095", "--seconds", "5"]) == 0
    assert "continuous play" in capsys.readouterr().out
    assert main(["--list"]) == 0
    assert "overload_2x" in capsys.readouterr().out
    bad = tmp_path / "bad.toml"
    bad.write_text("[streams]\nload = -1\n")
    assert main(["--scenario", str(bad), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "streams.load" in err
    assert main(["--scenario", "steady_095", "--seconds", "0"]) == 2


def test_policies_differ_in_nothing_but_their_rules() -> None:
    assert set(POLICIES) == {"slack", "edf", "fifo", "maxbatch"}
    assert replace(POLICIES["edf"], name="x").growth is POLICIES["slack"].growth


def test_edf_is_the_same_but_for_the_order() -> None:
    edf = result("steady_095", "edf")
    assert edf["frames"]["reconciles"]
    assert edf["tier_changes"] == 0, "only the scheduler itself has a ladder"


def test_the_command_line_offers_the_policies_that_there_are() -> None:
    from services.cli.planning import POLICIES as OFFERED

    assert set(OFFERED) == set(POLICIES)


def test_rheocast_simulate_launches_it_and_passes_on_what_it_says(capfd: pytest.CaptureFixture[str]) -> None:
    from click.testing import CliRunner

    from services.cli.commands import cli

    done = CliRunner().invoke(cli, ["simulate", "--scenario", "steady_095", "--seconds", "3", "--json"])
    assert done.exit_code == 0
    assert json.loads(capfd.readouterr().out)["seconds"] == 3.0
    refused = CliRunner().invoke(cli, ["simulate", "--scenario", "nothing"])
    assert refused.exit_code == 2
    assert "give one of burst_3x" in capfd.readouterr().err


def test_pipelines_that_have_nothing_to_do_with_each_other_run_apart_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = load_scenario("fleet_10k").model_dump(mode="json")
    plain["seconds"] = 8
    plain["fleet"]["pipelines"], plain["streams"]["count"] = fleet_sim.MANY + 2, 150
    many = parse_scenario(plain)
    assert fleet_sim.apart(many)
    apart = simulate("many", many, POLICIES["slack"])
    monkeypatch.setattr(fleet_sim, "MANY", 1000)
    together = simulate("many", many, POLICIES["slack"])
    for changing in ("cpu_s", "events"):
        del apart[changing], together[changing]
    assert apart == together
    assert apart["frames"]["on_time"] > 5_000
