"""What streams cost a pipeline: the share of its slowest worker's time, and how old their pictures come out. Pure.

Costs come from the cost model that schedules, what the host does besides from :mod:`services.scheduler.host_meter`; nothing
here is measured. A load of 1 is all the time there is. Two things can be the narrow one:

* a *lane*: a stage's forwards, with the autoencoder's jobs among them. Where the device is the host's cores, small jobs of
  the two have a lane each, and large ones, which take all threads, both. A lane gets slower as the cores fill up;
* a host's *cores*: CPU seconds of the forwards, and of all that ingest, egress and everything else do there. Forwards count
  as if no two items shared one: they begin to share where items wait for each other, which is when the cores are full.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

CHUNK_FRAMES = 4
HOPS_MS = 15.0  # the bus and the services' own work along the way
PACING_MS = 15.0  # what egress keeps above the slowest recent chunk


class Costs(Protocol):
    """The cost model as admission needs it: milliseconds by key, units (latent tokens) and items that share the forward."""

    def predict(self, key: str, units: float, items: int = 1) -> float: ...

    def known(self, key: str) -> bool: ...

    def error(self, key: str) -> float: ...


@dataclass(frozen=True, slots=True)
class Demand:
    """What one stream asks of a pipeline. ``tokens`` make one latent frame of its size; ``min_…`` is what it may fall to."""

    width: int
    height: int
    tokens: int
    fps: float
    steps: int
    frames_per_block: int = 1
    deadline_ms: float = 600.0
    live: bool = True
    min_steps: int = 1
    min_fps: float = 0.0

    @property
    def chunks_per_s(self) -> float:
        """Chunks a second. A stream that may wait for ever asks for no share: it gets what the others leave."""
        return self.fps / CHUNK_FRAMES if self.live else 0.0

    @property
    def items_per_s(self) -> float:
        """Items (a step of a frame block) a second."""
        return self.chunks_per_s / self.frames_per_block * self.steps

    @property
    def work_per_s(self) -> float:
        """Latent tokens a second through a step, or through the autoencoder: about what its forwards cost."""
        return self.chunks_per_s * self.tokens * (self.steps + 1)

    @property
    def pixels_per_s(self) -> float:
        """Millions of pixels a second, for what the host does with them."""
        return self.width * self.height * self.fps * 1e-6 if self.live else 0.0

    @property
    def capture_ms(self) -> float:
        """From the capture of a frame block's first frame to that of its last."""
        return (CHUNK_FRAMES * self.frames_per_block - 1) / self.fps * 1000.0

    @property
    def bucket(self) -> tuple[int, int, int]:
        """Only equals share a forward."""
        return (self.frames_per_block, self.height, self.width)


