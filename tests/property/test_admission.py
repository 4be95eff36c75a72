"""Whatever comes and goes: capacity() says what admit() then does, nothing is promised twice, the books add up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.admission import Admission, Admitted, Refused, Rules
from services.scheduler.pricing import Book, Demand, Host
from services.scheduler.quotas import TenantLimits, Tenants
from tests.support.costs import KnownCosts, shape

SIZES = ((160, 96), (320, 192), (96, 64))
PIPELINES = ("p0", "p1")


@st.composite
def demands(draw: st.DrawFn) -> Demand:
    width, height = draw(st.sampled_from(SIZES))
    return Demand(
        width,
        height,
        width * height // 256,
        draw(st.sampled_from((4.0, 8.0, 16.0))),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from((600.0, 1500.0, 3000.0))),
        draw(st.sampled_from((True, True, True, False))),
    )


@st.composite
def admissions(draw: st.DrawFn) -> Admission:
    limits = st.builds(TenantLimits, max_streams=st.integers(0, 4), max_share=st.sampled_from((0.3, 0.6, 1.0)))
    made = Admission(
        Rules(draw(st.sampled_from((0.5, 0.85))), draw(st.integers(1, 12)), draw(st.integers(1, 3))),
        Tenants(draw(limits), draw(st.dictionaries(st.sampled_from("abc"), limits, max_size=2))),
    )
    for name in PIPELINES:
        host = draw(st.sampled_from((None, Host("h", 2.0, (0,), 0.3, 0.2, 0.1, 0.01, 0.2))))
        costs = KnownCosts(
            draw(st.floats(0, 20)), draw(st.floats(0.01, 1)), draw(st.floats(0.01, 0.5)), draw(st.booleans())
        )
        made.pipeline(name, shape(draw(st.integers(1, 3)), draw(st.sampled_from((1, 8))), host), costs)
    return made


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("start", "start", "start", "leave", "wait")), st.integers(0, 30), st.sampled_from("abc")
    ),
    max_size=25,
)


@settings(max_examples=30, deadline=None)
@given(adm=admissions(), kinds=st.lists(demands(), min_size=1, max_size=3), steps=STEPS, asked=st.sampled_from("abcd"))
def test_capacity_is_what_is_then_admitted(
    adm: Admission, kinds: list[Demand], steps: list[tuple[str, int, str]], asked: str
) -> None:
    now = run(adm, kinds, steps)
    for number, kind in enumerate(kinds):
        expected = adm.capacity(asked, kind, PIPELINES, now)
        before = {name: (book.streams, book.load()) for name, book in adm.books.items()}
        assert expected == adm.capacity(asked, kind, PIPELINES, now), "asking changes nothing"
        admitted = 0
        while isinstance(adm.admit(f"n{number}-{admitted}", asked, kind, PIPELINES, now), Admitted):
            admitted += 1
        assert admitted == expected
        assert sum(book.streams for book in adm.books.values()) == sum(n for n, _ in before.values()) + admitted


@settings(max_examples=30, deadline=None)
@given(adm=admissions(), kinds=st.lists(demands(), min_size=1, max_size=3), steps=STEPS)
def test_no_room_is_promised_twice_and_all_of_it_comes_back(
    adm: Admission, kinds: list[Demand], steps: list[tuple[str, int, str]]
) -> None:
    seats: dict[str, tuple[str, Demand]] = {}
    run(adm, kinds, steps, seats)
    for name, book in adm.books.items():
        mine = [demand for pipeline, demand in seats.values() if pipeline == name]
        assert sorted(map(repr, mine)) == sorted(map(repr, book.demands.elements())), "the books are the streams let in"
        if book.known() and sum(demand.live for demand in mine) > 1:  # one alone is let in whatever it costs
            assert Book(book.shape, book.costs, book.demands, book.neighbours).load() <= adm.rules.target + 1e-9
        assert book.streams <= adm.rules.max_streams
    for stream in seats:
        adm.leave(stream, 1e6)
    assert all(book.streams == 0 for book in adm.books.values())
    assert adm.tenants.usage == {}


def run(
    adm: Admission,
    kinds: list[Demand],
    steps: list[tuple[str, int, str]],
    seats: dict[str, tuple[str, Demand]] | None = None,
) -> float:
    """Streams come and go; returns the time then."""
    seats = {} if seats is None else seats
    now = 0.0
    for number, (what, which, tenant) in enumerate(steps):
        now += 1.0
        if what == "start":
            decided = adm.admit(f"s{number}", tenant, kinds[which % len(kinds)], PIPELINES, now)
            if isinstance(decided, Admitted):
                seats[f"s{number}"] = (decided.pipeline, decided.demand)
            elif isinstance(decided, Refused) and decided.tier is not None:
                assert decided.retry_after_s > 0
                assert adm.capacity(tenant, decided.tier, PIPELINES, now) > 0, "what is offered would be let in"
        elif what == "leave" and seats:
            gone = sorted(seats)[which % len(seats)]
            del seats[gone]
            adm.leave(gone, now)
        elif what == "wait":
            now += which
    return now
