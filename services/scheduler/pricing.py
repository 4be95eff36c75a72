"""What streams cost a pipeline: the share of its slowest worker's time, and how old their pictures come out. Pure.

Costs come from the cost model that schedules; nothing here is measured or fitted but the host's share. A load of 1 is all
the time there is. Two resources can be the narrow one: a worker's device, and, where the device *is* the host's cores, the
cores, which ingest, egress and the rest share. Costs fitted while the host was busy have its share in them already:

    load = device time · (1 − host now / cores) + host then / cores

which is the same as "device time = 1" when nothing is left, and right in between (work is conserved).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Protocol

CHUNK_FRAMES = 4
HOPS_MS = 15.0  # the bus and the services' own work along the way
PACING_MS = 15.0  # what egress keeps above the slowest recent chunk


class Costs(Protocol):
    """The cost model as admission needs it: milliseconds by key, units (latent tokens) and items that share the forward."""

    def predict(self, key: str, units: float, items: int = 1) -> float: ...

    def known(self, key: str) -> bool: ...


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
    """The cores that the pipeline's workers share with other services. ``cores`` 0: they share none (a GPU).

    ``busy`` cores are in use by others now. ``fixed`` are, without any stream, ``per_mpix`` more for each million pixels a
    second. ``threads`` is what one worker's forward occupies.
    """

    cores: float = 0.0
    threads: float = 1.0
    busy: float = 0.0
    fixed: float = 0.0
    per_mpix: float = 0.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A pipeline as far as its capacity depends on it. ``encode_at`` and ``decode_at`` are stages whose worker does those."""

    stages: int = 1
    encode_at: int = 0
    decode_at: int = 0
    max_batch: int = 8
    host: Host = field(default_factory=Host)


@dataclass(slots=True)
class Book:
    """The streams that a pipeline has promised to carry, or carries: equal demands are counted, not listed."""

    shape: Shape
    costs: Costs
    slow: float = 1.0  # how much longer the workers are busy than predicted, as measured; never below 1
    demands: Counter[Demand] = field(default_factory=lambda: Counter[Demand]())

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
        demands = self.demands
        if extra is not None or instead_of is not None:
            demands = Counter(self.demands)
            if extra is not None:
                demands[extra] += count
            if instead_of is not None:
                demands[instead_of] -= 1
        return self._load(demands)

    def latency_ms(self, demand: Demand, load: float) -> float:
        """From a frame's capture to its output, for the first frame of a block, at this load of the pipeline.

        Each visit to a worker finds it busy in ``load`` of all cases, and then waits for at most one service: what else
        waits there shares the next forward, or has more time.
        """
        batch = self._batch(demand.bucket, self.demands[demand] + 1, [demand])
        visits = [self._forward_ms(stage, demand, batch) for stage in range(self.shape.stages)] * demand.steps
        chunks = demand.frames_per_block
        visits += [self._encode_ms(demand), self._decode_ms(demand) * chunks]
        wait = min(1.0, load) * max(visits)
        return demand.capture_ms + sum(visits) + wait * len(visits) + HOPS_MS + PACING_MS

    def _load(self, demands: Counter[Demand]) -> float:
        """Of the slowest worker, and of the host where the workers compute on its cores."""
        shape, host = self.shape, self.shape.host
        busy_ms = [0.0] * shape.stages  # a second's work by worker
        mpix = 0.0
        groups: dict[tuple[int, int, int], list[tuple[Demand, int]]] = {}
        for demand, count in demands.items():
            if count > 0 and demand.live:
                groups.setdefault(demand.bucket, []).append((demand, count))
                mpix += count * demand.pixels_per_s
        for bucket, members in groups.items():
            batch = self._batch(bucket, sum(count for _, count in members), [demand for demand, _ in members])
            first = members[0][0]
            items = sum(count * demand.items_per_s for demand, count in members)
            chunks = sum(count * demand.chunks_per_s for demand, count in members)
            for stage in range(shape.stages):
                busy_ms[stage] += items * self._forward_ms(stage, first, batch) / batch
            busy_ms[shape.encode_at] += chunks * self._encode_ms(first)
            busy_ms[shape.decode_at] += chunks * self._decode_ms(first)
        busy_ms = [ms * self.slow for ms in busy_ms]
        if host.cores <= 0:
            return max(busy_ms) / 1000.0
        alone = max(0.0, 1.0 - host.busy / host.cores)  # the part of the measured time that was the worker's own
        own = sum(busy_ms) / 1000.0 * alone * host.threads
        then = host.fixed + host.per_mpix * mpix
        return max(max(busy_ms) / 1000.0 * alone, (own + then) / host.cores)

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
        return sum(self._forward_ms(stage, demand, items) for stage in range(self.shape.stages))

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
