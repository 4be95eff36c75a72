"""Real workers on one bus: blocks change hands, a stream is set aside and moves to another pipeline; pixels stay equal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from services.scheduler.messenger import RefusedError
from services.scheduler.moves import Moves, new_move
from services.worker.app import Worker
from services.worker.settings import Settings
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import Received
from shared.clock import SystemClock
from shared.contracts import subjects
from shared.contracts.commands import PreparePrompt, TakeStream
from shared.contracts.events import (
    BatchDone,
    BatchEntry,
    ChunkCaptured,
    ChunkStamp,
    FrameStamp,
    SourceTotals,
    StageBatch,
)
from shared.contracts.moving import BlockRange, CutOver, ExportState, ImportState, PrepareBlocks, SuspendStream
from shared.contracts.refs import TensorRef
from shared.engine.plan.noise_controller import step_timesteps
from shared.engine.plan.registry import model_spec
from shared.engine.plan.stream_plan import StreamPlan
from shared.lifecycle import Context
from shared.session.memory import MemoryStore
from shared.telemetry.metrics import Metrics
from shared.telemetry.setup import silent
from shared.tensors.store import HostTensorStore
from tests.support.messages import spec

pytestmark = pytest.mark.integration

MODEL = model_spec("rheo-tiny")
WIDTH, HEIGHT = 96, 64
WAIT_S = 20.0
PLACES = {
    "w0": ("p0", 0, 2, "encode,stage"),
    "w1": ("p0", 1, 2, "stage,decode"),
    "w2": ("p1", 0, 1, "encode,stage,decode"),
}
PIPELINES = {"p0": ("w0", "w1"), "p1": ("w2",)}


class Bench:
    """Three workers in two pipelines, and in the scheduler's place a driver that runs one step after the other."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self.broker, self.store = MemoryBroker(), MemoryStore()
        self.bus = MemoryBus(self.broker)
        self.tensors = self._tensors("driver")
        self.moves = Moves(self.bus, SystemClock())
        self.workers: dict[str, Worker] = {}
        self._stores = [self.tensors]
        self._heard: asyncio.Queue[Received] = asyncio.Queue()
        self._batches: dict[str, tuple[int, int]] = {"p0": (1, 0), "p1": (1, 0)}

    def _tensors(self, instance: str) -> HostTensorStore:
        return HostTensorStore(Path("/dev/shm"), self._run_id, instance, bus=self.bus, max_bytes=64 << 20)

    async def start(self) -> None:
        await self.bus.subscribe(subjects.MOVED, self.moves.on_moved)
        for leaf in ("latents", "frames"):
            await self.bus.subscribe(subjects.stream("*", leaf), self._heard.put)
        await self.bus.subscribe(subjects.pipeline_done("*"), self._heard.put)
        embedding = torch.randn(MODEL.text_len, MODEL.text_dim, generator=torch.Generator().manual_seed(1))
        embedding[10:] = 0
        await self.store.put_embedding("words", "float32", tuple(embedding.shape), embedding.numpy().tobytes())
        for name, (pipeline, stage, stages, roles) in PLACES.items():
            settings = Settings(
                instance=name,
                pipeline=pipeline,
                stage=stage,
                stages=stages,
                roles=roles,
                model="rheo-tiny",
                device="cpu",
                threads=1,
            )
            tensors = self._tensors(name)
            self._stores.append(tensors)
            context = Context(
                settings,
                MemoryBus(self.broker),
                self.store,
                tensors,
                silent(),
                SystemClock(),
                name,
                "life",
                Metrics("worker", name),
            )
            self.workers[name] = Worker(context, settings)
            await self.workers[name].start()

    async def close(self) -> None:
        for worker in self.workers.values():
            await worker.close()
        for tensors in self._stores:
            tensors.close()

    async def hear(self, *kinds: str) -> Received:
        async with asyncio.timeout(WAIT_S):
            while True:
                received = await self._heard.get()
                assert "fault" not in received.message.kind, received.message
                assert received.message.kind != "chunk_dropped", received.message
                if received.message.kind in kinds:
                    return received

    async def take(self, stream: str, pipeline: str, epoch: int, prompt: bool) -> None:
        for worker in PIPELINES[pipeline]:
            take = TakeStream(
                instance=worker,
                stream=stream,
                epoch=epoch,
                spec=spec(width=WIDTH, height=HEIGHT),
                width=WIDTH,
                height=HEIGHT,
                noise=0.7,
                credits=4,
            )
            await self.bus.publish(subjects.assign("worker"), take)
            async with asyncio.timeout(WAIT_S):
                while stream not in self.workers[worker]._handlers.assignments.streams:
                    await asyncio.sleep(0.01)
            if prompt:
                prepare = PreparePrompt(instance=worker, stream=stream, epoch=epoch, version=1, digest="words")
                await self.bus.publish(subjects.assign("worker"), prepare)
                await self.hear("prompt_ready")

    async def batch(self, pipeline: str, entry: BatchEntry) -> BatchDone:
        generation, seq = self._batches[pipeline]
        self._batches[pipeline] = (generation, seq + 1)
        batch = StageBatch(
            pipeline=pipeline, term=1, generation=generation, seq=seq, entries=(entry,), height=HEIGHT, width=WIDTH
        )
        await self.bus.publish(subjects.pipeline_stage(pipeline, 0), batch)
        return (await self.hear("batch_done")).message

    async def rebalance(self, stream: str, epoch: int, blocks: dict[str, BlockRange]) -> None:
        """As the scheduler does it: prepare, copy, cut over; every request twice, as when answers are lost."""
        now = {name: self.workers[name]._runtime.block_fields() for name in blocks}
        generation = self._batches["p0"][0] + 1
        for name, after in blocks.items():
            prepare = PrepareBlocks(instance=name, pipeline="p0", move=new_move(), blocks=after)
            await self.moves.ask(prepare, WAIT_S)
        for name, after in blocks.items():
            mine = range(now[name]["first_block"], now[name]["last_block"] + 1)
            gained = [block for block in after.blocks if block not in mine]
            for source in blocks:
                if source != name and gained:
                    export = ExportState(
                        instance=source,
                        stream=stream,
                        epoch=epoch,
                        move=new_move(),
                        blocks=BlockRange(first=gained[0], last=gained[-1]),
                    )
                    first, second = await self.moves.ask(export, WAIT_S), await self.moves.ask(export, WAIT_S)
                    assert first == second
                    assert first.state is not None
                    take = ImportState(instance=name, stream=stream, epoch=epoch, move=new_move(), state=first.state)
                    assert await self.moves.ask(take, WAIT_S) == await self.moves.ask(take, WAIT_S)
        for stage, (name, after) in enumerate(blocks.items()):
            cut = CutOver(
                instance=name,
                pipeline="p0",
                move=new_move(),
                term=1,
                generation=generation,
                blocks=after,
                stage=stage,
                stages=2,
            )
            answer = await self.moves.ask(cut, WAIT_S)
            assert answer == await self.moves.ask(cut, WAIT_S)
            assert answer.missing == ()
            with pytest.raises(RefusedError, match="is over"):
                await self.moves.ask(cut.model_copy(update={"move": new_move()}), WAIT_S)
            assert self.workers[name]._runtime.block_fields() == {"first_block": after.first, "last_block": after.last}
        self._batches["p0"] = (generation, 0)

    async def migrate(self, stream: str, epoch: int, source: str, target: str) -> None:
        await self.take(stream, target, epoch + 1, prompt=False)
        for old in PIPELINES[source]:
            export = ExportState(
                instance=old,
                stream=stream,
                epoch=epoch,
                move=new_move(),
                blocks=BlockRange(first=0, last=MODEL.layers - 1),
                encode=True,
                decode=True,
            )
            answer = await self.moves.ask(export, WAIT_S)
            assert answer.state is not None
            for new in PIPELINES[target]:
                take = ImportState(
                    instance=new,
                    stream=stream,
                    epoch=epoch + 1,
                    move=new_move(),
                    state=answer.state,
                    encoded=answer.encoded,
                    decoded=answer.decoded,
                )
                await self.moves.ask(take, WAIT_S)


