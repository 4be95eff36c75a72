"""The client's own decisions: what a slow reader loses, which error a problem is, how events are read."""

from __future__ import annotations

import asyncio
import runpy
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.client import (
    ApiError,
    Broker,
    ConflictError,
    Feed,
    InvalidError,
    NoAccessError,
    NotFoundError,
    NotNowError,
    UnreachableError,
)
from shared.client.api import events_of
from shared.client.errors import error_of
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.sinks import Looking
from shared.contracts.tiers import Refusal, Tier
from shared.contracts.views import Problem


async def test_a_slow_reader_loses_the_oldest_and_knows_it() -> None:
    feed = Feed[Looking](3)
    for number in range(5):
        feed.put(Looking(stream=f"s{number}"))
    assert (feed.came, feed.dropped) == (5, 2)
    feed.close()
    assert [each.stream async for each in feed] == ["s2", "s3", "s4"]


async def test_a_reader_waits_and_ends_when_it_is_closed() -> None:
    feed = Feed[Looking](3)
    reading = asyncio.create_task(anext(feed))
    await asyncio.sleep(0)
    feed.put(Looking(stream="a"))
    assert (await reading).stream == "a"
    ending = asyncio.create_task(anext(feed))
    await asyncio.sleep(0)
    feed.close()
    with pytest.raises(StopAsyncIteration):
        await ending


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, NoAccessError), (404, NotFoundError), (409, ConflictError), (422, InvalidError), (500, ApiError)],
)
def test_a_problem_is_an_error_of_its_kind(status: int, kind: type[ApiError]) -> None:
    error = error_of(Problem(title="Title", status=status, detail="what would do"))
    assert type(error) is kind
    assert str(error) == "Title: what would do"


def test_a_refusal_says_when_and_what_would_do() -> None:
    tier = Tier(steps=1, fps=8, width=96, height=64)
    problem = Problem(
        title="Not now", status=503, detail="full", refusal=Refusal.CAPACITY, retry_after_s=3.0, tier=tier
    )
    error = error_of(problem)
    assert isinstance(error, NotNowError)
    assert (error.retry_after_s, error.refusal, error.tier) == (3.0, Refusal.CAPACITY, tier)


async def test_events_are_read_and_figures_left_out() -> None:
    event = StreamEvent(stream="s", event=EventKind.LIVE, service="egress", at_ns=7)

    async def lines() -> AsyncIterator[str]:
        for line in (
            ": ping",
            "",
            "event: stats",
            "data: {}",
            "",
            "event: live",
            "id: 7-egress",
            f"data: {event.model_dump_json()}",
            "",
            "id: 8-cut",
        ):
            yield line

    assert [(told.id, told.event) async for told in events_of(lines())] == [("7-egress", event)]


@pytest.mark.parametrize("url", ["nats://127.0.0.1:here", "nats://me:hun/ter2@127.0.0.1:1"])
async def test_an_address_that_is_none_is_unreachable_and_keeps_its_password(url: str) -> None:
    with pytest.raises(UnreachableError, match=r"^no NATS server at \S*127\.0\.0\.1:") as told:
        async with Broker.connect(url):
            pass
    assert "hun" not in str(told.value)


@pytest.mark.parametrize(
    ("example", "arguments"),
    [("recorder", ["mine"]), ("publisher", []), ("subscriber", ["mine"]), ("moderation", ["--forbid", "x"])],
)
def test_an_example_that_reaches_nobody_says_so_in_one_line(
    example: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = Path(__file__).parents[2] / "examples" / f"{example}.py"
    nats = [] if example == "recorder" else ["--nats", "nats://127.0.0.1:1:1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path), *arguments, "--api", "http://127.0.0.1:1", *nats])
    with pytest.raises(SystemExit) as told:
        runpy.run_path(str(path), run_name="__main__")
    line = str(told.value.code)
    assert "127.0.0.1:1" in line
    assert "\n" not in line
