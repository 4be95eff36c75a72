"""A reference from the wire may not make its reader allocate, or choke on, whatever somebody wrote into it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgpack
import numpy as np
import pytest

from shared.bus.memory import MemoryBroker, MemoryBus
from shared.contracts import subjects
from shared.contracts.codec import BadMessageError, decode
from shared.contracts.commands import TensorGet, TensorPart
from shared.contracts.refs import DTYPE_BYTES, MAX_TENSOR_BYTES, TensorPlace, TensorRef
from shared.tensors import remote
from shared.tensors.port import numpy_dtype
from shared.tensors.store import HostTensorStore
from tests.support.messages import ref


def wire(**changes: Any) -> bytes:
    return msgpack.packb({**ref().model_dump(mode="json"), **changes})


def test_a_reference_of_the_largest_tensor_is_read() -> None:
    got = decode((TensorRef,), wire(shape=[2, MAX_TENSOR_BYTES // 8], dtype="float32"))
    assert got.shape == (2, MAX_TENSOR_BYTES // 8)
    assert decode((TensorRef,), wire(shape=[])).shape == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [MAX_TENSOR_BYTES + 1], "dtype": "uint8"},
        {"shape": [2**62, 4]},
        {"shape": [2**62, 0]},
        {"shape": [-1, -4]},
        {"shape": [1] * 9},
        {"dtype": "float31"},
        {"dtype": "object"},
        {"dtype": ""},
        {"dtype": "uint8, float32"},
    ],
    ids=str,
)
def test_what_cannot_be_a_tensor_is_a_bad_message(changes: dict[str, Any]) -> None:
    with pytest.raises(BadMessageError):
        decode((TensorRef,), wire(**changes))


def test_the_sizes_of_the_dtypes_are_numpys() -> None:
    assert {name: numpy_dtype(name).itemsize for name in DTYPE_BYTES} == dict(DTYPE_BYTES)


@pytest.mark.parametrize("place", [TensorPlace.SHM, TensorPlace.INLINE, TensorPlace.LOCAL])
def test_what_no_reference_can_name_is_refused_before_it_takes_a_slot(run_id: str, place: TensorPlace) -> None:
    store = HostTensorStore("/dev/shm", run_id, "owner")
    with pytest.raises(ValueError, match="complex64"):
        store.put(np.zeros(4, np.complex64), place=place)
    assert store.leased == 0
    store.close()


async def test_a_large_tensor_is_fetched_a_few_parts_at_a_time() -> None:
    """However many parts there are, at most IN_FLIGHT are asked for at once, by as many tasks."""
    data = np.random.default_rng(0).integers(0, 256, 20 * remote.PART_BYTES + 5, np.uint8)
    broker = MemoryBroker()
    owner, reader = MemoryBus(broker), MemoryBus(broker)
    large = TensorRef(owner="o", host="h", place=TensorPlace.SHM, shape=data.shape, dtype="uint8")
    asked: list[int] = []
    at_once, most, tasks = 0, 0, 0

    class Watched:
        async def request(self, subject: str, message: TensorGet, timeout_s: float) -> TensorPart:
            nonlocal at_once, most, tasks
            asked.append(message.start)
            at_once += 1
            most, tasks = max(most, at_once), max(tasks, len(asyncio.all_tasks()) - before)
            try:
                return await reader.request(subject, message, timeout_s)
            finally:
                at_once -= 1

    def read(_slot: int, _generation: int, start: int, length: int) -> tuple[bytes, int]:
        return data[start : start + length].tobytes(), data.size

    serving = await remote.serve(owner, "o", read, lambda *_: True)
    before = len(asyncio.all_tasks())
    got = await remote.fetch(Watched(), large)  # type: ignore[arg-type]
    assert np.array_equal(got, data)
    assert sorted(asked) == list(range(0, data.size, remote.PART_BYTES))
    assert most == remote.IN_FLIGHT
    assert tasks < 21, "not one task per part"
    assert subjects.tensor_get("o") == "rheo.tensor.o.get"
    await serving.unsubscribe()
    await owner.close()
    await reader.close()
