"""The tensor store of one process: it owns what it puts, and reads what others put, by the cheapest way there is."""

from __future__ import annotations

import secrets
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from shared.bus.port import Bus, Subscription
from shared.contracts.refs import TensorPlace, TensorRef, check_tensor
from shared.tensors import remote, shm
from shared.tensors.arena import HEADER, Arena, ArenaFullError, Grant, Slot
from shared.tensors.local import LocalFullError, LocalShelf, export
from shared.tensors.port import (
    TTL_S,
    StaleTensorError,
    TensorCounters,
    TensorStoreFullError,
    as_array,
    host_identity,
    numpy_dtype,
    size_of,
)

MAX_OBJECTS = 4096


class HostTensorStore:
    """Leased tensors of one process. All but the ``async`` methods may be called from any thread.

    A lease ends by ``release`` (the owner's, or a same-host reader's through the slot's header), or by its ``ttl_s`` as
    a backstop. ``max_bytes`` bounds the shared memory; what does not fit raises TensorStoreFullError.
    """

    def __init__(
        self,
        shm_dir: Path | str,
        run_id: str,
        instance: str,
        *,
        bus: Bus | None = None,
        max_bytes: int = 1 << 30,
        max_objects: int = MAX_OBJECTS,
    ) -> None:
        self.counters = TensorCounters()
        self.owner = instance
        self._dir = Path(shm_dir)
        self._run_id = run_id
        self._host = host_identity(self._dir)
        self._bus = bus
        self._lock = threading.RLock()
        # No generation may repeat over restarts of an instance: an old reference would fit a new tensor.
        first = time.time_ns()
        self._arena = Arena(max_bytes, first)
        self._shelf = LocalShelf(max_objects, first)
        self._life = secrets.token_hex(3)
        self._own: dict[int, shm.Mapping] = {}
        self._others = shm.Mapped(self._dir)
        self._serving: Subscription | None = None
        self._closed = False
        shm.sweep_instance(self._dir, run_id, instance)

    async def start(self) -> None:
        """Begin to answer fetches of other hosts. Needs the bus."""
        if self._bus is None:
            raise RuntimeError("a tensor store without a bus cannot serve")
        self._serving = await remote.serve(self._bus, self.owner, self._read_part, self._release_slot)

    # --- put ---------------------------------------------------------------------------------------------------------

    def put(
        self,
        array: np.ndarray[Any, Any],
        *,
        place: TensorPlace = TensorPlace.SHM,
        ttl_s: float = TTL_S,
        dtype: str | None = None,
    ) -> TensorRef:
        """Copy ``array`` to a place that readers reach, and lease it. ``dtype="bfloat16"`` names raw uint16 words.

        SHM and INLINE copy; LOCAL keeps the array itself. Raises TensorStoreFullError, and ValueError for a dtype or a
        size that no reference may have.
        """
        name = dtype or array.dtype.name
        check_tensor(array.shape, name)
        if numpy_dtype(name) != array.dtype:
            raise TypeError(f"an array of {array.dtype} cannot be sent as {name}")
        if place is TensorPlace.LOCAL:
            return self.put_local(array, array.shape, name, ttl_s=ttl_s)
        if place is TensorPlace.INLINE:
            self.counters.puts += 1
            return self._ref(place, array.shape, name, data=array.tobytes())
        if place is not TensorPlace.SHM:
            raise ValueError(f"a numpy array cannot be put to {place}")
        expires_ns = time.monotonic_ns() + int(ttl_s * 1e9)
        slot, mapping = self._lease(array.nbytes, expires_ns)
        target = np.frombuffer(mapping.memory, array.dtype, array.size, slot.offset).reshape(array.shape)
        np.copyto(target, array)
        # Readers take the data only once the generation stands in the header.
        mapping.set_size(slot.header, array.nbytes)
        mapping.set_generation(slot.header, slot.generation)
        self.counters.puts += 1
        return self._ref(
            place,
            array.shape,
            name,
            slot=slot.number,
            generation=slot.generation,
            segment=self._name(slot.segment.number),
            offset=slot.offset,
            expires_ns=expires_ns,
        )

    def put_local(self, obj: Any, shape: tuple[int, ...], dtype: str, *, ttl_s: float = TTL_S) -> TensorRef:
        """Lease an object of this process, e.g. a torch tensor on the device. Others fetch a copy over the bus."""
        check_tensor(shape, dtype)
        expires_ns = time.monotonic_ns() + int(ttl_s * 1e9)
        with self._lock:
            self._check_open()
            try:
                slot, generation = self._shelf.put(obj, expires_ns)
            except LocalFullError:
                self._sweep_shelf()
                try:
                    slot, generation = self._shelf.put(obj, expires_ns)
                except LocalFullError:
                    self.counters.full += 1
                    raise TensorStoreFullError(
                        f"{len(self._shelf)} local tensors are leased: none was released"
                    ) from None
        self.counters.puts += 1
        return self._ref(
            TensorPlace.LOCAL, tuple(shape), dtype, slot=slot, generation=generation, expires_ns=expires_ns
        )

    def _ref(self, place: TensorPlace, shape: tuple[int, ...], dtype: str, **fields: Any) -> TensorRef:
        plain = tuple(int(side) for side in shape)
        return TensorRef(owner=self.owner, host=self._host, place=place, shape=plain, dtype=dtype, **fields)

    def _name(self, segment: int) -> str:
        return shm.segment_name(self._run_id, self.owner, f"{self._life}{segment}")

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the tensor store is closed")

    def _lease(self, size: int, expires_ns: int) -> tuple[Slot, shm.Mapping]:
        with self._lock:
            self._check_open()
            self._collect()
            try:
                grant = self._arena.lease(size, expires_ns)
            except ArenaFullError:
                self.sweep()
                try:
                    grant = self._arena.lease(size, expires_ns)
                except ArenaFullError:
                    self.counters.full += 1
                    raise TensorStoreFullError(
                        f"no room for {size} bytes: {len(self._arena.leased)} tensors are leased of "
                        f"{self._arena.total_bytes >> 20} MiB (limit {self._arena.max_bytes >> 20} MiB)"
                    ) from None
            self._apply(grant)
            return grant.slot, self._own[grant.slot.segment.number]

    def _apply(self, grant: Grant) -> None:
        for segment in grant.remove:
            self._unlink(segment.number)
        if grant.create is None:
            return
        segment = grant.create
        try:
            self._own[segment.number] = shm.create(self._dir / self._name(segment.number), segment.total_bytes)
        except OSError as error:
            self._arena.forget(segment)
            self.counters.full += 1
            raise TensorStoreFullError(
                f"{self._dir} has no room for {segment.total_bytes} bytes: {error.strerror}"
            ) from error

    def _collect(self) -> None:
        """Free what readers have released, so that the next lease can reuse it."""
        released = 0
        for slot in list(self._arena.leased.values()):
            mapping = self._own[slot.segment.number]
            if mapping.released(slot.header) == slot.generation:
                self._end(slot)
                released += 1
        self.counters.released += released

    def _end(self, slot: Slot) -> None:
        self._own[slot.segment.number].set_generation(slot.header, 0)
        self._arena.free(slot)

    # --- read --------------------------------------------------------------------------------------------------------

    def is_local(self, ref: TensorRef) -> bool:
        """Whether ``get_local`` can give the object itself."""
        return ref.place is TensorPlace.LOCAL and ref.owner == self.owner and ref.host == self._host

    def is_reachable(self, ref: TensorRef) -> bool:
        """Whether ``get`` can read it without the network."""
        if ref.place is TensorPlace.INLINE:
            return True
        return ref.host == self._host and (ref.place is TensorPlace.SHM or self.is_local(ref))

    def get_local(self, ref: TensorRef) -> Any:
        """The object that was put, not a copy. Raises StaleTensorError."""
        with self._lock:
            if self.is_local(ref):
                try:
                    value = self._shelf.get(ref.slot, ref.generation)
                except LookupError:
                    pass
                else:
                    self.counters.gets += 1
                    return value
        self.counters.stale += 1
        raise StaleTensorError(f"the lease of local tensor {ref.slot} of {ref.owner} is over")

    def get(self, ref: TensorRef, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """A copy of the tensor, into ``out`` when given. Raises StaleTensorError, also when it is out of reach."""
        if ref.place is TensorPlace.INLINE:
            return _into(as_array(ref.data or b"", ref).copy(), out)
        if self.is_local(ref):
            return _into(export(self.get_local(ref)).copy(), out)
        if ref.place is not TensorPlace.SHM or ref.host != self._host:
            raise StaleTensorError(f"a tensor in {ref.place} of {ref.owner} cannot be read here: fetch it")
        header = ref.offset - HEADER
        try:
            mapping = self._mapping(ref)
            if mapping.generation(header) != ref.generation:
                raise StaleTensorError(f"the lease of slot {ref.slot} of {ref.owner} is over")
            if mapping.size(header) != size_of(ref):
                raise StaleTensorError(
                    f"slot {ref.slot} of {ref.owner} holds {mapping.size(header)} bytes, not {size_of(ref)}"
                )
            view = np.frombuffer(mapping.memory, numpy_dtype(ref.dtype), _count(ref), ref.offset).reshape(ref.shape)
            copied = _into(view, out) if out is not None else view.copy()
            if mapping.generation(header) != ref.generation:
                raise StaleTensorError(f"slot {ref.slot} of {ref.owner} was reused while it was read")
        except StaleTensorError:
            self.counters.stale += 1
            raise
        except (ValueError, struct.error, OverflowError) as error:
            self.counters.stale += 1
            raise StaleTensorError(f"the reference to slot {ref.slot} of {ref.owner} does not fit: {error}") from error
        self.counters.gets += 1
        return copied

    def _mapping(self, ref: TensorRef) -> shm.Mapping:
        with self._lock:
            self._check_open()
            if ref.owner == self.owner:
                slot = self._arena.find(ref.slot, ref.generation)
                if slot is None or slot.offset != ref.offset:
                    raise StaleTensorError(f"the lease of slot {ref.slot} of {ref.owner} is over")
                return self._own[slot.segment.number]
            return self._others.of(ref.segment)

    async def fetch(self, ref: TensorRef) -> np.ndarray[Any, Any]:
        """The tensor by the cheapest way: this process, shared memory, or over the bus. Raises StaleTensorError."""
        if self.is_reachable(ref):
            return self.get(ref)
        if self._bus is None:
            raise StaleTensorError(f"a tensor of {ref.owner} is on another host, and there is no bus to fetch it")
        array = await remote.fetch(self._bus, ref)
        self.counters.fetches += 1
        return array

    def _read_part(self, number: int, generation: int, start: int, length: int) -> tuple[bytes, int]:
        """For readers on other hosts: bytes [start, start+length) and the total size."""
        with self._lock:
            slot = self._arena.find(number, generation)
            if slot is not None:
                memory = self._own[slot.segment.number].memory
                end = min(start + length, slot.size)
                return bytes(memory[slot.offset + start : slot.offset + end]), slot.size
            try:
                value = self._shelf.get(number, generation)
            except LookupError:
                raise StaleTensorError(f"the lease of slot {number} of {self.owner} is over") from None
        flat = export(value).reshape(-1).view(np.uint8)
        return flat[start : start + length].tobytes(), flat.size

    # --- release -----------------------------------------------------------------------------------------------------

    def release(self, ref: TensorRef) -> bool:
        """End the lease: one's own, or one of this host through the slot's header. False when that is impossible."""
        if ref.place is TensorPlace.INLINE:
            return True
        if ref.owner == self.owner and ref.host == self._host:
            return self._release_slot(ref.slot, ref.generation)
        if ref.place is not TensorPlace.SHM or ref.host != self._host:
            return False
        try:
            mapping = self._mapping(ref)
            header = ref.offset - HEADER
            if mapping.generation(header) != ref.generation:
                return False
            mapping.set_released(header, ref.generation)
        except (StaleTensorError, struct.error):
            return False
        return True

    async def release_anywhere(self, ref: TensorRef) -> bool:
        """``release``, by asking the owner where that is needed. False when the lease is left to expire."""
        if self.release(ref):
            return True
        if ref.owner == self.owner or self._bus is None or (ref.place is TensorPlace.SHM and ref.host == self._host):
            return False
        return await remote.release(self._bus, ref)

    def _release_slot(self, number: int, generation: int) -> bool:
        with self._lock:
            slot = self._arena.find(number, generation)
            if slot is not None:
                self._end(slot)
            elif not self._shelf.release(number, generation):
                return False
            self.counters.released += 1
            return True

    def sweep(self) -> int:
        """End the leases that have expired, and forget others' segments that are gone; how many leases ended."""
        now = time.monotonic_ns()
        with self._lock:
            self._collect()
            over = [slot for slot in self._arena.leased.values() if slot.expires_ns <= now]
            for slot in over:
                self._end(slot)
            self.counters.expired += len(over)
            self._others.forget_unlinked()
            return len(over) + self._sweep_shelf()

    def _sweep_shelf(self) -> int:
        over = self._shelf.sweep(time.monotonic_ns())
        self.counters.expired += over
        return over

    @property
    def leased(self) -> int:
        """Tensors under lease now."""
        return len(self._arena.leased) + len(self._shelf)

    @property
    def shm_leased(self) -> int:
        """Tensors in shared memory that no reader has released yet, as of the last sweep."""
        return len(self._arena.leased)

    @property
    def shm_bytes(self) -> int:
        """Shared memory held now."""
        return self._arena.total_bytes

    async def aclose(self) -> None:
        """Stop serving, then ``close``."""
        serving, self._serving = self._serving, None
        if serving is not None:
            await serving.unsubscribe()
        self.close()

    def close(self) -> None:
        """End every lease and unlink every segment. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._shelf.clear()
            for slot in list(self._arena.leased.values()):
                self._end(slot)
            for number in list(self._own):
                self._unlink(number)
            self._others.close()

    def _unlink(self, segment: int) -> None:
        mapping = self._own.pop(segment)
        (self._dir / self._name(segment)).unlink(missing_ok=True)
        mapping.close()


def _count(ref: TensorRef) -> int:
    return size_of(ref) // numpy_dtype(ref.dtype).itemsize


def _into(array: np.ndarray[Any, Any], out: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    if out is None:
        return array
    np.copyto(out, array, casting="no")
    return out
