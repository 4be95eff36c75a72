"""The bus as services see it. ``NatsBus`` and ``MemoryBus`` pass one conformance suite."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from shared.contracts.catalog import channel_of
from shared.contracts.refs import Wire


class BusError(RuntimeError):
    """Base of what a bus may raise. Every message is one line."""


class BusUnavailableError(BusError):
    """The broker cannot be reached or does not answer."""


class MessageTooLargeError(BusError):
    """The encoded message is larger than the broker takes. Tensors travel by reference, or in parts."""


class RequestTimeoutError(BusError, TimeoutError):
    """Nobody answered a request in time."""


class NoResponderError(BusError):
    """Nobody serves the subject of a request."""


class RequestFailedError(BusError):
    """The handler that served a request raised; the text is its error."""


class Overflow(StrEnum):
    """What a full mailbox does with one message more."""

    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"


@dataclass(frozen=True, slots=True)
class Received:
    """A decoded message. ``received_ns`` is the UNIX time at which it reached this process, before any waiting.

    ``redelivered``: JetStream only, the broker has delivered this message before.
    """

    subject: str
    message: Any
    received_ns: int
    headers: Mapping[str, str]
    redelivered: bool = False


Handler = Callable[[Received], Awaitable[None]]
Server = Callable[[Received], Awaitable[Wire]]


@dataclass(slots=True)
class Counters:
    """What happened on one subject pattern. ``dropped`` counts mailbox overflows, ``bad`` undecodable bytes."""

    published: int = 0
    received: int = 0
    dropped: int = 0
    bad: int = 0
    handler_errors: int = 0


@dataclass(slots=True)
class BusStats:
    """Counters by subject pattern, the catalog's: a stream's id is in none of them, so that they are bounded."""

    by_pattern: dict[str, Counters] = field(default_factory=dict)

    def of(self, pattern: str) -> Counters:
        """The counters of the channel that a subject or pattern belongs to, made on first use. Raises LookupError."""
        counters = self.by_pattern.get(pattern)
        if counters is None:
            counters = self.by_pattern.setdefault(channel_of(pattern).subject, Counters())
        return counters

    def total(self, name: str) -> int:
        """One counter summed over all patterns."""
        return sum(getattr(counters, name) for counters in self.by_pattern.values())

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Plain numbers, for the health page."""
        return {
            pattern: {name: getattr(counters, name) for name in Counters.__slots__}
            for pattern, counters in sorted(self.by_pattern.items())
        }


class Subscription(Protocol):
    """One subscription. Both methods are idempotent and may be called from inside the handler."""

    async def drain(self) -> None:
        """Take nothing new; return when what waits in the mailbox has been handled."""
        ...

    async def unsubscribe(self) -> None:
        """End it. What still waits in the mailbox is discarded."""
        ...


class Bus(Protocol):
    """Publish, subscribe, request, serve. The catalog says which delivery a subject has.

    * Handlers of one subscription run one message at a time, in order, with the sender's trace context attached. One
      that raises is logged and counted. JetStream messages are acknowledged after the handler returned and come again
      (up to three times in all) when it raised, so their handlers must tolerate a repetition.
    * Core subscriptions have a bounded mailbox of ``size`` messages; what overflows is dropped by ``overflow`` and
      counted. JetStream subscriptions are pulled: the broker keeps what is not handled yet.
    * ``group`` shares a pattern's messages among its members. ``durable`` names a JetStream position that outlives the
      process. ``replay`` starts at the first kept JetStream message, else only new ones are seen.
    """

    @property
    def stats(self) -> BusStats:
        """What happened so far."""
        ...

    @property
    def max_payload(self) -> int:
        """The largest encoded message in bytes."""
        ...

    async def publish(self, subject: str, message: Wire, headers: Mapping[str, str] | None = None) -> None: ...

    async def subscribe(
        self,
        pattern: str,
        handler: Handler,
        *,
        size: int = 256,
        overflow: Overflow = Overflow.DROP_NEWEST,
        group: str = "",
        durable: str = "",
        replay: bool = False,
    ) -> Subscription: ...

    async def request(self, subject: str, message: Wire, timeout_s: float) -> Any: ...

    async def serve(self, pattern: str, handler: Server, group: str = "") -> Subscription: ...

    async def drain(self, deadline_s: float) -> None: ...

    async def close(self) -> None: ...
