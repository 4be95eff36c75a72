"""Frames in and out and events, over NATS: what a platform does beside the API."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Generic, Literal, Self, TypeVar, cast

from nats import errors as nats_errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import errors as js_errors

from shared.client.errors import ClientError, UnreachableError
from shared.contracts import subjects
from shared.contracts.codec import BadMessageError, decode_subject, encode
from shared.contracts.commands import StartStream, StopStream, UpdateStream
from shared.contracts.events import StreamEvent
from shared.contracts.refs import Wire
from shared.contracts.sinks import AddSink, FramePublished, RemoveSink
from shared.contracts.sources import MAX_PUSHED_BYTES, PushedFrame

Message = TypeVar("Message", bound=Wire)
Command = StartStream | UpdateStream | StopStream | AddSink | RemoveSink

DEFAULT_URL = "nats://127.0.0.1:4222"
CONNECT_S = 3.0
RECEIPT_S = 5.0
FRAMES_KEPT = 8  # a viewer that is slower than the stream wants the newest
EVENTS_KEPT = 1024


class Feed(Generic[Message]):
    """What comes on a subject, ``async for``. Bounded: a reader that is too slow loses the oldest, counted in ``dropped``.

    ``came`` counts all that came, ``bad`` those that could not be read and were left out.
    """

    def __init__(self, size: int) -> None:
        self.came = 0
        self.dropped = 0
        self.bad = 0
        self._size = size
        self._items: deque[Message] = deque()
        self._some = asyncio.Event()
        self._closed = False

    def put(self, message: Message) -> None:
        """Add one; never waits."""
        if len(self._items) >= self._size:
            self._items.popleft()
            self.dropped += 1
        self._items.append(message)
        self.came += 1
        self._some.set()

    def close(self) -> None:
        """Nothing more comes: the reader gets what is left, then its loop ends."""
        self._closed = True
        self._some.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            self._some.clear()
            await self._some.wait()
        return self._items.popleft()


class Broker:
    """``async with Broker.connect(url) as broker``. The connection is made again for ever; frames of an outage are lost.

    ``dropped`` counts those that :meth:`push` had no connection for. ``reconnects`` counts how often the connection was made
    again: what was told before that reached no feed and is in no feed's ``dropped``.
    """

    def __init__(self, nc: Client) -> None:
        self.dropped = 0
        self.reconnects = 0
        self._nc = nc

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        url: str = DEFAULT_URL,
        *,
        name: str = "rheocast-client",
        timeout_s: float = CONNECT_S,
        tls: ssl.SSLContext | None = None,
    ) -> AsyncIterator[Self]:
        """A connection while the block lasts; a user and password stand in the URL. ``tls`` knows an
        authority that the machine does not.

        Raises UnreachableError within ``timeout_s``.
        """
        nc = Client()

        async def quiet(error: Exception) -> None:
            """The client comes back by itself."""

        async def returned() -> None:
            """Feeds are fed again from here on."""
            broker.reconnects += 1

        broker = cls(nc)
        try:
            async with asyncio.timeout(timeout_s):
                await nc.connect(
                    url,
                    name=name,
                    tls=tls,
                    error_cb=quiet,
                    reconnected_cb=returned,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=1,
                )
        except (OSError, TimeoutError, ValueError, nats_errors.Error) as error:
            with suppress(AssertionError):  # of an address that is none nothing has been opened
                await nc.close()
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            where = url.rpartition("@")[2]
            raise UnreachableError(
                f"no NATS server at {where} ({reason}): is that the address Rheocast uses?"
            ) from error
        try:
            yield broker
        finally:
            await nc.close()

    async def push(
        self,
        stream: str,
        data: bytes,
        *,
        format: Literal["jpeg", "rgb24"] = "jpeg",
        width: int = 0,
        height: int = 0,
        captured_ns: int | None = None,
    ) -> None:
        """One picture into a stream with a ``push`` source; ``captured_ns`` is its wall-clock time, None: now.

        ``jpeg``: a JPEG file; ``rgb24``: ``height`` × ``width`` × 3 bytes. Without a connection it is dropped and counted: it
        would come too late. Raises ClientError above 900,000 bytes, UnreachableError when the connection is closed for good.
        """
        if len(data) > MAX_PUSHED_BYTES:
            raise ClientError(
                f"a picture of {len(data)} bytes: at most {MAX_PUSHED_BYTES} fit, send a JPEG or a smaller one"
            )
        if not self._nc.is_connected and not self._nc.is_closed:  # it is being made again
            self.dropped += 1
            return
        captured = time.time_ns() if captured_ns is None else captured_ns
        frame = PushedFrame(stream=stream, format=format, width=width, height=height, captured_ns=captured, data=data)
        await self._publish(subjects.stream(stream, "push"), frame)

    async def end(self, stream: str) -> None:
        """The pushed source is over: what is under way is finished, then the stream stops. Sent later where there is no
        connection."""
        await self._publish(subjects.stream(stream, "push"), PushedFrame(stream=stream, last=True))

    async def send(self, command: Command) -> None:
        """A command over the broker instead of the API, kept once this returns; its answer is an event.

        Raises UnreachableError when the broker gives no receipt.
        """
        subject = subjects.stream(command.stream, "control")
        headers = {"Nats-Msg-Id": command.command}  # a repetition is stored once
        try:
            await self._nc.jetstream(timeout=RECEIPT_S).publish(subject, encode(command), headers=headers)
        except (nats_errors.Error, js_errors.Error, TimeoutError) as error:
            raise UnreachableError(
                f"the broker keeps no command on {subject}: {error or type(error).__name__}"
            ) from error

    @asynccontextmanager
    async def frames(self, stream: str, size: int = FRAMES_KEPT) -> AsyncIterator[Feed[FramePublished]]:
        """The restyled frames of a stream with a ``nats`` sink, from now on."""
        async with self._feed(subjects.stream(stream, "out"), size) as feed:
            yield cast(Feed[FramePublished], feed)

    @asynccontextmanager
    async def events(self, stream: str = subjects.ANY, size: int = EVENTS_KEPT) -> AsyncIterator[Feed[StreamEvent]]:
        """What happens to a stream, or to all of them, from now on."""
        async with self._feed(subjects.stream(stream, "event"), size) as feed:
            yield cast(Feed[StreamEvent], feed)

    @asynccontextmanager
    async def _feed(self, subject: str, size: int) -> AsyncIterator[Feed[Wire]]:
        feed = Feed[Wire](size)

        async def on_message(message: Msg) -> None:
            try:
                feed.put(decode_subject(message.subject, message.data))
            except BadMessageError:
                feed.bad += 1

        try:
            subscription = await self._nc.subscribe(subject, cb=on_message)
            await self._nc.flush()  # from here on nothing is missed
        except (nats_errors.Error, TimeoutError) as error:
            raise UnreachableError(f"cannot subscribe to {subject}: {error or type(error).__name__}") from error
        try:
            yield feed
        finally:
            feed.close()
            if not self._nc.is_closed:
                await subscription.unsubscribe()

    async def _publish(self, subject: str, message: Wire) -> None:
        try:
            await self._nc.publish(subject, encode(message))
        except nats_errors.Error as error:
            raise UnreachableError(f"cannot publish on {subject}: {error or type(error).__name__}") from error