class Driven:
    """One stream, chunk after chunk, every block run through all of its steps."""

    def __init__(self, bench: Bench, stream: str, pipeline: str) -> None:
        self.bench, self.stream, self.pipeline, self.epoch = bench, stream, pipeline, 1
        self.plan = StreamPlan.for_model(stream, 1, MODEL)
        self.steps = step_timesteps(700, MODEL.steps[:2])
        self.chunks = 0
        self.shown: list[np.ndarray] = []

    async def chunk(self) -> None:
        bench, first = self.bench, self.chunks == 0
        stamp = ChunkStamp(
            stream=self.stream,
            epoch=self.epoch,
            chunk=self.chunks,
            frames=tuple(FrameStamp(index=i, pts=i, captured_ns=1, deadline_ns=0) for i in range(5 if first else 4)),
        )
        pixels = np.random.default_rng(self.chunks).integers(0, 256, (len(stamp.frames), HEIGHT, WIDTH, 3), np.uint8)
        captured = ChunkCaptured(
            stamp=stamp, pixels=bench.tensors.put(pixels), rmse=(0.0,) * len(stamp.frames), totals=SourceTotals()
        )
        self.chunks += 1
        await bench.bus.publish(subjects.stream(self.stream, "chunk"), captured)
        encoded = (await bench.hear("latents_encoded")).message
        item = self.plan.enter(encoded.latent_frames, 0.7, self.steps, 3, 1)
        inputs: tuple[TensorRef, ...] = (encoded.latents,)
        while True:
            # A plan knows one epoch; the stream is on its second one after a migration.
            sent = replace(item, epoch=self.epoch)
            done = await bench.batch(self.pipeline, BatchEntry(item=sent, stamps=(stamp,), inputs=inputs))
            self.plan.done(item)
            if item.is_last_step:
                break
            output = done.results[0].output
            assert output is not None
            item, inputs = self.plan.next(item), (output,)
        frames = (await bench.hear("frames_decoded")).message
        self.shown.append(await bench.tensors.fetch(frames.pixels))


