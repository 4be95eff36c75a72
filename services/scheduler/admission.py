"""Which new streams are let in, with which promise; and what is told to those that are not. Pure; time is passed in.

A stream is let in when the pipeline it would go to carries all it has promised, and this one, below the target load, and
the stream's own deadline can be kept there. A pipeline without live streams lets one in with less than it asked for, and be
it the least of what its own bounds allow: nobody else is there to suffer, and nothing better is to be had.

Every stream counts with what it was promised, not with what the ladder has left it for now: a degraded stream's room is not
given away. :meth:`Admission.admit` reserves before it returns, so two starts never get the same room;
:meth:`Admission.capacity` admits on copies, so it cannot disagree.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from services.scheduler.pricing import Book, Costs, Demand, Shape, lower
from services.scheduler.quotas import Tenants
from shared.contracts.tiers import Refusal

RETRY_S = 10.0  # how soon to ask again while no stream has ended yet
SHORTEST_RETRY_S, LONGEST_RETRY_S = 1.0, 120.0
LIFE_WEIGHT = 0.1  # of each stream that ends in the mean life of streams
MOST_COUNTED = 256  # capacity is not counted beyond this
FPS_SHARES = (1.0, 0.75, 0.5)  # lower tiers that are offered
SIDE_SHARES = (1.0, 0.75, 0.5)
LEAST_FPS = 4.0


@dataclass(frozen=True, slots=True)
class Rules:
    """``target`` is the load up to which streams are let in; ``max_streams`` and ``unmeasured`` are per pipeline.

    ``unmeasured`` bounds optimism: so many are let in while nobody has measured what a stream costs. ``priced`` False: whoever
    asks is let in, up to ``max_streams``.
    """

    target: float = 0.85
    max_streams: int = 16
    unmeasured: int = 4
    priced: bool = True


@dataclass(frozen=True, slots=True)
class Admitted:
    """The stream's room is reserved on ``pipeline``. ``demand`` is what is promised."""

    pipeline: str
    demand: Demand
    latency_ms: float
    load: float


@dataclass(frozen=True, slots=True)
class Refused:
    """``tier`` would be let in now (None: nothing would)."""

    refusal: Refusal
    reason: str
    retry_after_s: float
    tier: Demand | None = None


@dataclass(slots=True)
class _Seat:
    tenant: str
    pipeline: str
    demand: Demand
    load: float
    since_s: float


