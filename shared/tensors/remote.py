"""Tensors of other hosts, or of another process's device: fetched over the bus in parts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np

from shared.bus.port import Bus, BusError, Received, Subscription
from shared.contracts import subjects
from shared.contracts.codec import BadMessageError
from shared.contracts.commands import TensorGet, TensorPart, TensorRelease
from shared.contracts.refs import TensorRef
from shared.tensors.port import StaleTensorError, TensorError, numpy_dtype, size_of

PART_BYTES = 900_000  # below the broker's default limit of 1 MB
IN_FLIGHT = 4
TIMEOUT_S = 5.0

Read = Callable[[int, int, int, int], tuple[bytes, int]]


async def serve(bus: Bus, owner: str, read: Read, release: Callable[[int, int], bool]) -> Subscription:
    """Answer ``rheo.tensor.<owner>.get``. ``read(slot, generation, start, length)`` gives (bytes, total size)."""

    async def answer(received: Received) -> TensorPart:
        message = received.message
        if isinstance(message, TensorRelease):
            release(message.slot, message.generation)
            return TensorPart()
        try:
            length = max(0, min(message.length, PART_BYTES))
            data, total = read(message.slot, message.generation, max(0, message.start), length)
        except TensorError as error:
            return TensorPart(error=str(error))
        return TensorPart(data=data, total=total)

    return await bus.serve(subjects.tensor_get(owner), answer)


async def fetch(bus: Bus, ref: TensorRef, timeout_s: float = TIMEOUT_S) -> np.ndarray[Any, Any]:
    """The whole tensor, a few parts at a time. Raises StaleTensorError, also when the owner does not answer."""
    total = size_of(ref)
    buffer = np.empty(total, np.uint8)
    starts = iter(range(0, total, PART_BYTES))
    subject = subjects.tensor_get(ref.owner)

    async def part(start: int) -> None:
        length = min(PART_BYTES, total - start)
        message = TensorGet(slot=ref.slot, generation=ref.generation, start=start, length=length)
        try:
            reply: TensorPart = await bus.request(subject, message, timeout_s)
        except (BusError, BadMessageError) as error:
            raise StaleTensorError(f"the tensor's owner {ref.owner} cannot be reached: {error}") from error
        if reply.error is not None:
            raise StaleTensorError(reply.error)
        if reply.total != total or len(reply.data) != length:
            raise StaleTensorError(f"{ref.owner} holds {reply.total} bytes where the reference says {total}")
        buffer[start : start + length] = np.frombuffer(reply.data, np.uint8)

    async def parts() -> None:
        for start in starts:  # one iterator for all: each part is asked for once
            await part(start)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(IN_FLIGHT):
                group.create_task(parts())
    except ExceptionGroup as failed:
        # The parts fail for one reason: the first tells it.
        raise failed.exceptions[0] from failed.exceptions[0].__cause__
    return buffer.view(numpy_dtype(ref.dtype)).reshape(ref.shape)


async def release(bus: Bus, ref: TensorRef, timeout_s: float = TIMEOUT_S) -> bool:
    """Tell the owner that the tensor is not needed; False when it cannot be told (the lease then expires)."""
    message = TensorRelease(slot=ref.slot, generation=ref.generation)
    try:
        await bus.request(subjects.tensor_get(ref.owner), message, timeout_s)
    except (BusError, BadMessageError):
        return False
    return True
