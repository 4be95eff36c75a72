"""JetStream over NATS: the three kept streams, publishing with a receipt, and pulled subscriptions that heal."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from nats import errors as nats_errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api
from nats.js import errors as js_errors

from shared.bus.delivery import MAX_DELIVERIES, NO_HEADERS, REDELIVER_S, Episode, Raw, cancel
from shared.bus.port import BusUnavailableError
from shared.contracts.catalog import channel_of

log = logging.getLogger(__name__)

PUBLISH_TIMEOUT_S = 2.0
PUBLISH_TRIES = 4
PULL_S = 5.0
ACK_WAIT_S = 30.0
EPHEMERAL_KEPT_S = 60.0
MAX_UNACKED = 1024


@dataclass(frozen=True, slots=True)
class KeptStream:
    """A JetStream stream of ours: what it keeps and for how long."""

    name: str
    subject: str
    max_msgs: int
    max_age_s: float


KEPT: tuple[KeptStream, ...] = (
    KeptStream("RHEO_CONTROL", "rheo.stream.*.control", 10_000, 3600.0),
    KeptStream("RHEO_EVENT", "rheo.stream.*.event", 20_000, 3600.0),
    KeptStream("RHEO_ASSIGN", "rheo.*.assign", 10_000, 600.0),
)


def kept_stream_of(pattern: str) -> KeptStream:
    """The kept stream a subject or pattern belongs to. Raises LookupError."""
    subject = channel_of(pattern).subject
    for kept in KEPT:
        if kept.subject == subject:
            return kept
    raise LookupError(f"{pattern!r} is not kept by JetStream")


async def ensure_streams(js: JetStreamContext, url: str, *, on_disk: bool = False) -> None:
    """Create what is missing; leave alone what exists. Raises BusUnavailableError when JetStream is off."""
    storage = api.StorageType.FILE if on_disk else api.StorageType.MEMORY
    for kept in KEPT:
        config = api.StreamConfig(
            name=kept.name,
            subjects=[kept.subject],
            max_msgs=kept.max_msgs,
            max_age=kept.max_age_s,
            discard=api.DiscardPolicy.OLD,
            storage=storage,
        )
        try:
            await js.add_stream(config)
        except js_errors.BadRequestError as error:
            # Another release or an operator made it with other limits: theirs hold.
            log.info("JetStream stream %s is kept as it is: %s", kept.name, error.description)
        except (
            js_errors.ServiceUnavailableError,
            js_errors.NoStreamResponseError,
            nats_errors.NoRespondersError,
        ) as error:
            raise BusUnavailableError(
                f"the NATS server at {url} has no JetStream: start it with 'nats-server -js', or unset RHEOCAST_NATS_URL"
            ) from error


async def publish(js: JetStreamContext, subject: str, data: bytes, headers: dict[str, str]) -> None:
    """Publish with a receipt. ``headers`` hold a Nats-Msg-Id, so a repeated try is stored once.

    Raises BusUnavailableError when no receipt came in four tries.
    """
    fault: Exception | None = None
    for attempt in range(PUBLISH_TRIES):
        try:
            await js.publish(subject, data, timeout=PUBLISH_TIMEOUT_S, headers=headers)
        except (TimeoutError, nats_errors.Error) as error:
            fault = error
            await asyncio.sleep(0.1 * 2**attempt)
        else:
            return
    raise BusUnavailableError(
        f"no receipt for a message on {subject}: {type(fault).__name__} {fault}".rstrip()
    ) from fault


class PulledSubscription:
    """One pull consumer and the task that empties it: fetch one, handle it, acknowledge it.

    The consumer is made anew when the broker has lost it (a restart with memory storage), after the last message seen,
    or at the beginning of a stream that was itself made anew.
    """

    def __init__(
        self,
        nc: Client,
        js: JetStreamContext,
        pattern: str,
        handle: Callable[[Raw], Awaitable[bool]],
        ensure: Callable[[], Awaitable[None]],
        *,
        durable: str = "",
        replay: bool = False,
    ) -> None:
        self._nc = nc
        self._js = js
        self._pattern = pattern
        self._kept = kept_stream_of(pattern)
        self._handle = handle
        self._ensure = ensure
        self._durable = durable
        self._replay = replay
        self._consumer = ""
        self._pull: JetStreamContext.PullSubscription | None = None
        self._stream_made = ""
        self._last_seq = 0
        self._busy = False
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Create the consumer and begin to pull. Raises what the broker answers."""
        await self._bind()
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"pull {self._pattern}")

    async def _bind(self) -> None:
        info = await self._js.stream_info(self._kept.name)
        made = str(info.created)
        config = api.ConsumerConfig(
            ack_policy=api.AckPolicy.EXPLICIT,
            ack_wait=ACK_WAIT_S,
            max_deliver=MAX_DELIVERIES,
            max_ack_pending=MAX_UNACKED,
            filter_subject=self._pattern,
        )
        # Named, for then the request's subject says what is to be read, and the server can forbid it.
        config.name = self._durable or uuid.uuid4().hex
        if self._durable:
            config.durable_name = self._durable
        else:
            config.inactive_threshold = EPHEMERAL_KEPT_S
        if self._stream_made and made != self._stream_made:
            config.deliver_policy = api.DeliverPolicy.ALL
        elif self._stream_made:
            config.deliver_policy = api.DeliverPolicy.BY_START_SEQUENCE
            config.opt_start_seq = self._last_seq + 1
        else:
            config.deliver_policy = api.DeliverPolicy.ALL if self._replay else api.DeliverPolicy.NEW
            self._last_seq = info.state.last_seq
        try:
            consumer = await self._js.add_consumer(self._kept.name, config)
        except js_errors.BadRequestError:
            # The durable exists from an earlier process, maybe begun elsewhere: its position is what counts.
            consumer = await self._js.consumer_info(self._kept.name, self._durable)
        self._stream_made = made
        self._consumer = consumer.name
        old, self._pull = self._pull, await self._js.pull_subscribe_bind(consumer.name, self._kept.name)
        if old is not None:
            await self._forget(old)

    async def _forget(self, pull: JetStreamContext.PullSubscription) -> None:
        try:
            await pull.unsubscribe()
        except (nats_errors.Error, ValueError):
            log.debug("an old inbox of %s was gone already", self._pattern)

    async def _run(self) -> None:
        trouble = Episode()
        while not self._closed:
            began = time.monotonic()
            try:
                assert self._pull is not None
                messages = await self._pull.fetch(1, timeout=PULL_S)
                trouble.success()
                for message in messages:
                    await self._one(message)
            except js_errors.APIError as error:
                await self._recover(trouble, error)
            except TimeoutError as error:
                # No message in time is the usual end of a pull; an early end may mean that the consumer is gone.
                if time.monotonic() - began < 0.5 * PULL_S:
                    await self._check(trouble, error)
            except (nats_errors.Error, BusUnavailableError) as error:
                await self._recover(trouble, error)
            except Exception:
                log.exception("%s: pulling failed", self._pattern)
                await asyncio.sleep(0.5)

    async def _one(self, message: Msg) -> None:
        meta = message.metadata
        self._last_seq = max(self._last_seq, meta.sequence.stream)
        raw = Raw(
            message.subject, message.data, message.headers or NO_HEADERS, "", meta.num_delivered > 1, time.time_ns()
        )
        self._busy = True
        try:
            handled = await self._handle(raw)
        finally:
            self._busy = False
        if handled:
            await message.ack()
        else:
            await message.nak(REDELIVER_S)

    async def _check(self, trouble: Episode, error: Exception) -> None:
        await asyncio.sleep(0.2)
        try:
            await self._js.consumer_info(self._kept.name, self._consumer)
        except (nats_errors.Error, TimeoutError):
            await self._recover(trouble, error)

    async def _recover(self, trouble: Episode, error: Exception) -> None:
        if trouble.fault():
            log.warning(
                "%s: %s; the JetStream consumer is being restored", self._pattern, str(error) or type(error).__name__
            )
        await asyncio.sleep(0.25)
        if self._closed or not self._nc.is_connected:
            return
        try:
            await self._ensure()
            await self._bind()
        except (nats_errors.Error, TimeoutError, BusUnavailableError) as again:
            log.debug("%s: not yet: %s", self._pattern, again)

    async def wake(self) -> None:
        """Look at once whether the consumer is still there: called after a reconnection."""
        if self._closed or self._task is None or self._busy:
            return
        await cancel(self._task)
        self._task = asyncio.get_running_loop().create_task(self._resume(), name=f"pull {self._pattern}")

    async def _resume(self) -> None:
        try:
            await self._js.consumer_info(self._kept.name, self._consumer)
        except (nats_errors.Error, TimeoutError) as error:
            await self._recover(Episode(), error)
        await self._run()

    async def drained(self) -> None:
        """Pull no more; wait for the handler that is running."""
        self._closed = True
        while self._busy and self._task is not asyncio.current_task():
            await asyncio.sleep(0.005)

    async def unsubscribe(self) -> None:
        """Stop pulling. A durable position stays with the broker; any other is deleted."""
        self._closed = True
        if self._task is not None:
            await cancel(self._task)
        if self._pull is not None and self._nc.is_connected:
            await self._forget(self._pull)
            try:
                if self._durable:
                    # A message handed to a closed inbox would reach a successor after ACK_WAIT_S only. This request is sent
                    # behind the UNSUB (a flush's PING overtakes it): once it is answered, nothing comes here any more.
                    await self._js.consumer_info(self._kept.name, self._consumer)
                elif self._consumer:
                    await self._js.delete_consumer(self._kept.name, self._consumer)
            except (nats_errors.Error, TimeoutError):
                log.debug("the broker did not confirm that %s is no longer read", self._pattern)
        self._pull = None
