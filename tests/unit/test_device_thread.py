"""The device thread on a device that runs behind: results come when the device is done, lanes do not wait for each other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from services.worker.core import Rank
from services.worker.device_thread import MAX_AHEAD, DeviceThread, Outcome
from services.worker.timeline import DIT, VAE, HostTimeline, Timeline, lane_of, timeline_for


@dataclass
class FakeMark:
    """Ends when told to."""

    ended: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def wait(self) -> float:
        assert self.ended.wait(5.0)
        if self.error is not None:
            raise self.error
        return 7.0


class FakeDevice:
    """Two lanes whose work ends when the test says so."""

    lanes = (DIT, VAE)

    def __init__(self) -> None:
        self.marks: dict[str, list[FakeMark]] = {DIT: [], VAE: []}

    def mark(self, lane: str, run: Callable[[], Any]) -> tuple[Any, FakeMark]:
        value, mark = run(), FakeMark()
        self.marks[lane].append(mark)
        return value, mark

    def is_lost(self, error: Exception) -> bool:
        return "illegal" in str(error)


async def until(what: Callable[[], bool]) -> None:
    for _ in range(500):
        if what():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def thread_on(timeline: Timeline | None) -> DeviceThread:
    thread = DeviceThread(asyncio.get_running_loop(), lambda: timeline)
    thread.start()
    return thread


async def test_on_a_cpu_a_job_is_done_when_it_returns() -> None:
    thread = thread_on(HostTimeline())
    assert await thread.call(Rank.STAGE, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        await thread.call(Rank.STAGE, lambda: 1 // 0)
    assert await thread.call(Rank.ENCODE, lambda: 4) == 4
    thread.stop()


async def test_a_result_is_handed_on_only_when_the_device_is_there() -> None:
    device = FakeDevice()
    thread, outcomes = thread_on(device), list[Outcome]()
    thread.submit(Rank.STAGE, lambda: "x0", outcomes.append)
    await until(lambda: len(device.marks[DIT]) == 1)
    await asyncio.sleep(0.05)
    assert outcomes == []
    device.marks[DIT][0].ended.set()
    await until(lambda: bool(outcomes))
    assert outcomes[0].value == "x0"
    assert outcomes[0].compute_ms == 7.0
    assert thread.take_busy_s() == pytest.approx(0.007)
    thread.stop()


async def test_a_decode_does_not_wait_for_a_batch_and_each_lane_keeps_its_order() -> None:
    device = FakeDevice()
    thread, order = thread_on(device), list[str]()
    for name in ("batch 1", "batch 2"):
        thread.submit(Rank.STAGE, lambda: None, lambda _, name=name: order.append(name))
    thread.submit(Rank.DECODE, lambda: None, lambda _: order.append("picture"))
    await until(lambda: len(device.marks[DIT]) == 2 and len(device.marks[VAE]) == 1)
    device.marks[VAE][0].ended.set()
    await until(lambda: order == ["picture"])
    device.marks[DIT][1].ended.set()
    device.marks[DIT][0].ended.set()
    await until(lambda: order == ["picture", "batch 1", "batch 2"])
    thread.stop()


async def test_the_host_runs_ahead_of_the_device_by_so_many_jobs_and_no_more() -> None:
    device = FakeDevice()
    thread = thread_on(device)
    for _ in range(3 * MAX_AHEAD):
        thread.submit(Rank.STAGE, lambda: None, lambda _: None)
    # One is being waited for, MAX_AHEAD queue behind it, and one more has been enqueued and cannot be put down.
    await until(lambda: len(device.marks[DIT]) == MAX_AHEAD + 2)
    await asyncio.sleep(0.05)
    assert len(device.marks[DIT]) == MAX_AHEAD + 2
    for _ in range(200):
        for mark in list(device.marks[DIT]):
            mark.ended.set()
        if len(device.marks[DIT]) == 3 * MAX_AHEAD:
            break
        time.sleep(0.01)
    assert len(device.marks[DIT]) == 3 * MAX_AHEAD
    thread.stop()


async def test_a_kernel_that_fails_fails_its_job_and_not_the_thread() -> None:
    device = FakeDevice()
    thread, outcomes = thread_on(device), list[Outcome]()
    thread.submit(Rank.STAGE, lambda: None, outcomes.append)
    thread.submit(Rank.STAGE, lambda: "next", outcomes.append)
    await until(lambda: len(device.marks[DIT]) == 2)
    device.marks[DIT][0].error = RuntimeError("an illegal memory access")
    for mark in device.marks[DIT]:
        mark.ended.set()
    await until(lambda: len(outcomes) == 2)
    assert "illegal memory access" in str(outcomes[0].error)
    assert outcomes[1].value == "next"
    thread.stop()


async def test_an_error_of_the_device_itself_is_told() -> None:
    device, lost = FakeDevice(), list[Exception]()
    thread = DeviceThread(asyncio.get_running_loop(), lambda: device, lost=lost.append)
    thread.start()
    job = asyncio.ensure_future(thread.call(Rank.STAGE, lambda: None))
    await until(lambda: bool(device.marks[DIT]))
    device.marks[DIT][0].error = RuntimeError("the GPU has fallen off the bus")
    device.marks[DIT][0].ended.set()
    with pytest.raises(RuntimeError, match="fallen off"):
        await job
    await until(lambda: bool(lost))
    with pytest.raises(ZeroDivisionError):
        await asyncio.gather(thread.call(Rank.CONTROL, lambda: 1 // 0))
    assert len(lost) == 1, "an error of a job's own code is no such thing"

    def fail() -> None:
        raise RuntimeError("illegal memory access, of a kernel that this job had made")

    with pytest.raises(RuntimeError, match="illegal"):
        await thread.call(Rank.STAGE, fail)
    await until(lambda: len(lost) == 2)
    for mark in device.marks[DIT]:
        mark.ended.set()
    thread.stop()


def test_the_autoencoder_has_a_lane_of_its_own() -> None:
    import torch

    assert [lane_of(rank) for rank in (Rank.STAGE, Rank.CONTROL, Rank.ENCODE, Rank.DECODE)] == [DIT, DIT, VAE, VAE]
    assert isinstance(timeline_for(torch.device("cpu")), HostTimeline)


@pytest.mark.gpu
async def test_on_a_gpu_the_results_are_there_when_they_are_handed_on() -> None:
    import torch

    from services.worker.timeline import CudaTimeline

    device = torch.device("cuda")
    thread = DeviceThread(asyncio.get_running_loop(), lambda: CudaTimeline(device))
    thread.start()

    def heavy() -> torch.Tensor:
        x = torch.randn(4096, 4096, device=device)
        for _ in range(50):
            x = torch.nn.functional.normalize(x @ x)
        out = torch.empty(x.shape, pin_memory=True)
        return out.copy_(x, non_blocking=True)

    made = await asyncio.gather(*(thread.call(rank, heavy) for rank in (Rank.STAGE, Rank.DECODE, Rank.STAGE)))
    for each in made:
        assert bool(each.isfinite().all())
        assert torch.allclose(each.norm(dim=1), torch.ones(4096), atol=1e-3)
    thread.stop()
