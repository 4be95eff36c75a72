"""A bus that loses, repeats and delays core messages on delivery: what core NATS may do, on purpose, for tests.

JetStream and requests pass untouched, as their faults are the broker's and the requester's to repair.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from shared.bus.delivery import Pump, run_handler
from shared.bus.mailbox import Mailbox
from shared.bus.port import Bus, BusStats, Handler, Overflow, Received, Server, Subscription
from shared.contracts.catalog import Delivery, channel_of
from shared.contracts.refs import Wire


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances per delivered message. A delayed one comes up to ``delay_max_s`` later, so others overtake it."""

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    delay_max_s: float = 0.15
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "drop=0.01,duplicate=0.01,delay=0.01,seed=1". Raises ValueError naming what is wrong."""
        given: dict[str, Any] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, _, value = part.partition("=")
            if name not in cls.__dataclass_fields__:
                known = ", ".join(cls.__dataclass_fields__)
                raise ValueError(f"bus faults: {part!r} is not one of {known}")
            try:
                given[name] = int(value) if name == "seed" else float(value)
            except ValueError:
                raise ValueError(f"bus faults: {part!r} has no number") from None
            if name in ("drop", "duplicate", "delay") and not 0 <= given[name] <= 1:
                raise ValueError(f"bus faults: {part!r} is no chance between 0 and 1")
        return cls(**given)


@dataclass(slots=True)
class FaultCounters:
    """What was done so far."""

    dropped: int = 0
    duplicated: int = 0
    delayed: int = 0


@dataclass(eq=False)
class LossyBus:
    """Wraps any bus. Its own mailbox stands between the fault and the handler, so order within it still holds."""

    bus: Bus
    faults: Faults
    rng: random.Random = field(default_factory=random.Random)
    injected: FaultCounters = field(default_factory=FaultCounters)

    def __post_init__(self) -> None:
        self._pumps: set[Pump[Received]] = set()

    @classmethod
    def of(cls, bus: Bus, text: str) -> LossyBus:
        """A lossy bus from its setting, seeded."""
        faults = Faults.parse(text)
        return cls(bus, faults, random.Random(faults.seed))

    @property
    def stats(self) -> BusStats:
        """The wrapped bus' counters: faults on purpose are in ``injected``, not there."""
        return self.bus.stats

    @property
    def max_payload(self) -> int:
        return self.bus.max_payload

    @property
    def connected(self) -> bool:
        return getattr(self.bus, "connected", True)

    async def publish(self, subject: str, message: Wire, headers: Mapping[str, str] | None = None) -> None:
        await self.bus.publish(subject, message, headers)

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
        if channel_of(pattern).delivery is not Delivery.CORE:
            return await self.bus.subscribe(pattern, handler, group=group, durable=durable, replay=replay)
        counters = self.stats.of(pattern)

        async def handle(received: Received) -> None:
            await run_handler(handler, received, counters)

        pump = Pump(f"lossy {pattern}", Mailbox[Received](size, overflow), handle, counters)
        self._pumps.add(pump)

        async def harm(received: Received) -> None:
            self._harm(received, pump)

        inner = await self.bus.subscribe(pattern, harm, size=size, overflow=overflow, group=group)
        return _LossySubscription(self, inner, pump)

    def _harm(self, received: Received, pump: Pump[Received]) -> None:
        chance, faults = self.rng.random, self.faults
        if chance() < faults.drop:
            self.injected.dropped += 1
            return
        copies = 1
        if chance() < faults.duplicate:
            self.injected.duplicated += 1
            copies = 2
        for _ in range(copies):
            if chance() < faults.delay:
                self.injected.delayed += 1
                after = self.rng.uniform(0.1, 1.0) * faults.delay_max_s
                asyncio.get_running_loop().call_later(after, pump.put, received)
            else:
                pump.put(received)

    async def request(self, subject: str, message: Wire, timeout_s: float) -> Any:
        return await self.bus.request(subject, message, timeout_s)

    async def serve(self, pattern: str, handler: Server, group: str = "") -> Subscription:
        return await self.bus.serve(pattern, handler, group)

    async def drain(self, deadline_s: float) -> None:
        await self.bus.drain(deadline_s)
        for pump in list(self._pumps):
            await pump.drained()

    async def close(self) -> None:
        await self.bus.close()
        for pump in list(self._pumps):
            await pump.stop()
        self._pumps.clear()

    async def forget(self, inner: Subscription, pump: Pump[Received]) -> None:
        """Used by the handle that ``subscribe`` returns."""
        await inner.unsubscribe()
        self._pumps.discard(pump)
        await pump.stop()


@dataclass(frozen=True, slots=True)
class _LossySubscription:
    bus: LossyBus
    inner: Subscription
    pump: Pump[Received]

    async def drain(self) -> None:
        await self.inner.drain()
        await self.pump.drained()

    async def unsubscribe(self) -> None:
        await self.bus.forget(self.inner, self.pump)