@dataclass(frozen=True, slots=True)
class Host:
    """The cores that some of a pipeline's workers share with other processes, as measured. ``cores`` 0: nobody knows.

    ``used`` cores were in use when the costs were measured, by whomever. A forward takes ``1 + crowding · used / cores`` times
    what it would alone, and ``correction`` times as many CPU seconds as it is priced at. Besides, ``fixed`` cores are in use,
    and ``per_chunk`` and ``per_mpix`` CPU seconds for each chunk, for each million pixels.
    """

    name: str = ""
    cores: float = 0.0
    stages: tuple[int, ...] = (0,)
    used: float = 0.0
    crowding: float = 0.0
    fixed: float = 0.0
    per_chunk: float = 0.0
    per_mpix: float = 0.0
    correction: float = 1.0

    def stretch(self, cores: float) -> float:
        """How much longer than alone forwards take when so many ``cores`` are in use."""
        return 1.0 + self.crowding * min(1.0, cores / self.cores) if self.cores > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Priced:
    """What a pipeline's streams take of a host in a second: CPU seconds of forwards, for so much work of the pipeline's."""

    cores: float = 0.0
    work: float = 0.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A pipeline as far as its capacity depends on it. ``encode_at`` and ``decode_at`` are stages whose worker does those.

    ``threads``: by stage, the host's threads that a wide forward has; 0 is a GPU's. ``wide_from``: by the cost model's key,
    the latent tokens of an item from which on a forward is wide.
    """

    stages: int = 1
    encode_at: int = 0
    decode_at: int = 0
    max_batch: int = 8
    hosts: tuple[Host, ...] = ()
    threads: tuple[int, ...] = ()
    wide_from: Mapping[str, int] = field(default_factory=dict[str, int])

    def threads_of(self, stage: int, key: str, units: int) -> int:
        """The threads that one forward with items of so many latent tokens has."""
        most = self.threads[stage] if stage < len(self.threads) else 0
        return most if units >= self.wide_from.get(key, 0) else min(1, most)

    def two_lanes(self, stage: int) -> bool:
        """Whether its worker may do two things at once."""
        return stage < len(self.threads) and self.threads[stage] > 1


@dataclass(frozen=True, slots=True)
class Loads:
    """Shares of a second: of each stage's lanes (blocks, autoencoder; the same one twice, or two), of each host's cores."""

    lanes: tuple[tuple[float, float], ...]
    cores: tuple[float, ...]

    @property
    def most(self) -> float:
        """Of what is the narrowest."""
        return max(*(load for lanes in self.lanes for load in lanes), *self.cores)


@dataclass(slots=True)
class Book:
    """The streams that a pipeline has promised to carry, or carries: equal demands are counted, not listed.

    ``neighbours``: cores by host that other pipelines have promised away there.
    """

    shape: Shape
    costs: Costs
    demands: Counter[Demand] = field(default_factory=lambda: Counter[Demand]())
    neighbours: dict[str, float] = field(default_factory=dict[str, float])

    # --- keeping ------------------------------------------------------------------------------------------------------

    @property
    def streams(self) -> int:
        """How many."""
        return self.demands.total()

    def add(self, demand: Demand, count: int = 1) -> None:
        """Streams join."""
        self.demands[demand] += count

    def remove(self, demand: Demand) -> None:
        """A stream leaves. Raises KeyError when no such stream is here."""
        if self.demands[demand] <= 0:
            raise KeyError(demand)
        self.demands[demand] -= 1
        if not self.demands[demand]:
            del self.demands[demand]

    def known(self) -> bool:
        """Whether everything a stream costs has been measured."""
        stages = (f"stage.{stage}" for stage in range(self.shape.stages))
        return all(self.costs.known(key) for key in (*stages, "encode", "decode"))

    # --- pricing ------------------------------------------------------------------------------------------------------

    def load(self, extra: Demand | None = None, count: int = 1, instead_of: Demand | None = None) -> float:
        """The load with ``count`` more streams like ``extra``, without one like ``instead_of``."""
        return self.loads(extra, count, instead_of).most

    def loads(
        self, extra: Demand | None = None, count: int = 1, instead_of: Demand | None = None, margin: bool = False
    ) -> Loads:
        """The same in its parts. ``margin``: if all took as much longer as the cost model may be wrong in a second."""
        demands: dict[Demand, int] = self.demands
        if extra is not None or instead_of is not None:
            demands = dict(self.demands)
            if extra is not None:
                demands[extra] = demands.get(extra, 0) + count
            if instead_of is not None:
                demands[instead_of] = demands.get(instead_of, 0) - 1
        return self._loads(demands, margin)

    def latency_ms(self, demand: Demand, loads: Loads) -> float:
        """From a frame's capture to its output, for the first frame of a block, at these loads.

        Each visit to a lane finds it busy in as many cases as its load says, and then waits for at most one job: what
        else waits there shares the next forward, or has more time. The fuller the lane the larger its batches. Each part
        is taken as long as nine in ten of them are at most, by the cost model's error.
        """
        shape = self.shape
        batch = self._batch(demand.bucket, self.demands[demand] + 1, [demand])
        cores = [load * host.cores for load, host in zip(loads.cores, shape.hosts, strict=True)]
        encode, decode = self._encode_ms(demand), self._decode_ms(demand)
        took, longest = 0.0, [0.0] * shape.stages
        for stage in range(shape.stages):
            busy, alone = min(1.0, loads.lanes[stage][0]), self._forward_ms(stage, demand, 1)
            together = alone + busy * (self._forward_ms(stage, demand, batch) - alone)
            longest[stage] = together * self._slowed(stage, cores) * self._margin(f"stage.{stage}")
            took += demand.steps * (1.0 + busy) * longest[stage]
        for at, key, ms in ((shape.encode_at, "encode", encode), (shape.decode_at, "decode", decode)):
            slower = self._slowed(at, cores) * self._margin(key)
            in_the_way = max(encode, decode) * slower
            if not shape.two_lanes(at):
                in_the_way = max(in_the_way, longest[at])
            chunks = demand.frames_per_block if key == "decode" else 1
            took += chunks * ms * slower + min(1.0, loads.lanes[at][1]) * in_the_way
        return demand.capture_ms + took + HOPS_MS + PACING_MS

    def _loads(self, demands: Mapping[Demand, int], margin: bool = False) -> Loads:
        shape = self.shape
        lanes = [[0.0, 0.0] for _ in range(shape.stages)]  # a second's work by worker, in seconds
        thread_s = [0.0] * shape.stages
        chunks_per_s = mpix_per_s = 0.0

        def work(stage: int, lane: int, key: str, units: int, ms: float, forwards: float, alone_ms: float) -> None:
            # Each of them may be as far off as the error says; what they take together is off by less.
            off = self.costs.error(key) / max(1.0, forwards) ** 0.5 if margin else 0.0
            seconds = ms / 1000.0 * (1.0 + off)
            threads = shape.threads_of(stage, key, units)
            thread_s[stage] += alone_ms / 1000.0 * (1.0 + off) * threads
            both = threads > 1 or not shape.two_lanes(stage)
            for each in (0, 1) if both else (lane,):
                lanes[stage][each] += seconds

        groups: dict[tuple[int, int, int], list[tuple[Demand, int]]] = {}
        for demand, count in demands.items():
            if count > 0 and demand.live:
                groups.setdefault(demand.bucket, []).append((demand, count))
                mpix_per_s += count * demand.pixels_per_s
        for bucket, members in groups.items():
            batch = self._batch(bucket, sum([count for _, count in members]), [demand for demand, _ in members])
            first, units = members[0][0], members[0][0].tokens
            items = sum([count * demand.items_per_s for demand, count in members])
            chunks = sum([count * demand.chunks_per_s for demand, count in members])
            for stage in range(shape.stages):
                forwards_ms = items * self._forward_ms(stage, first, batch) / batch
                alone_ms = items * self._forward_ms(stage, first, 1)
                work(stage, 0, f"stage.{stage}", units * first.frames_per_block, forwards_ms, items / batch, alone_ms)
            encodes_ms, decodes_ms = chunks * self._encode_ms(first), chunks * self._decode_ms(first)
            work(shape.encode_at, 1, "encode", units, encodes_ms, chunks, encodes_ms)
            work(shape.decode_at, 1, "decode", units, decodes_ms, chunks, decodes_ms)
            chunks_per_s += chunks
        cores: list[float] = []
        for host in shape.hosts:
            own = sum(thread_s[stage] for stage in host.stages) / host.stretch(host.used) * host.correction
            rest = host.fixed + host.per_chunk * chunks_per_s + host.per_mpix * mpix_per_s
            cores.append(own + rest + self.neighbours.get(host.name, 0.0))
        slower = [self._slowed(stage, cores) for stage in range(shape.stages)]
        return Loads(
            tuple((blocks * slow, codec * slow) for (blocks, codec), slow in zip(lanes, slower, strict=True)),
            tuple(used / host.cores if host.cores > 0 else 0.0 for used, host in zip(cores, shape.hosts, strict=True)),
        )

    def promised_cores(self) -> dict[str, float]:
        """By host, what this pipeline's streams alone will use of its cores."""
        loads = zip(self.shape.hosts, self._loads(self.demands).cores, strict=True)
        return {h.name: load * h.cores - h.fixed - self.neighbours.get(h.name, 0.0) for h, load in loads}

    def forwards(self) -> dict[str, Priced]:
        """By host, what the forwards of all live streams are priced at, before correction."""
        chunks = sum(count * demand.chunks_per_s for demand, count in self.demands.items())
        pixels = sum(count * demand.pixels_per_s for demand, count in self.demands.items())
        work = sum(count * demand.work_per_s for demand, count in self.demands.items())
        found: dict[str, Priced] = {}
        for host, load in zip(self.shape.hosts, self._loads(self.demands).cores, strict=True):
            rest = host.fixed + host.per_chunk * chunks + host.per_mpix * pixels + self.neighbours.get(host.name, 0.0)
            found[host.name] = Priced((load * host.cores - rest) / host.correction, work)
        return found

    def _slowed(self, stage: int, cores: list[float]) -> float:
        """How much slower than measured a stage's worker is when so many cores of each host are in use."""
        for host, used in zip(self.shape.hosts, cores, strict=True):
            if stage in host.stages and stage < len(self.shape.threads) and self.shape.threads[stage]:
                return host.stretch(used) / host.stretch(host.used)
        return 1.0

    def _margin(self, key: str) -> float:
        return 1.0 + self.costs.error(key)

    def _batch(self, bucket: tuple[int, int, int], streams: int, members: list[Demand]) -> int:
        """How many items of a bucket will share a forward when it is busy: what is cheapest per item and keeps deadlines."""
        most = max(1, min(self.shape.max_batch, streams))
        best, best_ms = 1, self._forwards_ms(members[0], 1)
        size = 2
        while size < 2 * most:
            items = min(size, most)
            took = self._forwards_ms(members[0], items)
            # Each forward may wait for another as long.
            in_time = all(m.capture_ms + 2 * m.steps * took + HOPS_MS + PACING_MS <= m.deadline_ms for m in members)
            if in_time and took / items < best_ms:
                best, best_ms = items, took / items
            size *= 2
        return best

    def _forwards_ms(self, demand: Demand, items: int) -> float:
        return sum([self._forward_ms(stage, demand, items) for stage in range(self.shape.stages)])

    def _forward_ms(self, stage: int, demand: Demand, items: int) -> float:
        return self.costs.predict(f"stage.{stage}", items * demand.frames_per_block * demand.tokens, items)

    def _encode_ms(self, demand: Demand) -> float:
        return self.costs.predict("encode", demand.tokens)

    def _decode_ms(self, demand: Demand) -> float:
        return self.costs.predict("decode", demand.tokens)


def lower(demand: Demand, *, steps: int = 0, fps: float = 0.0, frames_per_block: int = 0) -> Demand:
    """The demand with what is given (above 0) changed."""
    return replace(
        demand,
        steps=steps or demand.steps,
        fps=fps or demand.fps,
        frames_per_block=frames_per_block or demand.frames_per_block,
    )