@dataclass(slots=True)
class Admission:
    """The books of all pipelines. One per scheduler."""

    rules: Rules = field(default_factory=Rules)
    tenants: Tenants = field(default_factory=Tenants)
    books: dict[str, Book] = field(default_factory=lambda: dict[str, Book]())
    loads: dict[str, float] = field(default_factory=lambda: dict[str, float]())  # as of the last change or refresh
    life_s: float = 0.0  # mean life of the streams that ended
    _seats: dict[str, _Seat] = field(default_factory=lambda: dict[str, _Seat]())

    # --- pipelines ----------------------------------------------------------------------------------------------------

    def pipeline(self, name: str, shape: Shape, costs: Costs) -> Book:
        """A pipeline is there, or has changed."""
        book = self.books.get(name)
        if book is None:
            book = self.books[name] = Book(shape, costs)
        book.shape, book.costs = shape, costs
        self._price(name)
        return book

    def refresh(self) -> None:
        """Costs move while streams run: price every pipeline anew."""
        for name in self.books:
            self._price(name)

    # --- streams ------------------------------------------------------------------------------------------------------

    def admit(
        self, stream: str, tenant: str, demand: Demand, candidates: Sequence[str], now_s: float
    ) -> Admitted | Refused:
        """Let a stream in, its room reserved, or say why not. ``candidates`` are the pipelines that could run it.

        Raises ValueError when the stream is in already.
        """
        if stream in self._seats:
            raise ValueError(f"stream {stream} is let in already")
        decided = self._decide(tenant, demand, candidates, now_s)
        if isinstance(decided, Admitted):
            self._sit(stream, tenant, decided, now_s)
            return decided
        if decided.refusal is Refusal.CAPACITY:
            self.tenants.claim(tenant, self._share(demand, candidates), self.whole, now_s)
        if self.tenants.is_full(tenant):  # nothing is worked out for whoever floods
            return decided
        return replace(decided, tier=self.fitting(tenant, demand, candidates, now_s))

    def leave(self, stream: str, now_s: float) -> None:
        """A stream is gone. Unknown ones are ignored."""
        seat = self._seats.pop(stream, None)
        if seat is None:
            return
        self.tenants.leave(seat.tenant, seat.load)
        lived = max(0.0, now_s - seat.since_s)
        self.life_s = lived if self.life_s <= 0 else self.life_s + LIFE_WEIGHT * (lived - self.life_s)
        book = self.books.get(seat.pipeline)
        if book is not None:
            book.remove(seat.demand)
            self._price(seat.pipeline)

    def change(self, stream: str, demand: Demand) -> None:
        """A running stream asks for something else now: its user's wish is not refused, the ladder makes room."""
        seat = self._seats.get(stream)
        if seat is not None and seat.demand != demand:
            self._rebook(seat, seat.pipeline, demand)

    def move(self, stream: str, pipeline: str) -> None:
        """A stream has moved to another pipeline."""
        seat = self._seats.get(stream)
        if seat is not None and seat.pipeline != pipeline:
            self._rebook(seat, pipeline, seat.demand)

    def resized(self, stream: str, demand: Demand, now_s: float) -> Admitted | Refused:
        """Whether a stream would be let in with this demand in place of its own, where it is. Nothing is reserved.

        One that is alone may have a smaller picture whatever it costs; a larger one only with all that it asks for.
        """
        seat = self._seats.get(stream)
        if seat is None:
            return Refused(Refusal.OTHER, f"stream {stream} is not running", 0.0)
        trial = self._trial([seat.pipeline])
        trial.tenants.leave(seat.tenant, seat.load)
        if (book := trial.books.get(seat.pipeline)) is not None:
            book.remove(seat.demand)
            trial._price(seat.pipeline)
        decided = trial._decide(seat.tenant, demand, [seat.pipeline], now_s)
        if isinstance(decided, Refused) or decided.demand == demand or demand.tokens <= seat.demand.tokens:
            return decided
        why = trial._carries(seat.pipeline, trial.books[seat.pipeline], demand)
        return why if isinstance(why, Admitted) else Refused(Refusal.CAPACITY, why, self._retry_s(0))

    def demand_of(self, stream: str) -> Demand | None:
        """What a stream was promised."""
        seat = self._seats.get(stream)
        return None if seat is None else seat.demand

    # --- questions ----------------------------------------------------------------------------------------------------

    @property
    def whole(self) -> float:
        """What all pipelines carry together."""
        return self.rules.target * len(self.books)

    def capacity(self, tenant: str, demand: Demand, candidates: Sequence[str], now_s: float) -> int:
        """How many streams like this one :meth:`admit` would let in, one after the other (counted up to 256)."""
        trial = self._trial(candidates)
        count = 0
        while count < MOST_COUNTED:
            decided = trial._decide(tenant, demand, candidates, now_s)
            if not isinstance(decided, Admitted):
                break
            trial._sit(f"{count}", tenant, decided, now_s)
            count += 1
        return count

    def fitting(self, tenant: str, demand: Demand, candidates: Sequence[str], now_s: float) -> Demand | None:
        """The best tier below ``demand`` that would be let in now."""
        for tier in tiers_below(demand):
            if isinstance(self._decide(tenant, tier, candidates, now_s), Admitted):
                return tier
        return None

    def latency_ms(self, pipeline: str, demand: Demand) -> float:
        """Of a stream like this on the pipeline as it is."""
        book = self.books[pipeline]
        return book.latency_ms(demand, book.loads(demand))

    # --- deciding -----------------------------------------------------------------------------------------------------

    def _decide(self, tenant: str, demand: Demand, candidates: Sequence[str], now_s: float) -> Admitted | Refused:
        there = sorted((name for name in candidates if name in self.books), key=lambda name: (self.loads[name], name))
        share = 0.0 if self.tenants.is_full(tenant) else self._share(demand, there)
        if complaint := self.tenants.complaint(tenant, share, self.whole):
            used = self.tenants.usage.get(tenant)
            return Refused(Refusal.QUOTA, complaint, self._retry_s(used.streams if used else 0))
        streams = sum(self.books[name].streams for name in there)
        kept = self.tenants.kept_from(tenant, share, self.whole, now_s) if demand.live else 0.0
        if kept > 0:
            free = sum(max(0.0, self.rules.target - self.loads[name]) for name in there)
            if free < share + kept:
                line = f"what is free is kept for tenants that have less than tenant {tenant}"
                return Refused(Refusal.CAPACITY, line, self._retry_s(streams))
        why = "no pipeline is there"
        for name in there:
            decided = self._fits(name, demand)
            if isinstance(decided, Admitted):
                return decided
            why = decided
        return Refused(Refusal.CAPACITY, why, self._retry_s(streams))

    def _fits(self, name: str, demand: Demand) -> Admitted | str:
        """Whether the pipeline carries one more like this, or why not."""
        book, rules = self.books[name], self.rules
        if book.streams >= rules.max_streams:
            return f"all pipelines are full ({rules.max_streams} streams each); stop one, or add a worker"
        if not demand.live:
            return Admitted(name, demand, 0.0, 0.0)
        if not rules.priced:
            return Admitted(name, demand, book.latency_ms(demand, book.loads(demand)), 0.0)
        if not book.known():
            if book.streams >= rules.unmeasured:
                return f"the first {rules.unmeasured} streams are being measured: then more may be let in"
            return Admitted(name, demand, book.latency_ms(demand, book.loads()), 0.0)
        why = ""
        alone = not any(other.live for other in book.demands)
        tiers = [demand, *(own_tiers(demand) if alone else ())]
        for tier in tiers:
            decided = self._carries(name, book, tier)
            if isinstance(decided, Admitted):
                return decided
            why = why or decided
        if alone and demand.capture_ms < demand.deadline_ms:
            loads = book.loads(tiers[-1])
            return Admitted(name, tiers[-1], book.latency_ms(tiers[-1], loads), loads.most)
        return why

    def _carries(self, name: str, book: Book, demand: Demand) -> Admitted | str:
        """Whether load and latency allow one more like this, or why not."""
        rules = self.rules
        before, loads = book.load(), book.loads(demand)
        load = loads.most
        if load > rules.target:
            return (
                f"{_named(demand)} would use {load:.0%} of what there is, and {rules.target:.0%} are given away: ask for less, "
                "stop a stream, or add a worker"
            )
        at_worst = book.loads(demand, margin=True).most
        if at_worst > 1.0:
            return (
                f"{_named(demand)} would use {load:.0%} of what there is, and as predictions are off now it may be "
                f"{at_worst:.0%}: "
                "ask for less, stop a stream, or add a worker"
            )
        latency = book.latency_ms(demand, loads)
        if latency > demand.deadline_ms:
            return (
                f"pictures would be {latency:.0f} ms old, and deadline_ms is {demand.deadline_ms:.0f}: "
                f"give {_rounded_up(latency)} or more, or ask for less"
            )
        return Admitted(name, demand, latency, max(0.0, load - before))

    def _share(self, demand: Demand, candidates: Sequence[str]) -> float:
        """What one such stream takes where it would go; 0 while nobody knows."""
        known = [name for name in candidates if name in self.books and self.books[name].known()]
        if not known or not demand.live:
            return 0.0
        book = self.books[min(known, key=lambda name: (self.loads[name], name))]
        return max(0.0, book.load(demand) - book.load())

    def _retry_s(self, streams: int) -> float:
        """When one of so many streams is expected to have ended."""
        if self.life_s <= 0 or streams <= 0:
            return RETRY_S
        return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, self.life_s / streams))

    # --- keeping ------------------------------------------------------------------------------------------------------

    def _sit(self, stream: str, tenant: str, admitted: Admitted, now_s: float) -> None:
        book = self.books[admitted.pipeline]
        book.add(admitted.demand)
        self._price(admitted.pipeline)
        self.tenants.enter(tenant, admitted.load)
        self._seats[stream] = _Seat(tenant, admitted.pipeline, admitted.demand, admitted.load, now_s)

    def _rebook(self, seat: _Seat, pipeline: str, demand: Demand) -> None:
        before = self.books.get(seat.pipeline)
        if before is not None:
            before.remove(seat.demand)
            self._price(seat.pipeline)
        seat.pipeline, seat.demand = pipeline, demand
        after = self.books.get(pipeline)
        if after is not None:
            after.add(demand)
            self._price(pipeline)

    def _price(self, name: str) -> None:
        """A book has changed: its load, and that of pipelines that compute on the same cores."""
        book = self.books[name]
        hosts = {host.name for host in book.shape.hosts}
        if hosts:
            beside = {n: each for n, each in self.books.items() if any(h.name in hosts for h in each.shape.hosts)}
            cores = {n: each.promised_cores() for n, each in beside.items()}
            for n, each in beside.items():
                each.neighbours = {
                    host: sum(used.get(host, 0.0) for other, used in cores.items() if other != n) for host in hosts
                }
                self.loads[n] = each.load()
        self.loads[name] = book.load()

    def _trial(self, candidates: Sequence[str]) -> Admission:
        """A copy whose streams can come and go without a trace. Pipelines that are no candidates stay as they are."""
        books = dict(self.books)
        hosts = {host.name for name in candidates if name in books for host in books[name].shape.hosts}
        for name, book in self.books.items():
            if name in candidates or any(host.name in hosts for host in book.shape.hosts):
                books[name] = replace(book, demands=copy.copy(book.demands))
        return Admission(self.rules, copy.deepcopy(self.tenants), books, dict(self.loads), self.life_s)


