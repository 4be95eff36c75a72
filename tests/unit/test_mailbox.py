"""The mailbox: bounded, with a policy, a counter, and one reader."""

from __future__ import annotations

import asyncio

import pytest

from shared.bus.mailbox import Mailbox, MailboxClosedError
from shared.bus.port import Overflow


async def test_it_gives_what_was_put_in_order() -> None:
    box = Mailbox[int](3)
    assert [box.put(number) for number in range(3)] == [True, True, True]
    assert [await box.get() for _ in range(3)] == [0, 1, 2]


async def test_a_reader_waits_for_the_first_item() -> None:
    box = Mailbox[str](1)
    reader = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    assert not reader.done()
    box.put("here")
    assert await reader == "here"


async def test_drop_newest_keeps_what_it_has() -> None:
    box = Mailbox[int](2, Overflow.DROP_NEWEST)
    assert [box.put(number) for number in range(4)] == [True, True, False, False]
    assert (box.dropped, box.episodes) == (2, 1)
    assert [await box.get(), await box.get()] == [0, 1]


async def test_drop_oldest_keeps_the_freshest() -> None:
    box = Mailbox[int](2, Overflow.DROP_OLDEST)
    for number in range(5):
        box.put(number)
    assert box.dropped == 3
    assert [await box.get(), await box.get()] == [3, 4]


async def test_an_episode_of_overflowing_ends_when_it_has_run_empty() -> None:
    box = Mailbox[int](1)
    for number in range(4):
        box.put(number)
    assert box.episodes == 1
    await box.get()
    waiting = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    box.put(1)
    await waiting
    box.put(2)
    box.put(3)
    assert (box.episodes, box.dropped) == (2, 4)


async def test_closing_lets_the_reader_finish_and_then_ends_it() -> None:
    box = Mailbox[int](2)
    box.put(1)
    box.close()
    assert not box.put(2)
    assert await box.get() == 1
    with pytest.raises(MailboxClosedError):
        await box.get()


async def test_closing_wakes_a_waiting_reader() -> None:
    box = Mailbox[int](1)
    reader = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    box.close()
    with pytest.raises(MailboxClosedError):
        await reader


async def test_a_cancelled_reader_loses_nothing() -> None:
    box = Mailbox[int](1)
    reader = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    box.put(7)
    assert await box.get() == 7


async def test_two_readers_are_one_too_many() -> None:
    box = Mailbox[int](1)
    reader = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="one reader"):
        await box.get()
    reader.cancel()


def test_a_mailbox_holds_something() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        Mailbox[int](0)
