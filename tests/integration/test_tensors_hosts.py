"""Tensors across processes and hosts: fetched over NATS, and nothing left behind by those who are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from shared.bus.nats import NatsBus
from shared.contracts.refs import TensorPlace, TensorRef
from shared.tensors.port import StaleTensorError
from shared.tensors.shm import run_prefix, sweep_dead, sweep_run
from shared.tensors.store import HostTensorStore

pytestmark = pytest.mark.integration

SHM_DIR = Path("/dev/shm")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
async def owner(nats_url: str, run_id: str) -> AsyncIterator[HostTensorStore]:
    bus = await NatsBus.connect(nats_url)
    store = HostTensorStore(SHM_DIR, run_id, f"owner-{run_id}", bus=bus)
    await store.start()
    yield store
    await store.aclose()
    await bus.close()


@pytest.fixture
async def far_reader(nats_url: str, run_id: str, tmp_path: Path) -> AsyncIterator[HostTensorStore]:
    """A reader that sees another shared-memory folder, as one on another host does."""
    bus = await NatsBus.connect(nats_url)
    store = HostTensorStore(tmp_path, run_id, f"far-{run_id}", bus=bus)
    yield store
    await store.aclose()
    await bus.close()


def picture(height: int = 512) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 255, (4, height, 512, 3), dtype=np.uint8)


async def test_another_host_fetches_in_parts_and_releases(owner: HostTensorStore, far_reader: HostTensorStore) -> None:
    array = picture()
    assert array.nbytes > 3 * 900_000
    ref = owner.put(array)
    assert not far_reader.is_reachable(ref)
    assert np.array_equal(await far_reader.fetch(ref), array)
    assert await far_reader.release_anywhere(ref)
    assert owner.leased == 0
    with pytest.raises(StaleTensorError, match="is over"):
        await far_reader.fetch(ref)


async def test_an_object_of_another_process_is_fetched_as_an_array(
    owner: HostTensorStore, nats_url: str, run_id: str
) -> None:
    array = np.arange(600_000, dtype=np.float32).reshape(2, -1)
    ref = owner.put_local(array, array.shape, "float32")
    assert ref.place is TensorPlace.LOCAL
    bus = await NatsBus.connect(nats_url)
    neighbour = HostTensorStore(SHM_DIR, run_id, f"neighbour-{run_id}", bus=bus)
    assert np.array_equal(await neighbour.fetch(ref), array)
    assert await neighbour.release_anywhere(ref)
    assert owner.leased == 0
    neighbour.close()
    await bus.close()


async def test_a_torch_bfloat16_tensor_is_fetched_as_its_words(
    owner: HostTensorStore, far_reader: HostTensorStore
) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(24, dtype=torch.float32).reshape(2, 12).to(torch.bfloat16)[:, 2:10]
    ref = owner.put_local(tensor, tuple(tensor.shape), "bfloat16")
    words = await far_reader.fetch(ref)
    again = torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(again, tensor)


async def test_an_owner_that_is_gone_is_a_stale_tensor(far_reader: HostTensorStore) -> None:
    ref = TensorRef(
        owner="nobody", host="elsewhere", place=TensorPlace.SHM, shape=(4,), dtype="uint8", slot=0, generation=9
    )
    with pytest.raises(StaleTensorError, match="cannot be reached"):
        await far_reader.fetch(ref)
    assert not await far_reader.release_anywhere(ref)


CHILD = """
import sys
import numpy as np
from shared.contracts.refs import TensorRef
from shared.tensors.store import HostTensorStore

store = HostTensorStore("/dev/shm", sys.argv[1], sys.argv[2])
if len(sys.argv) > 3:
    got = store.get(TensorRef.model_validate_json(sys.argv[3]))
    print(int(got.sum()), flush=True)
else:
    print(store.put(np.full((1000, 1000), 7, np.uint8)).model_dump_json(), flush=True)
sys.stdin.read()
"""


def child(run_id: str, instance: str, *args: str) -> tuple[subprocess.Popen[str], str]:
    """A process with a store of its own, and the line it tells."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, run_id, instance, *args],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()


def test_a_killed_owner_leaves_nothing_after_the_sweep(run_id: str) -> None:
    process, line = child(run_id, "worker-0")
    ref = TensorRef.model_validate_json(line)
    reader = HostTensorStore(SHM_DIR, run_id, "reader")
    assert reader.get(ref).sum() == 7_000_000
    kill(process)
    assert len(list(SHM_DIR.glob(run_prefix(run_id) + "*"))) == 1
    assert sweep_run(SHM_DIR, run_id) == 1
    assert list(SHM_DIR.glob(run_prefix(run_id) + "*")) == []
    reader.sweep()
    with pytest.raises(StaleTensorError):
        reader.get(ref)
    reader.close()


def test_a_killed_owners_next_life_removes_what_it_left(run_id: str) -> None:
    process, line = child(run_id, "worker-0")
    kill(process)
    again, other = child(run_id, "worker-0")
    assert TensorRef.model_validate_json(other).generation > TensorRef.model_validate_json(line).generation
    names = [path.name for path in SHM_DIR.glob(run_prefix(run_id) + "*")]
    assert names == [TensorRef.model_validate_json(other).segment]
    kill(again)


def test_anyone_can_sweep_the_dead_and_only_them(run_id: str) -> None:
    dead, _ = child(run_id, "dead")
    living, line = child(run_id, "living")
    kill(dead)
    sweep_dead(SHM_DIR)
    names = [path.name for path in SHM_DIR.glob(run_prefix(run_id) + "*")]
    assert names == [TensorRef.model_validate_json(line).segment]
    kill(living)


def test_a_killed_reader_costs_nothing_but_its_lease_until_the_time_limit(run_id: str) -> None:
    owner = HostTensorStore(SHM_DIR, run_id, "owner")
    ref = owner.put(np.full((1000, 1000), 7, np.uint8), ttl_s=0.5)
    process, line = child(run_id, "reader", ref.model_dump_json())
    assert int(line) == 7_000_000
    kill(process)
    assert owner.leased == 1, "it was not released"
    while owner.leased:
        owner.sweep()
    assert owner.counters.expired == 1
    owner.close()
    assert list(SHM_DIR.glob(run_prefix(run_id) + "*")) == []
