"""The tensor store of one host: two stores stand for two processes, since they share nothing but /dev/shm."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.contracts.refs import TensorPlace, TensorRef
from shared.tensors import shm
from shared.tensors.port import StaleTensorError, TensorStoreFullError
from shared.tensors.store import HostTensorStore

SHM_DIR = Path("/dev/shm")
Make = Callable[..., HostTensorStore]


@pytest.fixture
def make(run_id: str) -> Iterator[Make]:
    made: list[HostTensorStore] = []

    def one(instance: str = "owner", **limits: int) -> HostTensorStore:
        made.append(HostTensorStore(SHM_DIR, run_id, instance, **limits))
        return made[-1]

    yield one
    for store in made:
        store.close()


def segments(run_id: str) -> list[Path]:
    return sorted(SHM_DIR.glob(shm.run_prefix(run_id) + "*"))


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (4, 256, 240, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "array",
    [
        picture(),
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.array(3.5, np.float64),
        np.zeros((0, 4), np.int64),
        picture()[:, ::2, ::-1],
        np.asfortranarray(np.arange(12, dtype=np.float16).reshape(3, 4)),
    ],
    ids=["picture", "floats", "scalar", "empty", "strided", "fortran"],
)
@pytest.mark.parametrize("place", [TensorPlace.SHM, TensorPlace.INLINE])
def test_a_reader_gets_what_was_put(make: Make, array: np.ndarray, place: TensorPlace) -> None:
    owner, reader = make(), make("reader")
    ref = TensorRef.model_validate(owner.put(array, place=place).model_dump())
    read = reader.get(ref)
    assert read.dtype == array.dtype
    assert read.shape == array.shape
    assert np.array_equal(read, array)
    assert read.flags.writeable


def test_bfloat16_travels_as_its_words(make: Make) -> None:
    words = np.arange(32, dtype=np.uint16).reshape(4, 8)
    ref = make().put(words, dtype="bfloat16")
    assert ref.dtype == "bfloat16"
    assert np.array_equal(make("reader").get(ref), words)
    with pytest.raises(TypeError, match="cannot be sent as bfloat16"):
        make("third").put(words.astype(np.float32), dtype="bfloat16")


def test_it_can_be_read_into_memory_one_has(make: Make) -> None:
    array = picture()
    out = np.empty_like(array)
    assert make("reader").get(make().put(array), out=out) is out
    assert np.array_equal(out, array)


def test_a_released_slot_is_used_again_and_memory_stays_flat(make: Make, run_id: str) -> None:
    owner, reader = make(), make("reader")
    for number in range(200):
        ref = owner.put(picture(number % 3))
        reader.get(ref)
        assert reader.release(ref)
    assert len(segments(run_id)) == 1
    assert owner.leased <= 1
    assert owner.counters.released >= 199


def test_a_reference_to_a_slot_used_again_is_an_error_not_a_wrong_picture(make: Make) -> None:
    owner, reader = make(), make("reader")
    old = owner.put(picture(1))
    assert owner.release(old)
    with pytest.raises(StaleTensorError, match="is over"):
        reader.get(old)
    new = owner.put(picture(2))
    assert (new.segment, new.offset) == (old.segment, old.offset)
    with pytest.raises(StaleTensorError):
        reader.get(old)
    with pytest.raises(StaleTensorError):
        owner.get(old)
    assert np.array_equal(reader.get(new), picture(2))
    assert reader.counters.stale == 2


def test_a_late_release_of_an_old_lease_does_not_end_the_new_one(make: Make) -> None:
    owner, reader = make(), make("reader")
    old = owner.put(picture(1))
    owner.release(old)
    new = owner.put(picture(2))
    assert not reader.release(old)
    assert not owner.release(old)
    owner.sweep()
    assert np.array_equal(reader.get(new), picture(2))


def test_the_generation_is_checked_again_after_reading(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner ends the lease while the reader copies: what was copied must not be used."""
    owner, reader = make(), make("reader")
    ref = owner.put(picture(1))
    copy = np.ndarray.copy
    looks = iter(range(10))
    generation = shm.Mapping.generation

    def reused_between(mapping: shm.Mapping, header: int) -> int:
        if next(looks) == 1:
            owner.release(ref)
            owner.put(picture(2))
        return generation(mapping, header)

    monkeypatch.setattr(shm.Mapping, "generation", reused_between)
    assert copy is np.ndarray.copy
    with pytest.raises(StaleTensorError, match="while it was read"):
        reader.get(ref)


def test_a_lease_ends_by_its_time_limit(make: Make) -> None:
    owner, reader = make(), make("reader")
    short, long = owner.put(picture(), ttl_s=0.02), owner.put(picture(), ttl_s=30)
    time.sleep(0.03)
    assert owner.sweep() == 1
    assert owner.counters.expired == 1
    with pytest.raises(StaleTensorError):
        reader.get(short)
    reader.get(long)


def test_a_full_store_says_so_and_takes_again_what_is_released(make: Make) -> None:
    owner, reader = make(max_bytes=4 << 20), make("reader")
    refs = [owner.put(picture()) for _ in range(5)]
    with pytest.raises(TensorStoreFullError, match="limit 4 MiB"):
        owner.put(picture())
    assert owner.counters.full == 1
    reader.release(refs[0])
    owner.put(picture())


