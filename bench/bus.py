"""Hop latency of the bus by payload size, on a real nats-server on loopback: ``python -m bench.bus [--json]``.

One process publishes, another receives and answers with the time it took; both clocks are the same machine's. Tensors do
not travel this way between processes of one host (they stay in shared memory): the large sizes show why.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np

from shared.bus.nats import NatsBus
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.events import ChunkCaptured, ChunkStamp, FrameStamp, SourceTotals
from shared.contracts.refs import TensorPlace, TensorRef
from shared.embedded import EmbeddedServers
from shared.tensors.store import HostTensorStore

SIZES = (0, 1_000, 10_000, 100_000, 1_200_000, 4_800_000)
ROUNDS = 200


def message(number: int, payload: bytes) -> ChunkCaptured:
    """A real event with ``payload`` inline bytes in its reference."""
    frames = tuple(FrameStamp(index=i, pts=i, captured_ns=time.time_ns()) for i in range(4))
    stamp = ChunkStamp(stream="bench", epoch=1, chunk=number, frames=frames, published_ns=time.time_ns())
    ref = TensorRef(owner="b", host="h", place=TensorPlace.INLINE, shape=(len(payload),), dtype="uint8", data=payload)
    return ChunkCaptured(stamp=stamp, pixels=ref, rmse=(0.0,) * 4, totals=SourceTotals())


def receive(url: str, count: int, results: Queue[Any]) -> None:
    """The other process: milliseconds from publish to handler, in order."""

    async def main() -> None:
        bus = await NatsBus.connect(url, name="bench-reader")
        took: list[float] = []
        done = asyncio.Event()

        async def on_chunk(received: Received) -> None:
            took.append((time.time_ns() - received.message.stamp.published_ns) / 1e6)
            if len(took) == count:
                done.set()

        await bus.subscribe(subjects.stream("bench", "chunk"), on_chunk, size=count + 1)
        results.put("ready")
        await asyncio.wait_for(done.wait(), 120)
        results.put(took)
        await bus.close()

    asyncio.run(main())


async def measure(url: str, size: int) -> list[float]:
    """One size: publish at a pace, collect the reader's figures."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    reader = context.Process(target=receive, args=(url, ROUNDS, results), daemon=True)
    reader.start()
    await asyncio.to_thread(results.get, True, 30)
    bus = await NatsBus.connect(url, name="bench-writer")
    payload = bytes(size)
    for number in range(ROUNDS):
        await bus.publish(subjects.stream("bench", "chunk"), message(number, payload))
        await asyncio.sleep(0.005 + size / 2e8)
    took = await asyncio.to_thread(results.get, True, 60)
    await bus.close()
    reader.join(10)
    return took


def shared_memory_ms(size: int) -> list[float]:
    """Put and copy out of a shared-memory slot, same process: what a reference costs instead."""
    took: list[float] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        tensors = HostTensorStore(Path(folder), "bench", "bench")
        array = np.zeros(max(1, size), dtype=np.uint8)
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            ref = tensors.put(array)
            tensors.get(ref)
            tensors.release(ref)
            took.append((time.perf_counter() - begin) * 1e3)
        tensors.close()
    return took


def row(took: list[float]) -> dict[str, float]:
    """p50 and p95."""
    ordered = sorted(took)
    return {"p50_ms": round(statistics.median(ordered), 3), "p95_ms": round(ordered[int(len(ordered) * 0.95)], 3)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    table: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        servers = EmbeddedServers(Path(folder), redis=False)
        servers.start()
        try:
            for size in SIZES:
                hop = row(asyncio.run(measure(servers.nats_url, size)))
                slot = row(shared_memory_ms(size))
                table.append({"bytes": size, **hop, "shm_p50_ms": slot["p50_ms"]})
        finally:
            servers.stop()
    if arguments.json:
        print(json.dumps(table))
        return
    print(f"{'payload':>12} {'hop p50':>10} {'hop p95':>10} {'shm put+get p50':>16}")
    for line in table:
        print(f"{line['bytes']:>12} {line['p50_ms']:>7.3f} ms {line['p95_ms']:>7.3f} ms {line['shm_p50_ms']:>13.3f} ms")


if __name__ == "__main__":
    main()
