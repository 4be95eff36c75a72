"""The API over HTTP, typed."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from shared.client.errors import ApiError, ClientError, NotFoundError, UnreachableError, error_of
from shared.contracts.commands import StreamPatch, StreamSpec
from shared.contracts.events import EventKind, StreamEvent
from shared.contracts.sinks import Sink
from shared.contracts.tiers import CapacityTold
from shared.contracts.views import (
    FileView,
    Problem,
    Receipt,
    ReceiptView,
    RecordingView,
    StatsView,
    StreamView,
    TraceList,
)

Answer = TypeVar("Answer", bound=BaseModel)

DEFAULT_URL = "http://127.0.0.1:7860"
DONE = ("stopped", "failed")
ENDS = (EventKind.STOPPED, EventKind.FAILED)
ASK_AGAIN_S = 0.1
COME_BACK_S = 0.5  # to a stream of events that was cut
COMPLAINT_CHARS = 200


@dataclass(frozen=True, slots=True)
class Told:
    """An event and the id after which to go on."""

    id: str
    event: StreamEvent


class Api:
    """``async with Api(url, token) as api``. Calls raise ``ApiError`` for what the API refuses, ``UnreachableError`` where
    nobody answers. One object serves many tasks at a time. ``tls`` knows an authority that the machine does not."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        token: str | None = None,
        timeout_s: float = 40.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._url, self._timeout_s = url, timeout_s
        self._heard = False  # somebody has answered at this address
        self._http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=timeout_s, trust_env=False, verify=tls or True
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the connections. Idempotent."""
        await self._http.aclose()

    # --- streams -----------------------------------------------------------------------------------------------------

    async def start(self, spec: StreamSpec, stream: str | None = None, *, key: str | None = None) -> StreamView:
        """Start a stream; ``stream`` is the id it shall have. Paths in ``spec`` are relative to the media folder.

        With the same ``key`` (Idempotency-Key) a repetition within an hour starts nothing anew.
        """
        body = spec.model_dump(mode="json", exclude_defaults=True) | {"source": spec.source.model_dump(mode="json")}
        body["sinks"] = [sink.model_dump(mode="json") for sink in spec.sinks]
        if stream is not None:
            body["id"] = stream
        headers = {} if key is None else {"Idempotency-Key": key}
        return await self._ask(StreamView, "POST", "/v1/streams", json=body, headers=headers)

    async def stream(self, stream: str) -> StreamView:
        """One stream, with its ledger."""
        return await self._ask(StreamView, "GET", _at(stream))

    async def streams(self, *states: str) -> AsyncIterator[StreamView]:
        """All streams by id, or those in these states; fetched a page at a time."""
        after = ""
        while True:
            params = [("state", state) for state in states] + ([("after", after)] if after else [])
            page = (await self._send("GET", "/v1/streams", params=params)).json()
            for view in page["streams"]:
                yield StreamView.model_validate(view)
            if not page.get("next"):
                return
            after = page["next"]

    async def patch(self, stream: str, **changes: Any) -> Receipt:
        """Change a running stream: the fields of StreamPatch, e.g. ``prompt="neon", blend_chunks=8``."""
        body = StreamPatch(**changes).model_dump(mode="json", exclude_unset=True)
        return await self._ask(Receipt, "PATCH", _at(stream), json=body)

    async def pause(self, stream: str) -> Receipt:
        """Take no further chunk; the picture stands."""
        return await self._ask(Receipt, "POST", f"{_at(stream)}/pause")

    async def resume(self, stream: str) -> Receipt:
        """Go on."""
        return await self._ask(Receipt, "POST", f"{_at(stream)}/resume")

    async def stop(self, stream: str, *, drain: bool = True) -> Receipt:
        """End a stream; ``drain`` finishes what is under way first."""
        return await self._ask(Receipt, "DELETE", _at(stream), params={"drain": drain})

    async def receipt(self, stream: str, command: str) -> ReceiptView:
        """What became of a command."""
        return await self._ask(ReceiptView, "GET", f"{_at(stream)}/receipts/{quote(command, safe='')}")

    async def applied(self, receipt: Receipt | RecordingView, timeout_s: float = 30.0) -> ReceiptView:
        """Wait until a command is in force; an API that is away meanwhile is asked again. Raises ClientError when it was
        refused, could not be done, or took too long."""
        until = time.monotonic() + timeout_s
        while True:
            wait_s, why = ASK_AGAIN_S, ""
            try:
                view = await self.receipt(receipt.stream, receipt.command)
            except NotFoundError:
                pass  # another gateway that has not heard of it yet
            except (ApiError, UnreachableError) as error:
                wait_s, why = self._away_s(error), f" ({error})"
            else:
                if view.state == EventKind.APPLIED:
                    return view
                if view.state in (EventKind.REFUSED, EventKind.WARNING):
                    raise ClientError(f"command {receipt.command} of stream {receipt.stream}: {view.reason}")
            if (left_s := until - time.monotonic()) < 0:
                raise UnreachableError(
                    f"command {receipt.command} was accepted but not applied within {timeout_s:g} s{why}"
                )
            await asyncio.sleep(min(wait_s, left_s))

    async def ended(self, stream: str, timeout_s: float = 60.0) -> StreamView:
        """Wait for a stream's end; an API that is away meanwhile is asked again. The view has its ledger and its figures."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                view = await self.stream(stream)
            except (ApiError, UnreachableError) as error:
                wait_s, why = self._away_s(error), f"not known to have ended after {timeout_s:g} s ({error})"
            else:
                if view.state in DONE and view.stats is not None:
                    return view
                wait_s, why = ASK_AGAIN_S, f"still {view.state} after {timeout_s:g} s"
            if (left_s := until - time.monotonic()) < 0:
                raise UnreachableError(f"stream {stream} is {why}")
            await asyncio.sleep(min(wait_s, left_s))

    async def stats(self, stream: str) -> StatsView:
        """How a stream runs now."""
        return await self._ask(StatsView, "GET", f"{_at(stream)}/stats")

    async def trace(self, stream: str) -> TraceList:
        """Where the time of its last chunks went. They are heard from the first question on: ask again."""
        return await self._ask(TraceList, "GET", f"/v1/streams/{stream}/trace")

    async def capacity(self, **asked: Any) -> CapacityTold:
        """How many more streams fit: ``model``, ``width``, ``height``, ``fps``, ``steps``, …"""
        return await self._ask(CapacityTold, "GET", "/v1/capacity", params=asked)

    async def events(self, stream: str, after: str | None = "0") -> AsyncIterator[Told]:
        """What happens to a stream, to its last event; a connection that is cut goes on where it was.

        ``after`` "0": from the first event that is kept; None: only what happens from now on. Raises UnreachableError when
        nobody answers at first, and ApiError for a refusal; later 429 and 5xx are waited out like a cut.
        """
        heard = False
        while True:
            wait_s = COME_BACK_S
            headers = {} if after is None else {"Last-Event-ID": after}
            try:
                async with self._streamed("GET", f"{_at(stream)}/events", headers=headers) as answer:
                    heard = True
                    if answer.status_code == 204:
                        return
                    async for told in events_of(answer.aiter_lines()):
                        after = told.id
                        yield told
                        if told.event.event in ENDS:
                            return
            except httpx.HTTPError as error:
                if not heard:
                    raise self._unreachable(error) from error
            except ApiError as error:
                if not heard:
                    raise
                wait_s = _mended_s(error)
            after = after or f"{time.time_ns()}-"
            await asyncio.sleep(wait_s)

    # --- sinks and files ---------------------------------------------------------------------------------------------

    async def add_sink(self, stream: str, sink: Sink) -> Receipt:
        """One more sink while it runs."""
        return await self._ask(Receipt, "POST", f"{_at(stream)}/sinks", json=sink.model_dump(mode="json"))

    async def remove_sink(self, stream: str, sink: str) -> Receipt:
        """Finish and close a sink, by its id."""
        return await self._ask(Receipt, "DELETE", f"{_at(stream)}/sinks/{quote(sink, safe='')}")

    async def record(self, stream: str) -> RecordingView:
        """Begin a recording on the server."""
        return await self._ask(RecordingView, "POST", f"{_at(stream)}/record")

    async def stop_recording(self, stream: str) -> RecordingView:
        """End it; the file is whole once the command is ``applied``."""
        return await self._ask(RecordingView, "DELETE", f"{_at(stream)}/record")

    async def download(self, name: str, to: Path) -> int:
        """Fetch a recording; how many bytes it has."""
        try:
            async with self._streamed("GET", f"/v1/recordings/{quote(name, safe='')}") as answer:
                with to.open("wb") as file:
                    async for part in answer.aiter_bytes(1 << 20):
                        file.write(part)
                    return file.tell()
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    async def upload(self, path: Path) -> FileView:
        """Send a video or a picture; a file source names the answer's ``path``."""
        content = await asyncio.to_thread(path.read_bytes)
        return await self._ask(FileView, "POST", "/v1/uploads", params={"name": path.name}, content=content)

    async def snapshot(self, stream: str) -> bytes:
        """The next picture of the result: a JPEG file."""
        return (await self._send("GET", f"{_at(stream)}/snapshot.jpg")).content

    # --- how it is asked ---------------------------------------------------------------------------------------------

    async def _ask(self, kind: type[Answer], method: str, path: str, **request: Any) -> Answer:
        answer = await self._send(method, path, **request)
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            raise ClientError(
                f"{method} {path}: this is no answer of Rheocast's: {error.errors()[0]['msg']}"
            ) from error

    async def _send(self, method: str, path: str, **request: Any) -> httpx.Response:
        try:
            answer = await self._http.request(method, path, **request)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        self._heard = True
        if answer.is_error:
            raise error_of(_problem_of(answer))
        return answer

    @asynccontextmanager
    async def _streamed(
        self, method: str, path: str, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        async with self._http.stream(method, path, headers=headers) as answer:
            if answer.is_error:
                await answer.aread()
                raise error_of(_problem_of(answer))
            yield answer

    def _away_s(self, error: ApiError | UnreachableError) -> float:
        """How long to wait for an API that is away. Raises the error when waiting does not help: nobody ever answered, or
        it is a refusal."""
        if isinstance(error, ApiError):
            return _mended_s(error)
        if not self._heard:
            raise error
        return COME_BACK_S

    def _unreachable(self, error: httpx.HTTPError) -> UnreachableError:
        if isinstance(error, httpx.TimeoutException):
            return UnreachableError(f"{self._url} did not answer within {self._timeout_s:g} s")
        reason = str(error) or type(error).__name__
        return UnreachableError(f"nobody answers at {self._url} ({reason}): start `rheocast up`, or give its address")


def _at(stream: str) -> str:
    """A stream's place; an id that is none stays one part of the path, for the API to refuse."""
    return f"/v1/streams/{quote(stream, safe='')}"


def _mended_s(error: ApiError) -> float:
    """After how long the same may be asked again. Raises the error when it is about what was asked."""
    if error.status != 429 and error.status < 500:
        raise error
    return error.problem.retry_after_s or COME_BACK_S


def _problem_of(answer: httpx.Response) -> Problem:
    """The problem in an answer, or one made of what a proxy in between said."""
    try:
        return Problem.model_validate_json(answer.content)
    except ValidationError:
        said = answer.text.strip()[:COMPLAINT_CHARS] or answer.reason_phrase
        return Problem(title=f"HTTP {answer.status_code}", status=answer.status_code, detail=said)


async def events_of(lines: AsyncIterator[str]) -> AsyncIterator[Told]:
    """Server-sent events → those that are StreamEvents; ``stats`` and pings are left out."""
    fields: dict[str, str] = {}
    async for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        else:
            if fields.get("event") != "stats" and fields.get("id") and "data" in fields:
                yield Told(fields["id"], StreamEvent.model_validate_json(fields["data"]))
            fields = {}