def test_empty_segments_of_one_size_make_room_for_another(make: Make, run_id: str) -> None:
    owner = make(max_bytes=8 << 20)
    small = [owner.put(np.zeros(100_000, np.uint8)) for _ in range(60)]
    for ref in small:
        owner.release(ref)
    ref = owner.put(np.zeros(7 << 20, np.uint8))
    assert owner.shm_bytes <= 8 << 20
    assert sum(path.stat().st_size for path in segments(run_id)) == owner.shm_bytes
    assert make("reader").get(ref).nbytes == 7 << 20


def test_a_file_system_without_room_is_an_error_not_a_crash(
    make: Make, monkeypatch: pytest.MonkeyPatch, run_id: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    owner = make()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TensorStoreFullError, match="No space left"):
        owner.put(picture())
    monkeypatch.undo()
    assert segments(run_id) == []
    owner.put(picture())


def test_local_objects_are_given_not_copied(make: Make) -> None:
    owner, stranger = make(), make("stranger")
    thing = object()
    ref = owner.put_local(thing, (2, 3), "float32")
    assert owner.is_local(ref)
    assert owner.get_local(ref) is thing
    assert not stranger.is_local(ref)
    with pytest.raises(StaleTensorError, match="fetch it"):
        stranger.get(ref)
    assert owner.release(ref)
    assert not owner.release(ref)
    with pytest.raises(StaleTensorError):
        owner.get_local(ref)


def test_local_objects_are_bounded_and_expire(make: Make) -> None:
    owner = make(max_objects=2)
    owner.put_local("a", (1,), "uint8", ttl_s=0.01)
    owner.put_local("b", (1,), "uint8")
    time.sleep(0.02)
    third = owner.put_local("c", (1,), "uint8")
    assert owner.get_local(third) == "c"
    with pytest.raises(TensorStoreFullError, match="none was released"):
        owner.put_local("d", (1,), "uint8")


@pytest.mark.parametrize(
    "change",
    [
        {"segment": "../../etc/passwd"},
        {"segment": "rheocast-x/../../../etc/passwd"},
        {"segment": "rheocast-nowhere-x-1"},
        {"offset": 1 << 40},
        {"offset": -64},
        {"shape": (1 << 40,)},
        {"generation": 1},
        {"host": "another"},
    ],
    ids=str,
)
def test_a_forged_reference_is_refused(make: Make, change: dict[str, object]) -> None:
    owner, reader = make(), make("reader")
    ref = owner.put(picture()).model_copy(update=change)
    with pytest.raises(StaleTensorError):
        reader.get(ref)
    if "shape" not in change:
        assert not reader.release(ref)
        owner.sweep()
        assert owner.leased == 1


def test_closing_leaves_nothing_behind(make: Make, run_id: str) -> None:
    owner, reader = make(), make("reader")
    refs = [owner.put(picture()), owner.put(np.zeros(9 << 20, np.uint8))]
    reader.get(refs[0])
    assert len(segments(run_id)) == 2
    owner.close()
    owner.close()
    assert segments(run_id) == []
    with pytest.raises(StaleTensorError):
        reader.get(refs[1])
    with pytest.raises(StaleTensorError):
        reader.get(refs[0])
    with pytest.raises(RuntimeError, match="closed"):
        owner.put(picture())


def test_runs_and_instances_with_similar_names_do_not_sweep_each_other(run_id: str) -> None:
    ours = HostTensorStore(SHM_DIR, run_id, "worker-1")
    theirs = HostTensorStore(SHM_DIR, run_id + "2", "worker-1")
    neighbour = HostTensorStore(SHM_DIR, run_id, "worker-1-b")
    try:
        refs = [store.put(picture()) for store in (ours, theirs, neighbour)]
        HostTensorStore(SHM_DIR, run_id, "worker-1").close()
        assert len(segments(run_id)) == 2, "a living owner's segments are not leftovers"
        assert shm.sweep_run(SHM_DIR, run_id) == 2
        assert np.array_equal(theirs.get(refs[1]), picture())
    finally:
        for store in (ours, theirs, neighbour):
            store.close()


def test_many_threads_put_and_read_at_once(make: Make) -> None:
    owner, reader = make(max_bytes=64 << 20), make("reader")
    wrong: list[str] = []

    def work(seed: int) -> None:
        array = np.full((50_000,), seed, np.int32)
        for _ in range(100):
            ref = owner.put(array)
            if not np.array_equal(reader.get(ref), array):
                wrong.append(f"thread {seed}")
            reader.release(ref)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    owner.sweep()
    assert owner.leased == 0


def test_a_picture_goes_through_shared_memory_in_well_under_a_millisecond(make: Make) -> None:
    owner, reader, array = make(), make("reader"), picture()
    times = []
    for _ in range(50):
        began = time.perf_counter()
        ref = owner.put(array)
        reader.get(ref)
        reader.release(ref)
        times.append(time.perf_counter() - began)
    assert sorted(times)[len(times) // 2] < 2e-3
