"""Real servers for tests: started once for a session, in a temporary folder, on free loopback ports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.embedded import EmbeddedServers


@contextmanager
def embedded(folder: Path, *, nats: bool = True, redis: bool = True) -> Iterator[EmbeddedServers]:
    """Running servers, stopped at the end whatever happens."""
    servers = EmbeddedServers(folder, nats=nats, redis=redis)
    servers.start()
    try:
        yield servers
    finally:
        servers.stop()
