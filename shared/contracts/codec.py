"""Messages to MessagePack and back."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Union

import msgpack
from pydantic import Field, TypeAdapter, ValidationError

from shared.contracts.catalog import channel_of
from shared.contracts.refs import Wire


class BadMessageError(ValueError):
    """Bytes that are not a message of their subject. Counted and dropped by the bus, never a crash."""


def encode(message: Wire) -> bytes:
    """The MessagePack form of a message."""
    return msgpack.packb(message.model_dump(mode="python"), use_bin_type=True, default=_plain)


def _plain(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} has no wire form")


@functools.cache
def _adapter(messages: tuple[type[Wire], ...]) -> TypeAdapter[Any]:
    union: Any = messages[0] if len(messages) == 1 else Annotated[Union[messages], Field(discriminator="kind")]  # noqa: UP007
    return TypeAdapter(union)


def decode(messages: tuple[type[Wire], ...], data: bytes) -> Any:
    """One of ``messages``, told apart by ``kind``. Raises BadMessageError on anything else."""
    try:
        plain = msgpack.unpackb(data, raw=False, use_list=False, strict_map_key=True)
        return _adapter(messages).validate_python(plain)
    except (ValidationError, ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise BadMessageError(str(error).splitlines()[0][:200]) from error


def decode_subject(subject: str, data: bytes) -> Any:
    """Decode by the catalog's union for ``subject``."""
    return decode(channel_of(subject).messages, data)
