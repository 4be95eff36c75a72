"""A gateway that is away for a moment: who has heard of it waits, who never has is told at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from shared.client import Api, ApiError, NotFoundError, NotNowError, UnreachableError
from shared.contracts.events import EventKind, LedgerTotals, StreamEvent, StreamStats
from shared.contracts.views import Problem, Receipt, StreamView

LIVE = StreamEvent(stream="s", event=EventKind.LIVE, service="egress", at_ns=7)
STOPPED = StreamEvent(stream="s", event=EventKind.STOPPED, service="egress", at_ns=8)
RECEIPT = Receipt(stream="s", command="c", version=1)
Step = httpx.Response | Exception


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made, which take no time here."""
    made: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        made.append(seconds)
        await sleep(min(seconds, 0.01))

    monkeypatch.setattr("shared.client.api.asyncio.sleep", noted)
    return made


class Cut(httpx.AsyncByteStream):
    """An event, and then the connection is gone."""

    def __init__(self, event: StreamEvent) -> None:
        self._event = event

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield sse(self._event)
        raise httpx.ReadError("cut")


def sse(event: StreamEvent) -> bytes:
    return f"event: {event.event}\nid: {event.at_ns}-egress\ndata: {event.model_dump_json()}\n\n".encode()


def problem(status: int, retry_after_s: float | None = None) -> httpx.Response:
    body = Problem(title="No", status=status, detail="away", retry_after_s=retry_after_s)
    return httpx.Response(status, content=body.model_dump_json())


def receipt(state: str) -> httpx.Response:
    return httpx.Response(200, json={"stream": "s", "command": "c", "state": state})


class Scripted:
    """An API whose answers are these; the last one is repeated."""

    def __init__(self, *steps: Step | Callable[[], Step]) -> None:
        self._steps = list(steps)
        self.asked: list[httpx.Request] = []
        self.api = Api("http://there")
        self.api._http = httpx.AsyncClient(base_url="http://there", transport=httpx.MockTransport(self._answer))

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
        step = step() if callable(step) else step
        if isinstance(step, Exception):
            raise step
        return step


async def test_events_go_on_where_they_were_after_refusals_of_a_gateway_that_starts(slept: list[float]) -> None:
    there = Scripted(
        httpx.Response(200, stream=Cut(LIVE)),
        httpx.Response(502, text="<html>Bad Gateway</html>"),
        problem(503, 3.0),
        httpx.ConnectError("refused"),
        problem(429, 2.0),
        httpx.Response(200, content=sse(STOPPED)),
    )
    told = [each.event.event async for each in there.api.events("s")]
    assert told == [EventKind.LIVE, EventKind.STOPPED]
    assert [request.headers["Last-Event-ID"] for request in there.asked] == ["0", *["7-egress"] * 5]
    assert slept == [0.5, 0.5, 3.0, 0.5, 2.0]


@pytest.mark.parametrize(("status", "kind"), [(503, NotNowError), (502, ApiError), (404, NotFoundError)])
async def test_events_that_were_never_heard_are_refused_at_once(status: int, kind: type[ApiError]) -> None:
    there = Scripted(problem(status))
    with pytest.raises(kind):
        await anext(there.api.events("s"))
    assert len(there.asked) == 1


async def test_events_of_a_stream_that_is_no_more_end_with_its_error() -> None:
    there = Scripted(httpx.Response(200, stream=Cut(LIVE)), problem(404))
    events = there.api.events("s")
    assert (await anext(events)).event == LIVE
    with pytest.raises(NotFoundError):
        await anext(events)


async def test_a_command_is_waited_for_while_the_gateway_is_away(slept: list[float]) -> None:
    there = Scripted(
        problem(503, 2.0),
        httpx.ConnectError("refused"),
        problem(404),
        problem(502),
        receipt("accepted"),
        receipt("applied"),
    )
    assert (await there.api.applied(RECEIPT)).state == EventKind.APPLIED
    assert slept == [2.0, 0.5, 0.1, 0.5, 0.1]


async def test_an_end_is_waited_for_while_the_gateway_is_away() -> None:
    def view(state: str) -> httpx.Response:
        told = StreamView(
            id="s",
            state=state,
            prompt="ink",
            prompt_version=1,
            model="rheo-tiny",
            mode="live",
            width=64,
            height=64,
            steps=2,
            seed=1,
            ledger=LedgerTotals(),
            stats=StreamStats() if state == "stopped" else None,
        )
        return httpx.Response(200, content=told.model_dump_json())

    there = Scripted(view("live"), httpx.ConnectError("refused"), problem(503), problem(500), view("stopped"))
    assert (await there.api.ended("s")).state == "stopped"
    assert len(there.asked) == 5


async def test_what_is_waited_for_has_an_end_and_says_what_was_in_the_way() -> None:
    there = Scripted(lambda: problem(503, 60.0))
    with pytest.raises(UnreachableError, match=r"not applied within 0\.05 s \(No: away\)"):
        await there.api.applied(RECEIPT, 0.05)
    with pytest.raises(UnreachableError, match=r"not known to have ended after 0\.05 s \(No: away\)"):
        await there.api.ended("s", 0.05)


async def test_a_wrong_address_or_token_is_told_at_once() -> None:
    nobody, stranger = Scripted(httpx.ConnectError("refused")), Scripted(problem(401))
    for there in (nobody, stranger):
        with pytest.raises((UnreachableError, ApiError)):
            await there.api.applied(RECEIPT)
        with pytest.raises((UnreachableError, ApiError)):
            await there.api.ended("s")
        assert len(there.asked) == 2
