"""GPU to GPU between processes, as far as it needs no GPU: handles, the writer's choice, leases, and falling back."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from services.worker.transfer import publish_shared, receive, way_out
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.contracts.refs import TensorPlace, TensorRef
from shared.tensors import cuda_ipc
from shared.tensors.cuda_ipc import IpcHandle, NoIpcError
from shared.tensors.port import StaleTensorError, TensorError
from shared.tensors.store import HostTensorStore

SHM_DIR = Path("/dev/shm")
CUDA = torch.device("cuda", 0)
HANDLE = IpcHandle("GPU-1", b"m" * 64, 4096, 512, b"/torch_12_345_6", 17, b"e" * 64, True, 8)


@pytest.fixture
async def stores(run_id: str) -> AsyncIterator[tuple[HostTensorStore, HostTensorStore]]:
    """An owner and a reader on one host and one bus."""
    broker = MemoryBroker()
    buses = [MemoryBus(broker), MemoryBus(broker)]
    owner, reader = (HostTensorStore(SHM_DIR, run_id, f"{n}-{run_id}", bus=b) for n, b in zip("ab", buses, strict=True))
    await owner.start()
    yield owner, reader
    for store in (owner, reader):
        await store.aclose()
    for bus in buses:
        await bus.close()


class Lease:
    """A device tensor put to the owner, and how its lease ended."""

    def __init__(self, owner: HostTensorStore, handle: IpcHandle = HANDLE, ttl_s: float = 30.0) -> None:
        self.ended: list[bool] = []
        self.value = torch.arange(6, dtype=torch.float32).reshape(2, 3)
        ref = owner.put_device(self.value, (2, 3), "float32", handle.pack(), self.ended.append, ttl_s=ttl_s)
        self.ref = TensorRef.model_validate(ref.model_dump())


def opened_by(lease: Lease, meanwhile: Callable[[], object] = lambda: None) -> Callable[..., torch.Tensor]:
    """What stands in for the driver: opens the handle and gives the tensor."""

    def read(ref: TensorRef, device: torch.device, gpus: dict[str, int]) -> torch.Tensor:
        assert IpcHandle.unpack(ref.data or b"") == HANDLE
        meanwhile()
        return lease.value.clone()

    return read


def test_a_handle_travels_as_plain_bytes() -> None:
    assert IpcHandle.unpack(HANDLE.pack()) == HANDLE
    assert isinstance(msgpack.unpackb(HANDLE.pack()), list)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"\xc1", "cannot be read"),
        (os.urandom(3) + HANDLE.pack(), "handle"),
        (msgpack.packb({"gpu": 1}), "other fields"),
        (msgpack.packb(["GPU-1"]), "other fields"),
        (replace(HANDLE, size=-1).pack(), "outside"),
        (replace(HANDLE, offset=1 << 60).pack(), "outside"),
        (replace(HANDLE, counter_offset=10_000).pack(), "outside"),
        (replace(HANDLE, counter=b"/rheocast-run-1").pack(), "counts its readers in"),
        (replace(HANDLE, counter=b"/torch_1_2_3/../x").pack(), "counts its readers in"),
    ],
)
def test_bytes_that_are_no_handle_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(StaleTensorError, match=message):
        IpcHandle.unpack(data)


async def test_a_tensor_must_lie_in_what_is_exported(stores: tuple[HostTensorStore, HostTensorStore]) -> None:
    ref = Lease(stores[0]).ref
    HANDLE.check(ref, 4)
    with pytest.raises(StaleTensorError, match="does not lie in"):
        replace(HANDLE, size=8 * 4 + 23).check(ref, 4)


def test_the_writer_exports_until_a_reader_had_to_fetch() -> None:
    assert way_out(CUDA, 0) is TensorPlace.CUDA_IPC
    assert way_out(CUDA, 1) is TensorPlace.SHM
    assert way_out(torch.device("cpu"), 0) is TensorPlace.SHM


async def test_a_cpu_worker_shares_memory(stores: tuple[HostTensorStore, HostTensorStore]) -> None:
    owner, reader = stores
    ref = publish_shared(owner, torch.ones(2, 3, dtype=torch.bfloat16), 30.0)
    assert ref.place is TensorPlace.SHM
    assert torch.equal(await receive(reader, ref, torch.device("cpu")), torch.ones(2, 3, dtype=torch.bfloat16))


async def test_the_owners_own_roles_get_the_tensor_itself(stores: tuple[HostTensorStore, HostTensorStore]) -> None:
    owner, _ = stores
    lease = Lease(owner)
    assert (await receive(owner, lease.ref, torch.device("cpu"))).data_ptr() == lease.value.data_ptr()
    assert lease.ended == [False], "nobody opened it: the owner takes the count back"
    with pytest.raises(StaleTensorError):
        owner.get_local(lease.ref)


async def test_a_reader_that_opens_it_ends_the_lease_without_the_bus(
    stores: tuple[HostTensorStore, HostTensorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = stores
    lease = Lease(owner)
    monkeypatch.setattr(cuda_ipc, "read", opened_by(lease))
    assert torch.equal(await receive(reader, lease.ref, CUDA), lease.value)
    assert lease.ended == []
    owner.sweep()
    assert lease.ended == [True], "its closing has counted: the owner must not count again"
    assert owner.leased == 0
    assert (reader.counters.gets, reader.counters.fetches, owner.counters.device_fetched) == (1, 0, 0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
async def test_who_cannot_open_it_fetches_it_and_the_writer_learns(
    stores: tuple[HostTensorStore, HostTensorStore], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = stores
    lease = Lease(owner)
    # No GPU of this process has the handle's UUID; what was fetched would then be copied to the device.
    target = torch.device(device)
    if device == "cuda":
        with pytest.raises(NoIpcError, match="GPU-1 of a-"):
            cuda_ipc.read(lease.ref, target, {"GPU-2": 0})
        monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: self)
    assert torch.equal(await receive(reader, lease.ref, target), lease.value)
    assert lease.ended == [False]
    assert owner.counters.device_fetched == 1
    assert way_out(CUDA, owner.counters.device_fetched) is TensorPlace.SHM


async def test_a_lease_that_ends_while_it_is_read_is_an_error_not_a_wrong_picture(
    stores: tuple[HostTensorStore, HostTensorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = stores
    lease = Lease(owner)

    def reused() -> None:
        owner.release(lease.ref)
        Lease(owner)

    monkeypatch.setattr(cuda_ipc, "read", opened_by(lease, reused))
    with pytest.raises(StaleTensorError, match="ended while it was read"):
        await receive(reader, lease.ref, CUDA)
    assert reader.counters.stale == 1


async def test_a_copy_that_fails_after_opening_still_ends_the_lease_as_opened(
    stores: tuple[HostTensorStore, HostTensorStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, reader = stores
    lease = Lease(owner)

    def full(*_: object) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory.\nMore lines.")

    monkeypatch.setattr(cuda_ipc, "read", full)
    with pytest.raises(TensorError, match=r"CUDA out of memory\.$"):
        await receive(reader, lease.ref, CUDA)
    owner.sweep()
    assert lease.ended == [True]


async def test_an_expired_lease_is_the_owners_to_take_back(stores: tuple[HostTensorStore, HostTensorStore]) -> None:
    owner, reader = stores
    lease = Lease(owner, ttl_s=0.0)
    owner.sweep()
    assert lease.ended == [False]
    assert owner.counters.expired == 1
    assert not reader.is_leased(lease.ref)
    with pytest.raises(StaleTensorError, match="is over"):
        await receive(reader, lease.ref, torch.device("cpu"))
    assert not await reader.release_anywhere(lease.ref) or owner.leased == 0


async def test_a_plain_release_by_a_reader_is_left_to_the_owner(
    stores: tuple[HostTensorStore, HostTensorStore],
) -> None:
    owner, reader = stores
    lease = Lease(owner)
    assert not reader.release(lease.ref), "it has not opened it"
    assert await reader.release_anywhere(lease.ref)
    assert lease.ended == [False]
    assert not reader.release_opened(lease.ref)


async def test_closing_the_owner_ends_every_lease(stores: tuple[HostTensorStore, HostTensorStore]) -> None:
    owner, reader = stores
    leases = [Lease(owner) for _ in range(3)]
    array = owner.put(np.zeros(4, np.uint8))
    assert reader.is_leased(leases[0].ref)
    await owner.aclose()
    assert [lease.ended for lease in leases] == [[False]] * 3
    assert not reader.is_leased(leases[0].ref)
    with pytest.raises(StaleTensorError):
        reader.get(array)
