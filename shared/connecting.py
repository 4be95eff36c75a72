"""A process' connections to NATS and Redis, from its settings."""

from __future__ import annotations

from contextlib import AsyncExitStack

from shared.bus.nats import NatsBus
from shared.config import ServiceSettings
from shared.session.redis import RedisStore


async def connect(settings: ServiceSettings, stack: AsyncExitStack) -> tuple[NatsBus, RedisStore]:
    """Both, closed by ``stack``. Raises BusUnavailableError, StoreUnavailableError, and ValueError for a secret that cannot
    be read."""
    bus = await connect_bus(settings)
    stack.push_async_callback(bus.close)
    store = await connect_store(settings)
    stack.push_async_callback(store.close)
    return bus, store


async def connect_bus(settings: ServiceSettings) -> NatsBus:
    """See ``NatsBus.connect``."""
    return await NatsBus.connect(
        settings.nats_url,
        name=settings.instance or "rheocast",
        on_disk=settings.nats_on_disk,
        domain=settings.nats_domain,
        credentials=settings.nats_credentials,
    )


async def connect_store(settings: ServiceSettings) -> RedisStore:
    """See ``RedisStore.connect``."""
    return await RedisStore.connect(settings.redis_url, credentials=settings.redis_credentials)
