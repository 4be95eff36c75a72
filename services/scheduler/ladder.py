"""The quality ladder: what streams give up when there is too much to do, and when they get it back. Pure.

Every stream has rungs between what it asked for and its own bounds: fewer steps, longer frame blocks, a lower rate. The
order is the stream's wish (:class:`~shared.contracts.tiers.Quality`). Down is fast: after half a second of predicted
overload or of pictures that came late, as many rungs as the cost model says are needed, at once. Up is slow: after five
seconds in which the better tier would have fitted all the time, and twice as long whenever going up proved wrong.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from services.scheduler.pricing import Book, Costs, Demand, Shape, lower
from shared.contracts.tiers import Quality

RATES = (0.75, 0.5)  # of the asked rate
RELIEF = 0.1  # a rung that saves less of what a stream costs is not worth what it takes from the picture
# How many rungs a stream is ahead of a balanced one: best_picture begins when those have given up two.
AHEAD = {Quality.LOWEST_LATENCY: 1, Quality.BALANCED: 0, Quality.BEST_PICTURE: -2}
SPREAD = 0.25  # so many of the streams miss deadlines: it is the pipeline; fewer: it is theirs alone


@dataclass(frozen=True, slots=True)
class LadderRules:
    """Loads are shares of the pipeline's time, times are in seconds.

    Above ``down_at`` rungs are taken until ``goal`` is met; a better tier must fit below ``up_to``. Between the two nothing
    moves. ``settle_s``: how long what was taken needs until late pictures stop, before more is taken for them.
    """

    down_at: float = 0.95
    goal: float = 0.85
    up_to: float = 0.8
    down_after_s: float = 0.5
    settle_s: float = 1.0
    up_after_s: float = 5.0
    up_every_s: float = 1.0
    longest_up_s: float = 60.0
    missed_share: float = 0.1  # of a stream's newest frames
    window_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What a stream asks for, and what it may be given instead: the bounds are in the demand, but for T's."""

    asked: Demand
    quality: Quality = Quality.BALANCED
    max_frames_per_block: int = 0  # 0: T stays


@dataclass(frozen=True, slots=True)
class TierChange:
    """The stream runs with ``tier`` from now on. ``degraded``: that is less than it asked for."""

    stream: str
    tier: Demand
    degraded: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Rung:
    """One thing a stream can give up; 0 leaves as it is. Rungs of one kind follow each other downwards."""

    steps: int = 0
    fps: float = 0.0
    frames_per_block: int = 0

    def applied(self, tier: Demand) -> Demand:
        """The tier without it."""
        return lower(tier, steps=self.steps, fps=self.fps, frames_per_block=self.frames_per_block)

    def above(self, tier: Demand) -> bool:
        """Whether ``tier`` has given this up already."""
        return tier.steps <= (self.steps or tier.steps) and tier.fps <= (self.fps or tier.fps) + 1e-9


def rungs(wish: Wish) -> list[Rung]:
    """What a stream may give up, in the order it wishes."""
    asked = wish.asked
    longest = max(asked.frames_per_block, wish.max_frames_per_block)
    fewer = [Rung(steps=steps) for steps in range(asked.steps - 1, asked.min_steps - 1, -1)]
    longer = [Rung(frames_per_block=frames) for frames in range(asked.frames_per_block + 1, longest + 1)]
    slower = [Rung(fps=asked.fps * share) for share in RATES if asked.fps * share >= asked.min_fps - 1e-9]
    return {
        Quality.BALANCED: [*fewer, *longer, *slower],
        Quality.LOWEST_LATENCY: [*fewer, *slower],  # longer blocks would make it wait
        Quality.BEST_PICTURE: [*longer, *slower, *fewer],
    }[wish.quality]


