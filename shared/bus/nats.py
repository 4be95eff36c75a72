"""The bus over a NATS server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any, Self

from nats import errors as nats_errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription
from nats.js import errors as js_errors

from shared.bus import jetstream
from shared.bus.delivery import (
    ERROR_HEADER,
    NO_HEADERS,
    Decoder,
    Episode,
    Pump,
    Raw,
    channel_of_subject,
    checked,
    encode_for,
    run_handler,
)
from shared.bus.mailbox import Mailbox
from shared.bus.port import (
    BusStats,
    BusUnavailableError,
    Handler,
    MessageTooLargeError,
    NoResponderError,
    Overflow,
    Received,
    RequestFailedError,
    RequestTimeoutError,
    Server,
    Subscription,
)
from shared.contracts.catalog import Delivery, channel_of
from shared.contracts.codec import decode, encode
from shared.contracts.refs import Wire
from shared.credentials import NOBODY, Credentials, without_password
from shared.telemetry.propagation import attach, detach, inject

log = logging.getLogger(__name__)

CONNECT_S = 3.0
PENDING_BYTES = 16 * 1024 * 1024  # what may be published while the connection is down, before publishing fails
SERVE_MAILBOX = 256
HEADER_ROOM = 4096  # max_payload counts headers too


class NatsBus:
    """Connect with ``await NatsBus.connect(url)``. Reconnects for ever; core messages of an outage may be lost."""

    def __init__(self, nc: Client, url: str, *, on_disk: bool = False, domain: str = "") -> None:
        self.stats = BusStats()
        self._nc = nc
        self._url = url
        self._on_disk = on_disk
        self._js = nc.jetstream(timeout=2.0, domain=domain or None)
        self._subscriptions: set[_CoreSubscription | jetstream.PulledSubscription] = set()
        self._ensuring = asyncio.Lock()
        self._waking: set[asyncio.Task[None]] = set()
        self._outage = Episode()

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        name: str = "rheocast",
        on_disk: bool = False,
        domain: str = "",
        credentials: Credentials = NOBODY,
    ) -> Self:
        """A connected bus with its JetStream streams in place. Raises BusUnavailableError within 3 s.

        A user has inboxes that nobody else may listen to. ``tls://``: the server must prove who it is. ``domain``: JetStream's,
        where the server is a leaf node.
        """
        nc = Client()
        options: dict[str, Any] = {}
        if credentials.user:
            options |= {"user": credentials.user, "password": credentials.password}
            options["inbox_prefix"] = f"_INBOX_{credentials.user}"
        if url.startswith("tls://"):
            options["tls"] = credentials.tls()
        shown = without_password(url)
        holder: list[Self] = []
        refused: list[str] = []

        async def on_error(error: Exception) -> None:
            if "authorization" in str(error).lower():
                refused.append(str(error))
            if not holder or isinstance(error, (OSError, nats_errors.NoServersError)):
                log.debug("nats: %s", error)
            elif holder[0]._outage.fault():
                log.warning("nats: %s", str(error) or type(error).__name__)

        async def on_disconnected() -> None:
            if holder and not nc.is_closed:
                log.warning("the connection to NATS at %s is lost, reconnecting", shown)

        async def on_reconnected() -> None:
            if holder:
                holder[0]._reconnected()

        try:
            async with asyncio.timeout(CONNECT_S):
                await nc.connect(
                    url,
                    name=name,
                    error_cb=on_error,
                    disconnected_cb=on_disconnected,
                    reconnected_cb=on_reconnected,
                    connect_timeout=2,
                    reconnect_time_wait=0.2,  # type: ignore[arg-type]
                    max_reconnect_attempts=-1,
                    ping_interval=5,
                    max_outstanding_pings=2,
                    pending_size=PENDING_BYTES,
                    **options,
                )
                bus = cls(nc, shown, on_disk=on_disk, domain=domain)
                holder.append(bus)
                await bus._ensure_streams()
        except (OSError, TimeoutError, nats_errors.Error) as error:
            await _close_quietly(nc)
            reason = str(error).splitlines()[0] if str(error) else "no answer"
            if refused or "authorization" in reason.lower():
                reason = (refused or [reason])[0]
                raise BusUnavailableError(
                    f"NATS at {shown} does not let {credentials.user or 'a nobody'} in ({reason}): "
                    "set RHEOCAST_NATS_USER and RHEOCAST_NATS_PASSWORD_FILE"
                ) from error
            raise BusUnavailableError(
                f"no NATS server at {shown} ({reason}): start nats-server there, or set RHEOCAST_NATS_URL"
            ) from error
        except BusUnavailableError:
            await _close_quietly(nc)
            raise
        return bus

    @property
    def max_payload(self) -> int:
        """The server's limit in bytes, less room for headers."""
        return self._nc.max_payload - HEADER_ROOM

    @property
    def connected(self) -> bool:
        """Whether the server is reachable now."""
        return self._nc.is_connected

    async def _ensure_streams(self) -> None:
        async with self._ensuring:
            await jetstream.ensure_streams(self._js, self._url, on_disk=self._on_disk)

    def _reconnected(self) -> None:
        log.info("the connection to NATS at %s is back", self._url)
        self._outage.success()
        for subscription in self._subscriptions:
            if isinstance(subscription, jetstream.PulledSubscription):
                task = asyncio.get_running_loop().create_task(subscription.wake())
                self._waking.add(task)
                task.add_done_callback(self._waking.discard)

    async def publish(self, subject: str, message: Wire, headers: Mapping[str, str] | None = None) -> None:
        """Send ``message``. JetStream subjects wait for the receipt. Raises TypeError, MessageTooLargeError,
        BusUnavailableError."""
        channel = channel_of_subject(subject)
        data = encode_for(channel, subject, message, self.max_payload)
        self.stats.of(channel.subject).published += 1
        sent = inject(headers)
        if channel.delivery is Delivery.JETSTREAM:
            await jetstream.publish(self._js, subject, data, {**(sent or {}), "Nats-Msg-Id": uuid.uuid4().hex})
            return
        await self._send(subject, data, sent)

    async def _send(self, subject: str, data: bytes, headers: dict[str, str] | None) -> None:
        try:
            await self._nc.publish(subject, data, headers=headers)
        except nats_errors.MaxPayloadError as error:
            raise MessageTooLargeError(f"a message for {subject} is over the broker's max_payload") from error
        except nats_errors.Error as error:
            raise BusUnavailableError(
                f"cannot publish to NATS at {self._url}: {str(error) or type(error).__name__}"
            ) from error

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
    ) -> Subscription:
        """See ``Bus``. Raises LookupError for a pattern outside the catalog, BusUnavailableError."""
        channel = channel_of(pattern)
        counters = self.stats.of(pattern)
        decoder = Decoder(pattern, channel.messages, counters)

        async def handle(raw: Raw) -> bool:
            counters.received += 1
            received = decoder.decode(raw)
            return True if received is None else await run_handler(handler, received, counters)

        try:
            if channel.delivery is Delivery.JETSTREAM:
                kept = jetstream.PulledSubscription(
                    self._nc, self._js, pattern, handle, self._ensure_streams, durable=durable or group, replay=replay
                )
                await kept.start()
                self._subscriptions.add(kept)
                return _Handle(self, kept)
            core = _CoreSubscription(Pump(pattern, Mailbox(size, overflow), handle, counters))
            core.inner = await self._nc.subscribe(pattern, queue=group, cb=core.deliver)
        except (nats_errors.Error, js_errors.Error, TimeoutError) as error:
            raise BusUnavailableError(f"cannot subscribe to {pattern} at {self._url}: {error}") from error
        self._subscriptions.add(core)
        return _Handle(self, core)

    async def request(self, subject: str, message: Wire, timeout_s: float) -> Any:
        """Send a request and wait for its reply. Raises RequestTimeoutError, NoResponderError, RequestFailedError,
        BusUnavailableError, and BadMessageError for a reply that is none."""
        channel = channel_of_subject(subject)
        data = encode_for(channel, subject, message, self.max_payload)
        self.stats.of(channel.subject).published += 1
        try:
            reply = await self._nc.request(subject, data, timeout=timeout_s, headers=inject())
        except nats_errors.NoRespondersError as error:
            raise NoResponderError(f"nobody serves {subject}") from error
        except TimeoutError as error:
            raise RequestTimeoutError(f"no reply on {subject} within {timeout_s:g} s") from error
        except nats_errors.Error as error:
            raise BusUnavailableError(f"cannot ask {subject} at {self._url}: {error}") from error
        if reply.headers and ERROR_HEADER in reply.headers:
            raise RequestFailedError(reply.headers[ERROR_HEADER])
        return decode(channel.replies, reply.data)

    async def serve(self, pattern: str, handler: Server, group: str = "") -> Subscription:
        """Answer requests on ``pattern``, one at a time. A handler that raises fails the request with its text."""
        channel = channel_of(pattern)
        counters = self.stats.of(pattern)
        decoder = Decoder(pattern, channel.messages, counters)

        async def answer(raw: Raw) -> None:
            counters.received += 1
            received = decoder.decode(raw)
            if not raw.reply:
                return
            if received is None:
                await self._send(raw.reply, b"", {ERROR_HEADER: "the request's bytes are no message of this subject"})
                return
            data, headers = await self._answer(handler, received, raw, counters)
            await self._send(raw.reply, data, headers)

        core = _CoreSubscription(Pump(pattern, Mailbox(SERVE_MAILBOX), answer, counters))
        try:
            core.inner = await self._nc.subscribe(pattern, queue=group, cb=core.deliver)
        except nats_errors.Error as error:
            raise BusUnavailableError(f"cannot serve {pattern} at {self._url}: {error}") from error
        self._subscriptions.add(core)
        return _Handle(self, core)

    async def _answer(
        self, handler: Server, received: Received, raw: Raw, counters: Any
    ) -> tuple[bytes, dict[str, str] | None]:
        token = attach(received.headers) if received.headers else None
        try:
            reply = await handler(received)
            return checked(raw.subject, encode(reply), self.max_payload), None
        except Exception as error:
            counters.handler_errors += 1
            log.exception("serving %s raised", raw.subject)
            text = (str(error).splitlines() or [""])[0][:200]
            return b"", {ERROR_HEADER: f"{type(error).__name__}: {text}".encode("ascii", "replace").decode()}
        finally:
            detach(token)

    async def drain(self, deadline_s: float) -> None:
        """Take nothing new, finish what waits in the mailboxes, flush what was published; give up at the deadline."""
        subscriptions = list(self._subscriptions)
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.gather(*(each.drained() for each in subscriptions))
                if self._nc.is_connected:
                    await self._nc.flush()
        except (TimeoutError, nats_errors.Error):
            log.warning("the bus was not drained within %g s", deadline_s)

    async def close(self) -> None:
        """Unsubscribe everything and close the connection. Idempotent."""
        for task in list(self._waking):
            task.cancel()
        for subscription in list(self._subscriptions):
            with contextlib.suppress(nats_errors.Error, TimeoutError):
                await subscription.unsubscribe()
        self._subscriptions.clear()
        if not self._nc.is_closed:
            if self._nc.is_connected:
                with contextlib.suppress(nats_errors.Error, TimeoutError):
                    await self._nc.flush(1)
            await _close_quietly(self._nc)

    async def forget(self, subscription: _CoreSubscription | jetstream.PulledSubscription) -> None:
        """Used by the handle that ``subscribe`` returns."""
        self._subscriptions.discard(subscription)
        await subscription.unsubscribe()


class _CoreSubscription:
    """A core subscription: NATS' callback only fills the mailbox."""

    def __init__(self, pump: Pump[Raw]) -> None:
        self.inner: NatsSubscription | None = None
        self._pump = pump

    async def deliver(self, message: Msg) -> None:
        self._pump.put(
            Raw(message.subject, message.data, message.headers or NO_HEADERS, message.reply, False, time.time_ns())
        )

    async def _leave(self) -> None:
        inner, self.inner = self.inner, None
        if inner is not None:
            with contextlib.suppress(nats_errors.Error):
                await inner.unsubscribe()

    async def drained(self) -> None:
        await self._leave()
        await self._pump.drained()

    async def unsubscribe(self) -> None:
        await self._leave()
        await self._pump.stop()


class _Handle:
    """What a subscriber holds."""

    def __init__(self, bus: NatsBus, inner: _CoreSubscription | jetstream.PulledSubscription) -> None:
        self._bus = bus
        self._inner = inner

    async def drain(self) -> None:
        await self._inner.drained()

    async def unsubscribe(self) -> None:
        await self._bus.forget(self._inner)


async def _close_quietly(nc: Client) -> None:
    with contextlib.suppress(Exception):
        await nc.close()
