"""What every bus does with a raw message: decode, attach the trace, call the handler, count what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shared.bus.mailbox import Mailbox, MailboxClosedError
from shared.bus.port import Counters, Handler, MessageTooLargeError, Received
from shared.contracts.catalog import Channel, channel_of
from shared.contracts.codec import BadMessageError, decode, encode
from shared.contracts.refs import Wire
from shared.logs import ABOUT
from shared.telemetry.propagation import attach, detach

log = logging.getLogger(__name__)

T = TypeVar("T")
NO_HEADERS: Mapping[str, str] = {}
EPISODE_S = 10.0
MAX_DELIVERIES = 3  # JetStream: a message whose handler raised comes again, so often in all
REDELIVER_S = 0.5
ERROR_HEADER = "Rheocast-Error"

# Stream ids come and go, so the cache is bounded.
channel_of_subject = functools.lru_cache(maxsize=4096)(channel_of)


@dataclass(slots=True)
class Raw:
    """A message as it came from the wire."""

    subject: str
    data: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: NO_HEADERS)
    reply: str = ""
    redelivered: bool = False
    received_ns: int = 0


class Episode:
    """Decides which of many faults is logged: the first one, then none until a success or 10 s have passed."""

    def __init__(self) -> None:
        self._since: float | None = None

    def fault(self) -> bool:
        """Whether this fault begins an episode, and so is logged."""
        now = time.monotonic()
        if self._since is not None and now - self._since < EPISODE_S:
            return False
        self._since = now
        return True

    def success(self) -> None:
        """End the episode."""
        self._since = None


def encode_for(channel: Channel, subject: str, message: Wire, max_payload: int) -> bytes:
    """The bytes of ``message``. Raises TypeError when the subject does not carry it, MessageTooLargeError."""
    if not isinstance(message, channel.messages):
        raise TypeError(f"{type(message).__name__} may not be sent on {channel.subject}")
    return checked(subject, encode(message), max_payload)


def checked(subject: str, data: bytes, max_payload: int) -> bytes:
    """``data``, if the broker takes it. Raises MessageTooLargeError."""
    if len(data) > max_payload:
        raise MessageTooLargeError(
            f"a message of {len(data)} bytes for {subject} is over the broker's max_payload of {max_payload}: "
            "send a tensor reference, or raise max_payload"
        )
    return data


class Decoder:
    """Turns raw messages of one subscription into received ones, counting and logging bad bytes once per episode."""

    def __init__(self, pattern: str, messages: tuple[type[Wire], ...], counters: Counters) -> None:
        self._pattern = pattern
        self._messages = messages
        self._counters = counters
        self._bad = Episode()

    def decode(self, raw: Raw) -> Received | None:
        """The message, or None when the bytes are not one."""
        try:
            message = decode(self._messages, raw.data)
        except BadMessageError as error:
            self._counters.bad += 1
            if self._bad.fault():
                log.warning("bad message on %s (%d bytes): %s", raw.subject, len(raw.data), error)
            return None
        self._bad.success()
        return Received(raw.subject, message, raw.received_ns, raw.headers, raw.redelivered)


async def run_handler(handler: Handler, received: Received, counters: Counters) -> bool:
    """Run a handler with the sender's trace context, its logs about the message; False when it raised (logged, counted)."""
    token = attach(received.headers) if received.headers else None
    about = ABOUT.set(received.message)
    try:
        await handler(received)
    except Exception:
        counters.handler_errors += 1
        log.exception("the handler of %s raised", received.subject)
        return False
    else:
        return True
    finally:
        ABOUT.reset(about)
        detach(token)


class Pump(Generic[T]):
    """A mailbox and the one task that empties it, one item at a time, in order."""

    def __init__(
        self, name: str, mailbox: Mailbox[T], handle: Callable[[T], Awaitable[object]], counters: Counters
    ) -> None:
        self._name = name
        self._mailbox = mailbox
        self._handle = handle
        self._counters = counters
        self._idle = asyncio.Event()
        self._idle.set()
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"pump {name}")

    def put(self, item: T) -> None:
        """Offer an item; an overflow is counted, and logged once per episode."""
        mailbox = self._mailbox
        episodes = mailbox.episodes
        self._idle.clear()
        if not mailbox.put(item) and not mailbox.closed:
            self._counters.dropped += 1
            if mailbox.episodes != episodes:
                log.warning("%s: mailbox of %d is full, %s", self._name, mailbox.size, mailbox.overflow)

    async def _run(self) -> None:
        while True:
            if not len(self._mailbox):
                self._idle.set()
            try:
                item = await self._mailbox.get()
            except MailboxClosedError:
                self._idle.set()
                return
            try:
                await self._handle(item)
            except Exception:
                log.exception("%s: delivery failed", self._name)

    async def drained(self) -> None:
        """Wait until everything put so far has been handled. From inside the handler it returns at once."""
        if self._task is not asyncio.current_task():
            await self._idle.wait()

    async def stop(self) -> None:
        """Discard what waits and end the task. May be called from inside the handler."""
        self._mailbox.close(discard=True)
        self._idle.set()
        await cancel(self._task)


async def cancel(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for it, unless it is the one that asks (which then ends on its own)."""
    if task is asyncio.current_task():
        return
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task
