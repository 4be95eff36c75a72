"""The moderation hook lets nothing by: it asks again where nobody answers, and stops what it cannot change."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared.client import Api, ClientError, NoAccessError, NotFoundError, NotNowError, UnreachableError
from shared.client.errors import error_of
from shared.contracts.commands import Mode
from shared.contracts.events import LedgerTotals
from shared.contracts.views import Problem, Receipt, ReceiptView, StreamView

EXAMPLE = Path(__file__).parents[2] / "examples" / "moderation.py"


def stream(prompt: str) -> StreamView:
    return StreamView(
        id="s",
        state="live",
        prompt=prompt,
        prompt_version=1,
        model="rheo-tiny",
        mode=Mode.LIVE,
        width=320,
        height=192,
        steps=2,
        seed=0,
        ledger=LedgerTotals(),
    )


def problem(status: int) -> Problem:
    return Problem(title="Later", status=status, detail="too many requests", retry_after_s=0.01)


OVERWHELMED = NotNowError(problem(429))


class Answering(Api):
    """An API that fails as it is told, call by call, and keeps what was asked of it."""

    def __init__(self, prompt: str, *failures: ClientError, refuses: bool = False) -> None:
        super().__init__()
        self._view, self._failures, self._refuses = stream(prompt), list(failures), refuses
        self.asked: list[str] = []

    async def stream(self, stream: str) -> StreamView:
        self.asked.append("stream")
        if self._failures:
            raise self._failures.pop(0)
        return self._view

    async def streams(self, *states: str) -> AsyncIterator[StreamView]:
        self.asked.append("streams")
        if self._failures and self._failures[0] is OVERWHELMED:
            raise self._failures.pop(0)
        yield self._view

    async def patch(self, stream: str, **changes: Any) -> Receipt:
        self.asked.append(f"patch {changes['prompt']}")
        return Receipt(stream=stream, command="c", version=1)

    async def applied(self, receipt: Any, timeout_s: float = 30.0) -> ReceiptView:
        if self._refuses:
            raise ClientError("refused: not now")
        return ReceiptView(stream=receipt.stream, command=receipt.command, version=1, state="applied")

    async def stop(self, stream: str, *, drain: bool = True) -> Receipt:
        self.asked.append("stop")
        return Receipt(stream=stream, command="d", version=1)


async def watched(api: Answering, instead: str = "") -> list[str]:
    """What a moderator asks of the API about one stream."""
    example = runpy.run_path(str(EXAMPLE))
    async with api:
        await example["Moderator"](api, [re.compile("violent")], instead).watch("s")
    return api.asked


async def test_a_harmless_stream_is_left_alone() -> None:
    assert await watched(Answering("neon")) == ["stream"]


async def test_an_api_that_has_no_time_is_asked_again_when_it_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked = await watched(Answering("violent", NotNowError(problem(429)), NotNowError(problem(503))))
    assert asked == ["stream", "stream", "stream", "stop"]
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("waiting_s") for line in told] == [0.01, 0.01, None]
    assert told[-1]["did"] == "stop"


async def test_a_gateway_that_is_being_replaced_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    failures = [error_of(problem(status)) for status in (500, 502, 504)]
    assert await watched(Answering("violent", *failures)) == ["stream"] * 4 + ["stop"]
    assert len(slept) == 3
    with pytest.raises(NoAccessError):
        await watched(Answering("violent", error_of(problem(401))))


async def test_a_sweep_judges_what_runs() -> None:
    async with Answering("violent", NotNowError(problem(429))) as api:
        await runpy.run_path(str(EXAMPLE))["Moderator"](api, [re.compile("violent")], "").sweep()
    assert api.asked == ["streams", "stream", "stream", "stop"]


async def test_a_sweep_that_gets_no_list_asks_for_it_again() -> None:
    async with Answering("violent", OVERWHELMED) as api:
        await runpy.run_path(str(EXAMPLE))["Moderator"](api, [re.compile("violent")], "").sweep()
    assert api.asked == ["streams", "streams", "stream", "stop"]


async def test_an_outage_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def at_once(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("asyncio.sleep", at_once)
    assert await watched(Answering("violent", UnreachableError("nobody at this address"))) == [
        "stream",
        "stream",
        "stop",
    ]
    assert waits == [1.0]


async def test_a_stream_that_has_ended_needs_nothing() -> None:
    assert await watched(Answering("violent", NotFoundError(problem(404)))) == ["stream"]


async def test_another_prompt_that_is_refused_ends_the_stream(capsys: pytest.CaptureFixture[str]) -> None:
    assert await watched(Answering("violent"), "no style") == ["stream", "patch no style"]
    assert await watched(Answering("violent", refuses=True), "no style") == ["stream", "patch no style", "stop"]
    did = [json.loads(line)["did"] for line in capsys.readouterr().out.splitlines()]
    assert did == ["prompt", "stop"]