@asynccontextmanager
async def bench_of(run_id: str) -> AsyncIterator[Bench]:
    bench = Bench(run_id)
    try:
        await bench.start()
        yield bench
    finally:
        await bench.close()


async def test_blocks_and_streams_move_between_workers_and_pixels_stay_equal(run_id: str) -> None:
    async with bench_of(run_id) as bench:
        whole = BlockRange(first=0, last=MODEL.layers - 1)
        await bench.take("still", "p1", 1, prompt=True)
        await bench.take("moving", "p0", 1, prompt=True)
        still, moving = Driven(bench, "still", "p1"), Driven(bench, "moving", "p0")
        for chunk in range(8):
            await still.chunk()
            if chunk == 2:
                cuts = {"w0": BlockRange(first=0, last=0), "w1": BlockRange(first=1, last=whole.last)}
                await bench.rebalance("moving", 1, cuts)
            elif chunk == 3:
                cuts = {
                    "w0": BlockRange(first=0, last=whole.last - 1),
                    "w1": BlockRange(first=whole.last, last=whole.last),
                }
                await bench.rebalance("moving", 1, cuts)
            elif chunk == 4:
                for worker in PIPELINES["p0"]:
                    aside = SuspendStream(instance=worker, stream="moving", epoch=1, move=new_move())
                    answer = await bench.moves.ask(aside, WAIT_S)
                    assert answer.suspended
                    assert answer.host_bytes > 10_000
                    assert answer == await bench.moves.ask(aside, WAIT_S)
                    fields = bench.workers[worker]._runtime.memory_fields()
                    assert fields["suspended"] == {"moving": answer.host_bytes}
                    assert fields["stream_bytes"]
                back = SuspendStream(instance="w1", stream="moving", epoch=1, move=new_move(), suspended=False)
                assert not (await bench.moves.ask(back, WAIT_S)).suspended  # w0's comes back with its next chunk
            elif chunk == 6:
                await bench.migrate("moving", 1, "p0", "p1")
                moving.pipeline, moving.epoch = "p1", 2
            await moving.chunk()
        for ours, theirs in zip(moving.shown, still.shown, strict=True):
            assert np.array_equal(ours, theirs)
        with pytest.raises(RefusedError, match="is not on w0 in epoch 9"):
            await bench.moves.ask(ExportState(instance="w0", stream="moving", epoch=9, move="a"), WAIT_S)
        with pytest.raises(RefusedError, match="has no stage of pipeline p9"):
            await bench.moves.ask(PrepareBlocks(instance="w0", pipeline="p9", move="b", blocks=whole), WAIT_S)
        beyond = BlockRange(first=0, last=MODEL.layers)
        with pytest.raises(RefusedError, match="has blocks 0…"):
            await bench.moves.ask(PrepareBlocks(instance="w0", pipeline="p0", move="c", blocks=beyond), WAIT_S)
