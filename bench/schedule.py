"""How long one decision of the scheduler takes: ``python -m bench.schedule [--streams N] [--seconds S] [--json]``.

One pipeline in virtual time with the real core: chunks of every stream arrive at their rate, spread evenly; batches take what
a device with a fixed part per forward would. A decision is ``schedule()`` and the encoding of its messages, in CPU time
of this process. ``per_chunk_us`` is everything the core does for a chunk, for those who simulate many.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import time
from itertools import count

from services.scheduler.core import PipelineCore
from services.scheduler.cost_model import CostModel
from services.scheduler.policies import POLICIES
from services.scheduler.stream_queue import StreamQueue, StreamSettings
from shared.contracts.codec import encode
from shared.contracts.events import (
    BatchDone,
    ChunkStamp,
    FrameStamp,
    ItemResult,
    MotionEstimated,
    StageBatch,
    StageTiming,
)
from shared.contracts.refs import TensorPlace, TensorRef
from shared.engine.plan.spec import PRESETS
from shared.engine.plan.stream_plan import StreamPlan

NS = 1_000_000_000
MODEL = PRESETS["rheo-tiny"]
WIDTH, HEIGHT = 320, 192
DEADLINE_NS = 600_000_000
WARM_UP_S = 2


def chunk(stream: str, number: int, now_ns: int) -> MotionEstimated:
    """What motion would send, with the timings and the trace that a real one has."""
    frames, first = (5, 0) if number == 0 else (4, 1 + 4 * number)
    stamps = tuple(
        FrameStamp(index=first + i, pts=(first + i) * 5625, captured_ns=now_ns, deadline_ns=now_ns + DEADLINE_NS)
        for i in range(frames)
    )
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    stamp = ChunkStamp(stream=stream, epoch=1, chunk=number, frames=stamps, live=True, published_ns=now_ns, trace=trace)
    ref = TensorRef(
        owner="worker-0", host="host", place=TensorPlace.LOCAL, shape=(1, 16, HEIGHT // 8, WIDTH // 8), dtype="float32"
    )
    return MotionEstimated(
        stamp=stamp,
        latents=ref,
        latent_frames=2 if number == 0 else 1,
        motion=0.1,
        noise_scale=0.7,
        first_timestep=600,
        timings=(StageTiming(hop="encode", queue_ms=0.5, compute_ms=2.0),),
    )


def forward_ms(items: int, frames: int, streams: int, fps: float, steps: int) -> float:
    """A device that these streams load to about 0.9 with full batches; a forward's fixed part is worth three items."""
    per_item = 0.9 * 1000.0 / (streams * fps / 4 * steps) / (1 + 3 / 8)
    return per_item * (3 + items * frames)


def run(streams: int, fps: float, steps: int, seconds: float, policy: str) -> dict[str, float]:
    """Figures of one run."""
    cost = CostModel()
    tokens = MODEL.tokens(WIDTH, HEIGHT)
    grid = [(b, t) for b in (1, 2, 4, 8) for t in (1, 2)]
    cost.seed("stage.0", [(b, b * t * tokens, forward_ms(b, t, streams, fps, steps)) for b, t in grid])
    core = PipelineCore("p0", 1, 1, cost, policy=POLICIES[policy])
    for index in range(streams):
        name = f"stream-{index:03d}"
        plan = StreamPlan.for_model(name, 1, MODEL)
        core.add(StreamQueue(name, 1, True, HEIGHT, WIDTH, MODEL, plan, StreamSettings(steps, index, 1)))
    period = int(4 * NS / fps)
    order = count()
    events: list[tuple[int, int, int, StageBatch | None]] = [
        (NS + index * period // streams, next(order), index, None) for index in range(streams)
    ]
    heapq.heapify(events)
    numbers = [0] * streams
    wake_ns = 0
    free_ns, took_ns, sent_ns, rest_ns = 0, list[int](), list[int](), 0
    sizes, drops, decided, chunks = list[int](), 0, 0, 0
    clock = time.process_time_ns
    while events[0][0] < NS + int((seconds + WARM_UP_S) * NS):
        now, _, index, batch = heapq.heappop(events)
        if batch is None and index >= 0:
            arrived = chunk(f"stream-{index:03d}", numbers[index], now)
            numbers[index] += 1
            chunks += 1
            heapq.heappush(events, (now + period, next(order), index, None))
            begin = clock()
            core.offer(arrived, now)
            rest_ns += clock() - begin
        elif batch is not None:
            done = report(batch, streams, fps, steps)
            begin = clock()
            core.done(done, now)
            rest_ns += clock() - begin
        begin = clock()
        decisions = core.schedule(now)
        for each in decisions.batches:
            encode(each)
        spent = clock() - begin
        rest_ns += spent
        drops += len(decisions.drops)
        for each in decisions.batches:
            frames = each.entries[0].item.frames
            free_ns = max(free_ns, now) + int(forward_ms(len(each.entries), frames, streams, fps, steps) * 1e6)
            heapq.heappush(events, (free_ns, next(order), -1, each))
        if (at := core.dispatch_at_ns()) > now and at != wake_ns:
            wake_ns = at
            heapq.heappush(events, (at, next(order), -1, None))
        if now > NS + WARM_UP_S * NS:
            decided += 1
            took_ns.append(spent)
            if decisions.batches:
                sent_ns.append(spent)
                sizes.extend(len(each.entries) for each in decisions.batches)
    return {
        "streams": streams,
        "decisions": decided,
        "batches": len(sizes),
        "items_per_batch": round(sum(sizes) / max(1, len(sizes)), 2),
        "dropped": drops,
        **percentiles("decision", took_ns),
        **percentiles("sending", sent_ns),
        "per_chunk_us": round(rest_ns / max(1, chunks) / 1e3, 1),
    }


def report(batch: StageBatch, streams: int, fps: float, steps: int) -> BatchDone:
    """What the last stage would send."""
    results = tuple(
        ItemResult(
            stream=entry.item.stream,
            epoch=1,
            block=entry.item.block,
            step=entry.item.step,
            output=None if entry.item.is_last_step else entry.inputs[0],
        )
        for entry in batch.entries
    )
    ms = forward_ms(len(batch.entries), batch.entries[0].item.frames, streams, fps, steps)
    return BatchDone(pipeline="p0", generation=batch.generation, seq=batch.seq, results=results, stage_ms=(ms,))


def percentiles(name: str, times_ns: list[int]) -> dict[str, float]:
    """Median, p99 and the most, in microseconds."""
    ordered = sorted(times_ns) or [0]
    at = {"p50": len(ordered) // 2, "p99": int(len(ordered) * 0.99), "max": len(ordered) - 1}
    return {f"{name}_{label}_us": round(ordered[place] / 1e3, 1) for label, place in at.items()}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--fps", type=float, default=16.0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="virtual")
    parser.add_argument("--policy", choices=sorted(POLICIES), default="slack")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    gc.freeze()
    figures = run(arguments.streams, arguments.fps, arguments.steps, arguments.seconds, arguments.policy)
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:>20} {value:>10}")


if __name__ == "__main__":
    main()
