"""Placement: which worker of a pipeline holds which DiT blocks, and which pipeline takes a stream. Pure.

Encode, the DiT blocks and decode are one list of layers with measured costs. Encode stays with the first worker and
decode with the one that hosts it, since their caches are large (rule 8); both are priced in. What is chosen are the cuts:
the first block of each stage but the first. Every stage holds at least one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

Cuts = tuple[int, ...]
"""The first DiT block of stage 1, 2, …, S−1: ascending, between 1 and the number of blocks − 1."""


class CutsError(ValueError):
    """Cuts that a pipeline cannot have; the message names what would do."""


@dataclass(frozen=True, slots=True)
class WorkerCost:
    """What a stage's worker is busy with, in any one unit of time for all workers of a pipeline.

    ``per_block`` is what one DiT block of weight 1 costs on it; ``fixed`` is what it does beside its blocks (encode,
    decode), wherever the cuts are. ``most_blocks`` is what fits into its memory (0: unknown, any number).
    ``off`` is the standard error of ``per_block``.
    """

    per_block: float
    fixed: float = 0.0
    most_blocks: int = 0
    off: float = 0.0


def check_cuts(cuts: Sequence[int], layers: int, stages: int) -> Cuts:
    """The cuts as a tuple. Raises CutsError unless they give each of ``stages`` stages at least one of ``layers`` blocks."""
    wanted = f"{stages - 1} ascending numbers between 1 and {layers - 1}" if stages > 1 else "none, for one stage"
    bounds = [0, *cuts, layers]
    if len(cuts) != stages - 1 or any(b <= a for a, b in pairwise(bounds)):
        raise CutsError(f"cuts {list(cuts)} do not split {layers} blocks over {stages} stages: give {wanted}")
    return tuple(cuts)


def ranges_of(cuts: Sequence[int], layers: int) -> tuple[range, ...]:
    """Each stage's DiT blocks."""
    return tuple(range(a, b) for a, b in pairwise([0, *cuts, layers]))


def cuts_of(ranges: Sequence[range]) -> Cuts:
    """The inverse of :func:`ranges_of`."""
    return tuple(blocks.start for blocks in ranges[1:])


def moved_blocks(before: Sequence[int], after: Sequence[int], layers: int) -> dict[int, tuple[int, int]]:
    """Block → (stage that had it, stage that gets it), for every block that changes its stage."""
    had = {block: stage for stage, blocks in enumerate(ranges_of(before, layers)) for block in blocks}
    gets = {block: stage for stage, blocks in enumerate(ranges_of(after, layers)) for block in blocks}
    return {block: (had[block], gets[block]) for block in range(layers) if had[block] != gets[block]}


def stage_costs(
    cuts: Sequence[int], workers: Sequence[WorkerCost], layers: int, weights: Sequence[float] = ()
) -> list[float]:
    """What each stage costs with these cuts. ``weights`` are the blocks' relative costs (none: all are alike)."""
    sums = [0.0, *accumulate(weights or [1.0] * layers)]
    ranges = ranges_of(cuts, layers)
    return [w.fixed + w.per_block * (sums[r.stop] - sums[r.start]) for w, r in zip(workers, ranges, strict=True)]


def best_cuts(
    workers: Sequence[WorkerCost], layers: int, weights: Sequence[float] = (), current: Sequence[int] = ()
) -> Cuts:
    """The cuts whose slowest stage costs least; of several, those that move the fewest blocks away from ``current``.

    Exact, by dynamic programming over (stage, first blocks): 8 stages and 40 blocks take some milliseconds. A worker's
    ``most_blocks`` is kept if it can be; raises CutsError when the blocks do not fit at all, or are fewer than the stages.
    """
    stages = len(workers)
    if not 1 <= stages <= layers:
        raise CutsError(f"{layers} DiT blocks cannot be split over {stages} stages: 1…{layers} stages are possible")
    sums = [0.0, *accumulate(weights or [1.0] * layers)]

    def cost(stage: int, start: int, end: int) -> float:
        worker = workers[stage]
        if worker.most_blocks and end - start > worker.most_blocks:
            return math.inf
        return worker.fixed + worker.per_block * (sums[end] - sums[start])

    # least[j]: the slowest of the stages so far, if they hold the blocks 0…j−1.
    least = [0.0] + [math.inf] * layers
    for stage in range(stages):
        ends = range(stage + 1, layers - (stages - 1 - stage) + 1)
        after = [math.inf] * (layers + 1)
        for end in ends:
            after[end] = min(max(least[start], cost(stage, start, end)) for start in range(stage, end))
        least = after
    slowest = least[layers]
    if math.isinf(slowest):
        room = [worker.most_blocks for worker in workers]
        raise CutsError(f"{layers} DiT blocks do not fit into workers that hold {room}")
    return _nearest(stages, layers, lambda k, start, end: cost(k, start, end) <= slowest * (1 + 1e-9), current)


def _nearest(stages: int, layers: int, allowed: Callable[[int, int, int], bool], current: Sequence[int]) -> Cuts:
    """Of the cuts whose every stage is allowed, those that move the fewest blocks."""
    home = {block: stage for stage, blocks in enumerate(ranges_of(current, layers)) for block in blocks}
    here = bool(current) or stages == 1
    stays = [[0, *accumulate(int(here and home[block] == stage) for block in range(layers))] for stage in range(stages)]
    kept: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]  # per stage: end → (blocks that stay, where it starts)
    for stage in range(stages):
        row: dict[int, tuple[int, int]] = {}
        for end in range(stage + 1, layers - (stages - 1 - stage) + 1):
            reach = [
                (kept[-1][start][0] + stays[stage][end] - stays[stage][start], start)
                for start in range(stage, end)
                if start in kept[-1] and allowed(stage, start, end)
            ]
            if reach:
                row[end] = max(reach)
        kept.append(row)
    cuts: list[int] = []
    end = layers
    for stage in range(stages, 1, -1):
        end = kept[stage][end][1]
        cuts.append(end)
    return tuple(reversed(cuts))


def choose_pipeline(
    loads: Mapping[str, float] | Mapping[str, tuple[float, int]], avoid: frozenset[str] = frozenset()
) -> str | None:
    """Where a stream goes: the pipeline with the least predicted load, by name among equals; None when there is none.

    ``loads`` are of the pipelines that may take it: the share of their slowest stage's time that is spoken for.
    """
    open_to = [name for name in loads if name not in avoid]
    return min(open_to, key=lambda name: (loads[name], name)) if open_to else None
