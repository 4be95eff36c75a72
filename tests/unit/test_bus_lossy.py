"""The lossy bus does what its setting says, with the chances it says, and nothing to kept messages."""

from __future__ import annotations

import asyncio

import pytest

from shared.bus.lossy import Faults, LossyBus
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.events import Beat, EventKind, StreamEvent


def beat(number: int) -> Beat:
    return Beat(service="test", instance="w", incarnation=str(number))


async def heard(text: str, messages: int, settle_s: float = 0.0) -> tuple[list[int], LossyBus]:
    """What a subscriber gets of numbered beats through a lossy bus, in order of arrival."""
    broker = MemoryBroker()
    sender, lossy = MemoryBus(broker), LossyBus.of(MemoryBus(broker), text)
    got: list[int] = []

    async def keep(received: Received) -> None:
        got.append(int(received.message.incarnation))

    await lossy.subscribe(subjects.beat("w"), keep, size=10 * messages)
    for number in range(messages):
        await sender.publish(subjects.beat("w"), beat(number))
        if number % 100 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(settle_s)
    await lossy.drain(5.0)
    await lossy.close()
    return got, lossy


async def test_without_faults_it_changes_nothing() -> None:
    got, lossy = await heard("", 150)
    assert got == list(range(150))
    assert lossy.injected.dropped == lossy.injected.duplicated == lossy.injected.delayed == 0


async def test_it_drops_about_as_many_as_it_says_and_the_same_ones_for_the_same_seed() -> None:
    got, lossy = await heard("drop=0.3,seed=7", 200)
    again, _ = await heard("drop=0.3,seed=7", 200)
    other, _ = await heard("drop=0.3,seed=8", 200)
    assert len(got) == 200 - lossy.injected.dropped
    assert 35 < lossy.injected.dropped < 85
    assert got == sorted(got)
    assert got == again != other


async def test_a_duplicate_comes_twice() -> None:
    got, lossy = await heard("duplicate=1", 20)
    assert got == [number for number in range(20) for _ in range(2)]
    assert lossy.injected.duplicated == 20


async def test_a_delayed_one_comes_later_than_those_behind_it() -> None:
    got, lossy = await heard("delay=0.3,seed=3", 100, settle_s=0.25)
    assert sorted(got) == list(range(100))
    assert got != sorted(got)
    assert lossy.injected.delayed > 10


async def test_kept_messages_are_spared() -> None:
    broker = MemoryBroker()
    lossy = LossyBus.of(MemoryBus(broker), "drop=1")
    got: list[str] = []

    async def keep(received: Received) -> None:
        got.append(received.message.reason)

    await lossy.subscribe(subjects.stream("s", "event"), keep)
    for reason in "abc":
        event = StreamEvent(stream="s", event=EventKind.WARNING, service="t", at_ns=0, reason=reason)
        await lossy.publish(subjects.stream("s", "event"), event)
    await asyncio.sleep(0.05)
    assert got == ["a", "b", "c"]
    await lossy.close()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("drop=2", "no chance"), ("lose=0.1", "is not one of"), ("drop=x", "has no number"), ("drop", "has no number")],
)
def test_a_setting_that_makes_no_sense_says_why(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Faults.parse(text)
