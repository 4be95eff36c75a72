"""Motion as a service, on a bus and a store: it takes streams, estimates, mirrors, and goes on after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services.motion.app import Motion
from services.motion.settings import Settings
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import Received
from shared.clock import SystemClock
from shared.contracts import subjects
from shared.contracts.commands import LeaveStream, TakeStream
from shared.contracts.events import LatentsEncoded, MotionEstimated, StageTiming
from shared.lifecycle import Context
from shared.session.memory import MemoryStore
from shared.session.port import StoreUnavailableError
from shared.session.state import Owner, StreamState
from shared.telemetry.hops import start_chunk_trace
from shared.telemetry.metrics import Metrics
from shared.telemetry.propagation import span_context_of
from shared.telemetry.setup import Telemetry, setup, silent
from shared.tensors.store import HostTensorStore
from tests.support.messages import ref, spec, stamp
from tests.support.otlp import attributes, otlp_receiver

pytestmark = pytest.mark.integration


async def until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


class Bench:
    """A broker, a store, and motion services that come and go."""

    def __init__(self, run_id: str) -> None:
        self.broker = MemoryBroker()
        self.store = MemoryStore()
        self.bus = MemoryBus(self.broker)
        self.estimates: list[MotionEstimated] = []
        self._run_id = run_id
        self._running: list[tuple[Motion, Context]] = []

    async def listen(self) -> None:
        async def keep(received: Received) -> None:
            self.estimates.append(received.message)

        await self.bus.subscribe(subjects.stream("*", "motion"), keep, size=4096)

    async def start(self, instance: str = "motion-0", telemetry: Telemetry | None = None) -> Motion:
        bus = MemoryBus(self.broker)
        settings = Settings(instance=instance)
        tensors = HostTensorStore(Path("/dev/shm"), self._run_id, instance, bus=bus)
        context = Context(
            settings,
            bus,
            self.store,
            tensors,
            telemetry or silent(),
            SystemClock(),
            instance,
            f"life-{len(self._running)}",
            Metrics("motion", instance),
        )
        motion = Motion(context, settings)
        await motion.start()
        self._running.append((motion, context))
        return motion

    async def kill(self, motion: Motion) -> None:
        """As by SIGKILL: no drain, nothing mirrored at the end."""
        for each, context in list(self._running):
            if each is motion:
                self._running.remove((each, context))
                await context.bus.close()
                await motion.close()
                context.tensors.close()

    async def close(self) -> None:
        for motion, _ in list(self._running):
            await self.kill(motion)
        await self.bus.close()

    async def take(self, stream: str = "s1", epoch: int = 1, noise: float = 0.8, instance: str = "motion-0") -> None:
        message = TakeStream(
            instance=instance, stream=stream, epoch=epoch, spec=spec(), width=64, height=64, noise=noise, credits=4
        )
        await self.bus.publish(subjects.assign("motion"), message)

    async def leave(self, stream: str = "s1", epoch: int = 1) -> None:
        message = LeaveStream(instance="motion-0", stream=stream, epoch=epoch, drain=False)
        await self.bus.publish(subjects.assign("motion"), message)

    async def chunk(self, number: int, rmse: float = 0.1, stream: str = "s1", epoch: int = 1, trace: str = "") -> None:
        message = LatentsEncoded(
            stamp=stamp(stream, number, epoch, trace),
            latents=ref(),
            latent_frames=1,
            rmse=(0.0, rmse),
            timings=(StageTiming(hop="encode", queue_ms=1.0, compute_ms=2.0),),
        )
        await self.bus.publish(subjects.stream(stream, "latents"), message)

    async def mirror(self) -> object:
        session = await self.store.get("s1")
        assert session is not None
        return session.get("controller")


@pytest.fixture
async def bench(run_id: str) -> AsyncIterator[Bench]:
    bench = Bench(run_id)
    await bench.listen()
    yield bench
    await bench.close()


async def test_a_chunk_goes_through_with_its_stamp_latents_and_timings(bench: Bench) -> None:
    motion = await bench.start()
    await bench.store.create("s1", spec())
    await bench.take()
    await until(lambda: motion.beat_fields()["streams"] == ("s1",))
    await bench.chunk(0, rmse=0.2)
    await until(lambda: len(bench.estimates) == 1)
    estimate = bench.estimates[0]
    assert estimate.stamp == stamp("s1", 0)
    assert estimate.latents == ref()
    assert estimate.motion == 1.0
    assert estimate.noise_scale == pytest.approx(0.71)
    assert estimate.first_timestep == 610
    assert [timing.hop for timing in estimate.timings] == ["encode", "motion"]
    assert estimate.timings[1].compute_ms >= 0.0


async def test_assignments_of_other_instances_and_chunks_of_unknown_streams_are_left_alone(bench: Bench) -> None:
    motion = await bench.start()
    await bench.take(instance="motion-7")
    await bench.chunk(0)
    await asyncio.sleep(0.05)
    assert motion.beat_fields()["streams"] == ()
    assert bench.estimates == []


async def test_repeated_and_reordered_chunks_are_estimated_once_each(bench: Bench) -> None:
    await bench.start()
    await bench.store.create("s1", spec())
    await bench.take()
    await asyncio.sleep(0.02)
    for number in (0, 1, 1, 3, 2, 2, 0):
        await bench.chunk(number)
    await until(lambda: len(bench.estimates) == 4)
    await asyncio.sleep(0.02)
    assert [estimate.stamp.chunk for estimate in bench.estimates] == [0, 1, 3, 2]


async def test_after_it_left_its_chunks_are_not_taken_up_again(bench: Bench) -> None:
    motion = await bench.start()
    await bench.store.create("s1", spec())
    await bench.store.put("s1", Owner.SCHEDULER, {"assignment": {"noise": 0.8, "epoch": 1}})
    await bench.take()
    await asyncio.sleep(0.02)
    await bench.leave()
    await asyncio.sleep(0.02)
    await bench.chunk(0)
    await asyncio.sleep(0.05)
    assert bench.estimates == []
    assert motion.beat_fields()["streams"] == ()


async def test_killed_and_started_again_it_goes_on_from_its_mirror_without_being_told(bench: Bench) -> None:
    """The values after the restart are those of a motion that never died."""
    await bench.store.create("s1", spec())
    await bench.store.put("s1", Owner.SCHEDULER, {"assignment": {"noise": 0.7, "epoch": 1, "motion": "motion-0"}})
    first = await bench.start()
    await bench.take(noise=0.7)
    await asyncio.sleep(0.02)
    rmse = [0.02 * (number % 9) for number in range(20)]
    for number in range(10):
        await bench.chunk(number, rmse[number])
    await until(lambda: len(bench.estimates) == 10)
    async with asyncio.timeout(5):
        while not isinstance(mirror := await bench.mirror(), dict) or mirror["chunk"] != 9:
            await asyncio.sleep(0.01)
    await bench.kill(first)
    await bench.start()
    for number in range(9, 20):
        await bench.chunk(number, rmse[number])
    await until(lambda: len(bench.estimates) == 20)
    assert [estimate.stamp.chunk for estimate in bench.estimates] == list(range(20))

    await bench.store.create("s2", spec())
    await bench.take("s2", noise=0.7)
    await asyncio.sleep(0.02)
    for number in range(20):
        await bench.chunk(number, rmse[number], stream="s2")
    await until(lambda: len(bench.estimates) == 40)
    unbroken = [estimate.noise_scale for estimate in bench.estimates[20:]]
    assert [estimate.noise_scale for estimate in bench.estimates[:20]] == unbroken


async def test_it_does_not_adopt_what_another_instance_or_epoch_holds(bench: Bench) -> None:
    motion = await bench.start()
    await bench.store.create("s1", spec())
    await bench.store.put("s1", Owner.SCHEDULER, {"assignment": {"noise": 0.7, "epoch": 1, "motion": "motion-7"}})
    await bench.store.create("s2", spec())
    await bench.store.put("s2", Owner.SCHEDULER, {"assignment": {"noise": 0.7, "epoch": 2}})
    await bench.store.create("s3", spec())
    await bench.store.put("s3", Owner.SCHEDULER, {"assignment": {"noise": 0.7, "epoch": 1}})
    await bench.store.move("s3", StreamState.FAILED)
    for stream in ("s1", "s2", "s3"):
        await bench.chunk(0, stream=stream)
    await asyncio.sleep(0.05)
    assert bench.estimates == []
    assert motion.beat_fields()["streams"] == ()


async def test_without_the_store_it_goes_on_and_mirrors_later(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    await bench.store.create("s1", spec())
    put = bench.store.put
    away = True

    async def flaky(*args: object) -> None:
        if away:
            raise StoreUnavailableError("Redis failed in put: refused")
        await put(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(bench.store, "put", flaky)
    await bench.start()
    await bench.take()
    await asyncio.sleep(0.02)
    for number in range(3):
        await bench.chunk(number)
    await until(lambda: len(bench.estimates) == 3)
    assert await bench.mirror() is None
    away = False
    async with asyncio.timeout(5):
        while not isinstance(mirror := await bench.mirror(), dict) or mirror["chunk"] != 2:
            await asyncio.sleep(0.02)


async def test_draining_mirrors_the_last_chunk(bench: Bench) -> None:
    await bench.store.create("s1", spec())
    motion = await bench.start()
    await bench.take()
    await asyncio.sleep(0.02)
    for number in range(5):
        await bench.chunk(number)
    await motion.drain(2.0)
    mirror = await bench.mirror()
    assert isinstance(mirror, dict)
    assert mirror["chunk"] == 4
    assert len(bench.estimates) == 5


async def test_its_hop_is_a_span_of_the_chunks_trace(bench: Bench) -> None:
    with otlp_receiver() as (endpoint, receiver):
        telemetry = setup("motion", "motion-0", endpoint)
        await bench.store.create("s1", spec())
        await bench.start(telemetry=telemetry)
        await bench.take()
        await asyncio.sleep(0.02)
        await bench.chunk(0, trace=start_chunk_trace(telemetry.tracer))
        await until(lambda: len(bench.estimates) == 1)
        await asyncio.to_thread(telemetry.shutdown)
        (hop,) = receiver.named("estimate rheo.stream.{stream}.latents")
        parent = span_context_of(bench.estimates[0].stamp.trace)
        assert parent is not None
        assert int.from_bytes(hop.trace_id, "big") == parent.trace_id
        assert int.from_bytes(hop.parent_span_id, "big") == parent.span_id
        assert attributes(hop)["stream.id"] == "s1"
        assert attributes(hop)["rheocast.compute_ms"] == bench.estimates[0].timings[-1].compute_ms
        assert "rheocast.hop.compute" in receiver.metrics
