"""A stream is let in when everything promised still fits; who is not hears why, when to come again, and what would fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.scheduler.admission import Admission, Admitted, Refused, Rules
from services.scheduler.cost_model import CostModel
from services.scheduler.pricing import Book, Host, Priced
from services.scheduler.quotas import TenantLimits, Tenants
from services.scheduler.settled import Settled
from shared.contracts.tiers import Refusal
from tests.support.costs import KnownCosts, demand, shape


def admission(*pipelines: str, rules: Rules | None = None, costs: KnownCosts | None = None) -> Admission:
    made = Admission(rules or Rules(max_streams=64))
    for name in pipelines or ("p0",):
        made.pipeline(name, shape(), costs or KnownCosts())
    return made


def fill(adm: Admission, tenant: str = "a", now: float = 0.0, **changes: object) -> int:
    count = 0
    while isinstance(adm.admit(f"{tenant}{count}", tenant, demand(**changes), list(adm.books), now), Admitted):
        count += 1
    return count


def test_load_is_the_sum_of_what_the_workers_do_for_a_second() -> None:
    costs = KnownCosts(stage_fixed=0.0)
    book = Book(shape(max_batch=1), costs)
    # 2 chunks a second: 2 forwards of 60 tokens (6 ms each), encode and decode of 3 ms each.
    assert book.load(demand()) == pytest.approx(2 * (2 * 6.0 + 3.0 + 3.0) / 1000.0)
    spread = Book(shape(stages=2, max_batch=1), costs)
    assert spread.load(demand()) == pytest.approx(2 * (2 * 6.0 + 3.0) / 1000.0), "the slowest worker counts"
    assert book.load(demand(live=False)) == 0.0, "what may wait takes what is left"


def test_a_batch_shares_what_a_forward_costs_in_any_case() -> None:
    book = Book(shape(), KnownCosts(stage_fixed=6.0))
    alone = book.load(demand())
    assert book.load(demand(), 8) < 8 * alone * 0.8
    assert Book(shape(max_batch=1), KnownCosts(stage_fixed=6.0)).load(demand(), 8) == pytest.approx(8 * alone)


def test_a_batch_that_would_miss_a_deadline_is_not_counted_on() -> None:
    tight = demand(deadline_ms=demand().capture_ms + 30.0 + 2 * 2 * 20.0)  # 2 forwards of 20 ms, and as long a wait
    book = Book(shape(), KnownCosts(stage_fixed=6.0))
    assert book._batch(tight.bucket, 8, [tight]) == 2  # 18 ms; four would take 30


def test_what_forwards_are_priced_at_depends_on_no_correction_and_no_neighbour() -> None:
    costs, busy = KnownCosts(stage_fixed=4.0), Host("h", cores=2.0, fixed=0.1, per_chunk=0.01, per_mpix=1.0)
    book = Book(shape(host=busy), costs)
    assert book.forwards()["h"] == Priced(), "nobody is here"
    book.add(demand(), 3)
    book.add(replace(demand(), live=False))
    plain = book.forwards()["h"]
    alone = (
        3
        * Book(shape(max_batch=1, host=replace(busy, fixed=0, per_chunk=0, per_mpix=0)), costs).loads(demand()).cores[0]
        * 2
    )
    assert plain.cores == pytest.approx(alone), "as if no two items shared a forward"
    assert plain.work == 3 * demand().tokens * demand().chunks_per_s * (demand().steps + 1), (
        "who takes what is left has none"
    )
    book.shape, book.neighbours = shape(host=replace(busy, correction=1.7)), {"h": 0.4}
    assert book.forwards()["h"].cores == pytest.approx(plain.cores)


def test_the_hosts_cores_are_a_limit_beside_the_workers_time() -> None:
    costs = KnownCosts(stage_fixed=0.0)
    alone = Book(shape(max_batch=1), costs).load(demand())
    busy = Host("h", cores=0.5, fixed=0.1, per_chunk=0.01, per_mpix=1.0)
    loads = Book(shape(max_batch=1, host=busy), costs).loads(demand())
    assert loads.lanes[0][0] == pytest.approx(alone)
    assert loads.cores[0] == pytest.approx((alone + 0.1 + 2 * 0.01 + 160 * 96 * 8 / 1e6) / 0.5)
    assert loads.most == loads.cores[0] > alone
    corrected = Book(shape(max_batch=1, host=replace(busy, correction=1.5)), costs).loads(demand())
    assert corrected.lanes[0][0] == loads.lanes[0][0], "how long a forward takes is measured"
    assert corrected.cores[0] == pytest.approx(loads.cores[0] + 0.5 * alone / 0.5), (
        "what it uses of the cores is corrected"
    )
    gpu = replace(shape(max_batch=1, host=busy), threads=(0,))
    assert Book(gpu, costs).loads(demand()).cores[0] == pytest.approx(loads.cores[0] - alone / 0.5), "its own cores"


def test_small_jobs_of_blocks_and_autoencoder_run_beside_each_other_and_large_ones_take_all_threads() -> None:
    costs = KnownCosts(stage_fixed=0.0)
    host = Host("h", cores=2.0)
    both = replace(shape(max_batch=1, host=host), threads=(2,), wide_from={"stage.0": 61, "encode": 61, "decode": 61})
    loads = Book(both, costs).loads(demand())
    assert loads.lanes[0] == pytest.approx((2 * 2 * 6.0 / 1000.0, 2 * 6.0 / 1000.0))
    assert loads.cores[0] == pytest.approx(sum(loads.lanes[0]) / 2)
    wide = Book(replace(both, wide_from={"stage.0": 60, "encode": 61, "decode": 61}), costs).loads(demand())
    assert wide.lanes[0] == pytest.approx((24.0 / 1000.0, 36.0 / 1000.0)), "a wide forward keeps both lanes"
    assert wide.cores[0] == pytest.approx((2 * 24.0 + 12.0) / 2000.0)


def test_forwards_are_slower_on_full_cores_but_cost_no_more_of_them() -> None:
    costs = KnownCosts(stage_fixed=0.0)
    free, full = (Host("h", cores=1.0, used=used, crowding=0.5) for used in (0.0, 1.0))
    measured_alone, measured_full = (
        Book(shape(max_batch=1, host=host), costs).loads(demand()) for host in (free, full)
    )
    cores = measured_alone.cores[0]
    assert measured_alone.lanes[0][0] == pytest.approx(cores * (1 + 0.5 * cores))
    assert measured_full.cores[0] == pytest.approx(cores / 1.5), "they were measured 1.5 times as long as alone"


def test_pipelines_on_one_host_share_its_cores_and_others_do_not() -> None:
    adm = Admission(Rules(max_streams=64))
    here, there = (Host(name, cores=1.0, fixed=0.1) for name in ("here", "there"))
    costs = KnownCosts()
    for name, host in (("p0", here), ("p1", here), ("p2", there)):
        adm.pipeline(name, shape(host=host), costs)
    before = adm.capacity("a", demand(), ["p1"], 0.0)
    assert isinstance(adm.admit("x", "a", demand(), ["p0"], 0.0), Admitted)
    assert adm.capacity("a", demand(), ["p1"], 0.0) < before, "the first took of the same cores"
    assert adm.capacity("a", demand(), ["p2"], 0.0) == before
    both = adm.capacity("a", demand(), ["p0", "p1"], 0.0)
    admitted = 0
    while isinstance(adm.admit(f"n{admitted}", "a", demand(), ["p0", "p1"], 0.0), Admitted):
        admitted += 1
    assert admitted == both
    for name in [*(f"n{number}" for number in range(admitted)), "x"]:
        adm.leave(name, 1.0)
    assert adm.capacity("a", demand(), ["p1"], 0.0) == before


def test_a_model_that_is_often_wrong_keeps_more_free() -> None:
    sure, unsure = (fill(admission(costs=KnownCosts(off=off))) for off in (0.05, 1.5))
    assert sure == fill(admission()), "its error is within what the target leaves"
    assert unsure < 0.9 * sure
    adm = admission(costs=KnownCosts(off=1.5))
    fill(adm)
    refused = adm.admit("next", "a", demand(), ["p0"], 0.0)
    assert isinstance(refused, Refused)
    assert "as predictions are off now" in refused.reason
    assert adm.latency_ms("p0", demand()) > admission().latency_ms("p0", demand())


def test_streams_are_let_in_up_to_the_target_and_the_next_hears_what_would_fit() -> None:
    adm = admission()
    expected = adm.capacity("a", demand(), ["p0"], 0.0)
    assert fill(adm) == expected > 5
    assert adm.books["p0"].load() <= adm.rules.target < adm.books["p0"].load(demand())
    refused = adm.admit("next", "a", demand(), ["p0"], 0.0)
    assert isinstance(refused, Refused)
    assert refused.refusal is Refusal.CAPACITY
    assert "85%" in refused.reason
    assert refused.retry_after_s > 0
    if refused.tier is not None:
        assert isinstance(adm.admit("next", "a", refused.tier, ["p0"], 0.0), Admitted)


def test_the_tier_that_would_fit_gives_up_steps_before_fps_before_size() -> None:
    one = Book(shape(max_batch=1), KnownCosts()).load(demand(steps=1))
    two = Book(shape(max_batch=1), KnownCosts()).load(demand())
    adm = Admission(Rules(target=two + (one + two) / 2, max_streams=64))
    adm.pipeline("p0", shape(max_batch=1), KnownCosts())
    assert fill(adm) == 1
    refused = adm.admit("b", "a", demand(), ["p0"], 0.0)
    assert isinstance(refused, Refused)
    assert refused.tier is not None
    assert (refused.tier.steps, refused.tier.fps, refused.tier.width) == (1, 8.0, 160)
    with_no_room = Admission(Rules(target=0.001))
    with_no_room.pipeline("p0", shape(), KnownCosts())
    with_no_room.admit("a", "a", demand(), ["p0"], 0.0)
    nothing = with_no_room.admit("b", "a", demand(), ["p0"], 0.0)
    assert isinstance(nothing, Refused)
    assert nothing.tier is None


def test_a_deadline_that_cannot_be_kept_is_refused_with_one_that_could() -> None:
    adm = admission()
    refused = adm.admit("a", "t", demand(deadline_ms=300.0), ["p0"], 0.0)
    assert isinstance(refused, Refused)
    assert "give 450 or more" in refused.reason
    assert isinstance(adm.admit("a", "t", demand(), ["p0"], 0.0), Admitted)
    tight = adm.admit("b", "t", demand(deadline_ms=400.0), ["p0"], 0.0)
    assert isinstance(tight, Refused), "a chunk is captured in time, but not made"


def test_one_alone_is_let_in_with_the_least_of_its_bounds_whatever_it_costs() -> None:
    adm = admission(rules=Rules(target=0.001))
    lone = adm.admit("a", "t", demand(min_fps=6.0, fps=8.0), ["p0"], 0.0)
    assert isinstance(lone, Admitted)
    assert (lone.demand.steps, lone.demand.fps) == (1, 6.0)
    assert lone.load > 0.001
    assert isinstance(adm.admit("b", "t", demand(), ["p0"], 0.0), Refused)


def test_unmeasured_streams_are_let_in_but_few() -> None:
    adm = admission(costs=KnownCosts(unknown=True))
    assert adm.capacity("a", demand(), ["p0"], 0.0) == fill(adm) == adm.rules.unmeasured


def test_lossless_streams_take_no_share_but_a_place() -> None:
    adm = admission(rules=Rules(max_streams=3))
    assert fill(adm, live=False) == 3
    assert adm.books["p0"].load() == 0.0


def test_a_stream_that_leaves_gives_its_room_back_and_teaches_when_to_come_again() -> None:
    adm = admission()
    count = fill(adm, now=0.0)
    adm.leave("a0", 40.0)
    adm.leave("a0", 41.0)
    adm.leave("never", 41.0)
    assert adm.capacity("a", demand(), ["p0"], 41.0) == 1
    assert isinstance(adm.admit("new", "a", demand(), ["p0"], 41.0), Admitted)
    refused = adm.admit("more", "a", demand(), ["p0"], 41.0)
    assert isinstance(refused, Refused)
    assert refused.retry_after_s == pytest.approx(max(1.0, 40.0 / count))


def test_the_least_loaded_pipeline_takes_it_and_moves_and_changes_are_booked() -> None:
    adm = admission("p0", "p1")
    first, second = (adm.admit(name, "a", demand(), ["p0", "p1"], 0.0) for name in "xy")
    assert isinstance(first, Admitted)
    assert isinstance(second, Admitted)
    assert {first.pipeline, second.pipeline} == {"p0", "p1"}
    adm.move("y", first.pipeline)
    assert adm.loads[second.pipeline] == 0.0
    assert adm.books[first.pipeline].streams == 2
    adm.change("y", demand(steps=1))
    assert adm.demand_of("y") == demand(steps=1)
    adm.leave("x", 1.0)
    adm.leave("y", 1.0)
    assert set(adm.loads.values()) == {0.0}
    adm.admit("z", "a", demand(), ["p0"], 0.0)
    with pytest.raises(ValueError, match="let in already"):
        adm.admit("z", "a", demand(), ["p0"], 0.0)


def test_quotas_bound_a_tenants_streams_and_share() -> None:
    adm = admission()
    adm.tenants = Tenants(special={"small": TenantLimits(max_streams=2), "half": TenantLimits(max_share=0.5)})
    assert adm.capacity("small", demand(), ["p0"], 0.0) == fill(adm, "small") == 2
    refused = adm.admit("s", "small", demand(), ["p0"], 0.0)
    assert isinstance(refused, Refused)
    assert refused.refusal is Refusal.QUOTA
    assert "2 of 2 streams" in refused.reason
    count = adm.capacity("half", demand(), ["p0"], 0.0)
    assert fill(adm, "half") == count
    assert adm.tenants.usage["half"].load <= 0.5 * adm.whole + 1e-6
    assert isinstance(adm.admit("o", "other", demand(), ["p0"], 0.0), Admitted), "others are not bound by it"


def test_what_becomes_free_goes_to_the_tenant_below_its_share_first() -> None:
    adm = admission()
    fill(adm, "greedy")
    refused = adm.admit("b", "late", demand(), ["p0"], 10.0)
    assert isinstance(refused, Refused)
    adm.leave("greedy0", 11.0)
    again = adm.admit("greedy-again", "greedy", demand(), ["p0"], 12.0)
    assert isinstance(again, Refused)
    assert "kept for tenants" in again.reason
    assert isinstance(adm.admit("b", "late", demand(), ["p0"], 13.0), Admitted)
    adm.leave("greedy1", 14.0)
    assert isinstance(adm.admit("greedy-again", "greedy", demand(), ["p0"], 15.0), Admitted), "the claim is met"


def test_a_claim_that_nobody_takes_up_expires() -> None:
    adm = admission()
    fill(adm, "greedy")
    adm.admit("b", "late", demand(), ["p0"], 10.0)
    adm.leave("greedy0", 11.0)
    assert isinstance(adm.admit("again", "greedy", demand(), ["p0"], 60.0), Admitted)


def test_a_size_that_does_not_fit_beside_the_others_is_refused_and_nothing_is_reserved() -> None:
    adm = admission()
    count = fill(adm)
    assert count > 2
    load, asked = adm.loads["p0"], demand()
    larger = replace(asked, width=asked.width * 4, height=asked.height * 4, tokens=asked.tokens * 16)
    smaller = replace(asked, width=asked.width // 2, height=asked.height // 2, tokens=asked.tokens // 4)
    refused = adm.resized("a0", larger, 0.0)
    assert isinstance(refused, Refused)
    assert refused.refusal is Refusal.CAPACITY
    assert "ask for less" in refused.reason
    assert isinstance(adm.resized("a0", asked, 0.0), Admitted), "its own room counts as free"
    assert isinstance(adm.resized("a0", smaller, 0.0), Admitted)
    assert isinstance(adm.resized("nobody", smaller, 0.0), Refused)
    assert (adm.loads["p0"], adm.demand_of("a0")) == (load, asked), "asking changes nothing"


def test_one_that_is_alone_gets_a_larger_picture_only_with_all_it_asks_for() -> None:
    adm = admission()
    asked = demand()
    assert isinstance(adm.admit("a", "t", asked, ["p0"], 0.0), Admitted)
    huge = replace(asked, width=2048, height=2048, tokens=asked.tokens * 400)
    refused = adm.resized("a", huge, 0.0)
    assert isinstance(refused, Refused), "a start is let in with less; a change would take what it has"
    assert "2048×2048" in refused.reason or "ms old" in refused.reason


def measured(stage_ms: dict[int, float]) -> tuple[CostModel, Admission]:
    """A cost model that has seen forwards of so many items take so long, and a pipeline whose promises are made by it."""
    model, adm = CostModel(), Admission(Rules(max_streams=64))
    for _ in range(60):
        for items, ms in stage_ms.items():
            model.observe("stage.0", 60 * items, ms, items)
        model.observe("encode", 60, 4.0)
        model.observe("decode", 60, 10.0)
    adm.pipeline("p0", shape(), Settled(model))
    return model, adm


def test_many_starts_at_once_slow_forwards_down_for_a_moment_and_no_promise_turns() -> None:
    """As a fill of a real system looks: five forwards in a row twice as slow, near its end."""
    model, adm = measured({items: 5.0 + 12.0 * items for items in (1, 2, 4)})
    asked = demand(deadline_ms=1500.0)
    calm = adm.capacity("a", asked, ["p0"], 0.0)
    assert calm > 8
    for count in range(calm):
        slow = 2.0 if count == calm - 2 else 1.0
        for items in (1, 2, 1, 2, 1):
            model.observe("stage.0", 60 * items, slow * (5.0 + 12.0 * items), items)
        if slow > 1.0:  # this moment, as the batches are planned, there is room for nobody
            assert model.predict("stage.0", 60) > 1.7 * 17.0
        adm.refresh()
        assert isinstance(adm.admit(f"s{count}", "a", asked, ["p0"], 0.0), Admitted), f"{count} of {calm}"
    assert adm.capacity("a", asked, ["p0"], 0.0) <= 1, "nor is more given away"


def test_a_device_that_stays_slower_promises_less_within_fourteen_measurements() -> None:
    model, adm = measured({1: 20.0})
    asked = demand(deadline_ms=1000.0)
    before = adm.capacity("a", asked, ["p0"], 0.0)
    for _ in range(14):
        model.observe("stage.0", 60, 40.0)
    assert adm.capacity("a", asked, ["p0"], 0.0) <= 0.6 * before
    model.scale("stage.0", 0.5)  # half the blocks have moved away: known for certain
    assert adm.capacity("a", asked, ["p0"], 0.0) >= 0.9 * before