def tiers_below(demand: Demand) -> Iterator[Demand]:
    """What may be offered instead, best first: fewer steps, then a lower rate, then a smaller picture, and mixtures."""
    found: list[tuple[float, Demand]] = []
    for side in SIDE_SHARES:
        width, height = (max(16, int(value * side) // 16 * 16) for value in (demand.width, demand.height))
        tokens = max(1, round(demand.tokens * (width * height) / (demand.width * demand.height)))
        for share in FPS_SHARES:
            fps = demand.fps * share
            if share < 1.0 and fps < LEAST_FPS:
                continue
            for steps in range(demand.steps, 0, -1):
                tier = replace(lower(demand, steps=steps, fps=fps), width=width, height=height, tokens=tokens)
                # A step less costs the picture least, a smaller picture most: what is lost, added up.
                lost = (1.0 - steps / demand.steps) + 2.0 * (1.0 - share) + 4.0 * (1.0 - side)
                found.append((lost, tier))
    found.sort(key=lambda each: each[0])
    yield from (tier for _, tier in found if tier != demand)


def _named(demand: Demand) -> str:
    return f"one more stream of {demand.width}×{demand.height} at {demand.fps:g} fps and {demand.steps} steps"


def own_tiers(demand: Demand) -> Iterator[Demand]:
    """The tiers below that a stream's own bounds allow at its size, best first."""
    for tier in tiers_below(demand):
        same = (tier.width, tier.height) == (demand.width, demand.height) and tier.capture_ms < tier.deadline_ms
        if same and tier.steps >= demand.min_steps and tier.fps >= demand.min_fps:
            yield tier


def _rounded_up(ms: float) -> int:
    return int(-(-ms // 50) * 50)
