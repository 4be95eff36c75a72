"""A small client for programs that use Rheocast: its API over HTTP (``Api``), frames and events over NATS (``Broker``).

>>> async with Api("http://127.0.0.1:7860") as api, Broker.connect("nats://127.0.0.1:4222") as broker:
...     view = await api.start(StreamSpec(source=PushSource(), sinks=(NatsSink(),), prompt="a pencil drawing"))
...     async with broker.frames(view.id) as frames:
...         await broker.push(view.id, jpeg)
...         async for frame in frames: ...

Everything is typed with ``shared.contracts``; what goes wrong is an error of ``shared.client.errors``. It knows no service:
``pip install -e ".[client]"`` in the checkout is all that it needs.
"""

from shared.client.api import Api, Told
from shared.client.broker import Broker, Feed
from shared.client.errors import (
    ApiError,
    ClientError,
    ConflictError,
    InvalidError,
    NoAccessError,
    NotFoundError,
    NotNowError,
    UnreachableError,
)

__all__ = [
    "Api",
    "ApiError",
    "Broker",
    "ClientError",
    "ConflictError",
    "Feed",
    "InvalidError",
    "NoAccessError",
    "NotFoundError",
    "NotNowError",
    "Told",
    "UnreachableError",
]
