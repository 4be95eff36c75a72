"""The tensor store of one process: it owns what it puts, and reads what others put, by the cheapest way there is."""

from __future__ import annotations

import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from shared.bus.port import Bus, Subscription
from shared.contracts.refs import TensorPlace, TensorRef, check_tensor
from shared.tensors import remote, shm
from shared.tensors.arena import HEADER, ArenaFullError, Slot
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
from shared.tensors.slots import OnEnd, OwnSlots

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
        self._host = host_identity(self._dir)
        self._bus = bus
        self._lock = threading.RLock()
        # No generation may repeat over restarts of an instance: an old reference would fit a new tensor.
        first = time.time_ns()
        self._slots = OwnSlots(self._dir, run_id, instance, max_bytes, first)
        self._shelf = LocalShelf(max_objects, first)
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
        return self._leased(place, slot, mapping, array.nbytes, array.shape, name)

    def put_device(
        self, obj: Any, shape: tuple[int, ...], dtype: str, handle: bytes, on_end: OnEnd | None, *, ttl_s: float = TTL_S
    ) -> TensorRef:
        """Lease a device tensor that other processes of the host open by ``handle``; ``on_end`` follows the lease.

        The lease is an empty slot of shared memory, so that a reader checks its generation and releases it without the
        bus. Others fetch a copy. Raises TensorStoreFullError, ValueError.
        """
        check_tensor(shape, dtype)
        expires_ns = time.monotonic_ns() + int(ttl_s * 1e9)
        with self._lock:
            slot, mapping = self._lease(0, expires_ns)
            self._slots.hold(slot, obj, on_end)
            return self._leased(TensorPlace.CUDA_IPC, slot, mapping, 0, shape, dtype, data=handle)

    def _leased(
        self,
        place: TensorPlace,
        slot: Slot,
        mapping: shm.Mapping,
        size: int,
        shape: tuple[int, ...],
        dtype: str,
        **more: Any,
    ) -> TensorRef:
        # Readers take the data only once the generation stands in the header.
        mapping.set_size(slot.header, size)
        mapping.set_generation(slot.header, slot.generation)
        self.counters.puts += 1
        return self._ref(
            place,
            shape,
            dtype,
            slot=slot.number,
            generation=slot.generation,
            segment=self._slots.segment(slot),
            offset=slot.offset,
            expires_ns=slot.expires_ns,
            **more,
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

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the tensor store is closed")

    def _lease(self, size: int, expires_ns: int) -> tuple[Slot, shm.Mapping]:
        with self._lock:
            self._check_open()
            self.counters.released += self._slots.collect()
            try:
                try:
                    return self._slots.lease(size, expires_ns)
                except ArenaFullError:
                    self.sweep()
                    return self._slots.lease(size, expires_ns)
            except ArenaFullError:
                arena = self._slots.arena
                reason = (
                    f"no room for {size} bytes: {len(arena.leased)} tensors are leased of "
                    f"{arena.total_bytes >> 20} MiB (limit {arena.max_bytes >> 20} MiB)"
                )
            except OSError as error:
                reason = f"{self._dir} has no room for {size} bytes: {error.strerror}"
            self.counters.full += 1
            raise TensorStoreFullError(reason)

    # --- read --------------------------------------------------------------------------------------------------------

    def is_local(self, ref: TensorRef) -> bool:
        """Whether ``get_local`` can give the object itself."""
        kept = (TensorPlace.LOCAL, TensorPlace.CUDA_IPC)
        return ref.place in kept and ref.owner == self.owner and ref.host == self._host

    def is_reachable(self, ref: TensorRef) -> bool:
        """Whether ``get`` can read it without the network."""
        if ref.place is TensorPlace.INLINE:
            return True
        return ref.host == self._host and (ref.place is TensorPlace.SHM or self.is_local(ref))

    def get_local(self, ref: TensorRef) -> Any:
        """The object that was put, not a copy. Raises StaleTensorError."""
        with self._lock:
            value = self._own_object(ref.slot, ref.generation) if self.is_local(ref) else None
            if value is not None:
                self.counters.gets += 1
                return value
        self.counters.stale += 1
        raise StaleTensorError(f"the lease of local tensor {ref.slot} of {ref.owner} is over")

    def _own_object(self, number: int, generation: int) -> Any:
        """What is leased under the number, or None."""
        slot = self._slots.arena.find(number, generation)
        return self._slots.held(slot) if slot is not None else self._shelf.get(number, generation)

    def is_leased(self, ref: TensorRef) -> bool:
        """Whether the slot still holds this lease: for who reads a place of this host by other means than ``get``."""
        try:
            return ref.host == self._host and self._mapping(ref).generation(ref.offset - HEADER) == ref.generation
        except (StaleTensorError, struct.error, ValueError):
            return False

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
                slot = self._slots.arena.find(ref.slot, ref.generation)
                if slot is None or slot.offset != ref.offset:
                    raise StaleTensorError(f"the lease of slot {ref.slot} of {ref.owner} is over")
                return self._slots.memory(slot)
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
            slot = self._slots.arena.find(number, generation)
            value = self._own_object(number, generation)
            if value is None and slot is None:
                raise StaleTensorError(f"the lease of slot {number} of {self.owner} is over")
            if value is None and slot is not None:
                memory = self._slots.memory(slot).memory
                end = min(start + length, slot.size)
                return bytes(memory[slot.offset + start : slot.offset + end]), slot.size
            if slot is not None:
                # Who fetches a device's tensor could not open it.
                self.counters.device_fetched += start == 0
        flat = export(value).reshape(-1).view(np.uint8)
        return flat[start : start + length].tobytes(), flat.size

    # --- release -----------------------------------------------------------------------------------------------------

    def release(self, ref: TensorRef) -> bool:
        """End the lease: one's own, or one of this host through the slot's header. False when that is impossible."""
        if ref.place is TensorPlace.INLINE:
            return True
        if ref.owner == self.owner and ref.host == self._host:
            return self._release_slot(ref.slot, ref.generation)
        return ref.place is TensorPlace.SHM and self._release_header(ref)

    def release_opened(self, ref: TensorRef) -> bool:
        """End the lease of a device tensor that was opened by its handle and closed again: its owner counts on that."""
        return ref.place is TensorPlace.CUDA_IPC and self._release_header(ref)

    def _release_header(self, ref: TensorRef) -> bool:
        if ref.host != self._host:
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
            slot = self._slots.arena.find(number, generation)
            if slot is not None:
                self._slots.end(slot)
            elif not self._shelf.release(number, generation):
                return False
            self.counters.released += 1
            return True

    def sweep(self) -> int:
        """End the leases that have expired, and forget others' segments that are gone; how many leases ended."""
        now = time.monotonic_ns()
        with self._lock:
            self.counters.released += self._slots.collect()
            over = self._slots.expired(now)
            self.counters.expired += over
            self._others.forget_unlinked()
            return over + self._sweep_shelf()

    def _sweep_shelf(self) -> int:
        over = self._shelf.sweep(time.monotonic_ns())
        self.counters.expired += over
        return over

    @property
    def leased(self) -> int:
        """Tensors under lease now."""
        return len(self._slots.arena.leased) + len(self._shelf)

    @property
    def shm_leased(self) -> int:
        """Tensors in shared memory that no reader has released yet, as of the last sweep."""
        return len(self._slots.arena.leased)

    @property
    def shm_bytes(self) -> int:
        """Shared memory held now."""
        return self._slots.arena.total_bytes

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
            self._slots.close()
            self._others.close()


def _count(ref: TensorRef) -> int:
    return size_of(ref) // numpy_dtype(ref.dtype).itemsize


def _into(array: np.ndarray[Any, Any], out: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    if out is None:
        return array
    np.copyto(out, array, casting="no")
    return out