@dataclass(slots=True)
class _Stream:
    wish: Wish
    rungs: list[Rung]
    joined: int
    tier: Demand
    taken: list[tuple[int, Demand]] = field(default_factory=lambda: list[tuple[int, Demand]]())  # rung, tier before it
    changed_s: float = 0.0
    closed: deque[tuple[float, int, int]] = field(default_factory=lambda: deque[tuple[float, int, int]]())

    @property
    def depth(self) -> int:
        """How far down it counts as being, its wish considered: who is least deep gives first."""
        return len(self.taken) - AHEAD[self.wish.quality]

    @property
    def next_rung(self) -> int:
        """The first rung below."""
        return self.taken[-1][0] + 1 if self.taken else 0


class Ladder:
    """The streams of one pipeline and the tiers they run with."""

    def __init__(self, shape: Shape, costs: Costs, rules: LadderRules | None = None) -> None:
        self.rules = rules or LadderRules()
        self.book = Book(shape, costs)  # of what runs, not of what was promised
        self._streams: dict[str, _Stream] = {}
        self._joined = 0
        self._over_since: float | None = None
        self._room_since: float | None = None
        self._taken_s = self._raised_s = float("-inf")
        self._up_after_s = self.rules.up_after_s

    # --- streams ------------------------------------------------------------------------------------------------------

    def join(self, stream: str, wish: Wish, tier: Demand | None = None) -> None:
        """A stream begins, with the tier it was let in with (None: what it asks for). Lossless ones have no ladder."""
        self.leave(stream)
        self._joined += 1
        state = _Stream(wish, rungs(wish), self._joined, wish.asked)
        if tier is not None and tier != wish.asked:
            for number, rung in enumerate(state.rungs):
                if rung.above(tier):
                    state.taken.append((number, state.tier))
                    state.tier = rung.applied(state.tier)
        self._streams[stream] = state
        self.book.add(state.tier)

    def leave(self, stream: str) -> None:
        """A stream ends or goes elsewhere. Unknown ones are ignored."""
        state = self._streams.pop(stream, None)
        if state is not None:
            self.book.remove(state.tier)

    def ask(self, stream: str, wish: Wish) -> Demand:
        """The user wishes for something else. Returns the tier it gets now: not degraded, it gets all of it; degraded, the
        best that costs no more than what it has. Raises KeyError for an unknown stream."""
        state = self._streams[stream]
        before, degraded = self.book.load(), bool(state.taken)
        state.wish, state.rungs, state.taken = wish, rungs(wish), []
        self._take(state, wish.asked)
        while degraded and (load := self.book.load()) > before + 1e-9:
            if not self._step_down(state, load):
                break
        return state.tier

    def tier(self, stream: str) -> Demand | None:
        """What a stream runs with."""
        state = self._streams.get(stream)
        return None if state is None else state.tier

    @property
    def degraded(self) -> bool:
        """Whether a stream has given something up."""
        return any(state.taken for state in self._streams.values())

    def __len__(self) -> int:
        return len(self._streams)

    # --- what happened ------------------------------------------------------------------------------------------------

    def closed(self, stream: str, frames: int, missed: int, now_s: float) -> None:
        """So many frames of a stream got their verdict, ``missed`` of them late or dropped for want of time."""
        state = self._streams.get(stream)
        if state is not None and frames > 0:
            state.closed.append((now_s, frames, missed))

    # --- deciding -----------------------------------------------------------------------------------------------------

    def decide(self, now_s: float) -> list[TierChange]:
        """What changes now. Cheap when nothing does; call it some times a second."""
        if not self._streams:
            self._over_since = self._room_since = None
            return []
        load, late = self.book.load(), self._late(now_s)
        over = load > self.rules.down_at
        late_counts = bool(late) and now_s - self._taken_s >= self.rules.settle_s
        if not (over or late_counts):
            self._over_since = None
            return [] if late else self._up(load, now_s)
        self._room_since = None
        if self._over_since is None:
            self._over_since = now_s
        if now_s - self._over_since < self.rules.down_after_s:
            return []
        return self._down(load, over, late, now_s)

    def _down(self, load: float, over: bool, late: set[str], now_s: float) -> list[TierChange]:
        rules = self.rules
        general = over or len(late) >= SPREAD * len(self._streams)
        givers = self._streams if general else {name: self._streams[name] for name in late}
        reason = (
            f"too much to do: {load:.0%} of what there is"
            if over
            else "pictures came late" + (" on this pipeline" if general else "")
        )
        # The model did not see it coming: what it says is too low, so take a part of whatever that is.
        goal = rules.goal if over else min(rules.goal, load * rules.goal)
        heap = [(*self._giving(state), name) for name, state in givers.items()]
        heapq.heapify(heap)
        taken: dict[str, TierChange] = {}
        while heap and (load > goal or not taken):
            *_, name = heapq.heappop(heap)
            state = self._streams[name]
            if not self._step_down(state, load):
                continue
            state.changed_s = now_s
            state.closed.clear()
            load = self.book.load()
            taken[name] = TierChange(name, state.tier, True, reason)
            heapq.heappush(heap, (*self._giving(state), name))
        if taken:
            if now_s - self._raised_s < 2 * rules.up_after_s:  # going up was wrong
                self._up_after_s = min(rules.longest_up_s, 2 * self._up_after_s)
            self._taken_s, self._over_since = now_s, None
        return list(taken.values())

    def _up(self, load: float, now_s: float) -> list[TierChange]:
        rules = self.rules
        below = [state for state in self._streams.values() if state.taken]
        if not below:
            self._room_since = None
            if now_s - max(self._taken_s, self._raised_s) > rules.longest_up_s:
                self._up_after_s = rules.up_after_s
            return []
        named = {id(state): name for name, state in self._streams.items()}
        below.sort(key=lambda state: (-state.depth, state.changed_s, state.joined))
        if load > rules.up_to or self._better(below, load) is None:
            self._room_since = None
            return []
        if self._room_since is None:
            self._room_since = now_s
        if now_s - self._room_since < self._up_after_s or now_s - self._raised_s < rules.up_every_s:
            return []
        raised: list[TierChange] = []
        for _ in range(max(1, len(self._streams) // 4)):
            state = self._better([each for each in below if each.taken and each.changed_s < now_s], load)
            if state is None:
                break
            self._take(state, state.taken.pop()[1])
            state.changed_s = self._raised_s = now_s
            load = self.book.load()
            raised.append(TierChange(named[id(state)], state.tier, bool(state.taken), "there is room again"))
        return raised

    # --- inside -------------------------------------------------------------------------------------------------------

    def _giving(self, state: _Stream) -> tuple[int, float, int]:
        """Who gives first: the least degraded, then the one whose last change is longest ago, then who came last."""
        return (state.depth, state.changed_s, -state.joined)

    def _step_down(self, state: _Stream, load: float) -> bool:
        """Take the next rung that saves enough and comes in time; False when there is none."""
        share = load - self.book.load(instead_of=state.tier)
        for number in range(state.next_rung, len(state.rungs)):
            tier = state.rungs[number].applied(state.tier)
            after = self.book.loads(tier, instead_of=state.tier)
            late = self.book.latency_ms(state.tier, self.book.loads())
            in_time = max(tier.deadline_ms, late)  # late already: no later than that
            if load - after.most >= RELIEF * share and self.book.latency_ms(tier, after) <= in_time:
                state.taken.append((number, state.tier))
                self._take(state, tier)
                return True
        return False

    def _better(self, below: list[_Stream], load: float) -> _Stream | None:
        """The first stream whose next better tier fits."""
        for state in below:
            if self.book.load(state.taken[-1][1], instead_of=state.tier) <= self.rules.up_to:
                return state
        return None

    def _take(self, state: _Stream, tier: Demand) -> None:
        self.book.remove(state.tier)
        state.tier = tier
        self.book.add(tier)

    def _late(self, now_s: float) -> set[str]:
        """Streams that missed too many of the frames they had to show in the last second."""
        late: set[str] = set()
        for name, state in self._streams.items():
            while state.closed and now_s - state.closed[0][0] > self.rules.window_s:
                state.closed.popleft()
            missed = sum([missed for _, _, missed in state.closed])
            if missed:
                frames = sum([frames for _, frames, _ in state.closed])
                if missed > self.rules.missed_share * frames:
                    late.add(name)
        return late
