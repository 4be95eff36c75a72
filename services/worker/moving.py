"""Carries out what the scheduler asks of state and blocks: exports, imports, blocks prepared and cut over, streams set aside.

Each request runs on the device behind the work that was admitted before it, and is answered once it is done; a repeated
request is answered again and not carried out again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch

from services.worker.assignments import Assignments, Placed, one_line
from services.worker.core import BatchSequencer, Rank
from services.worker.device_thread import DeviceThread, QueueFullError
from services.worker.runtime import Runtime
from shared.contracts import subjects
from shared.contracts.moving import (
    BlockRange,
    BlocksCut,
    BlocksReady,
    CutOver,
    ExportState,
    ImportState,
    Move,
    Moved,
    PrepareBlocks,
    StateExported,
    StateImported,
    StateParts,
    StreamSuspended,
    SuspendStream,
)
from shared.contracts.order import OrderGate
from shared.contracts.refs import TensorRef
from shared.engine.blocks import Pieces
from shared.engine.model.checkpoints import WeightsError
from shared.engine.model.kv_cache import NoSlotError
from shared.engine.moving import Carried
from shared.engine.stage import Stage, StageError
from shared.engine.state_parts import StatePartsError, from_parts, to_parts
from shared.lifecycle import Context
from shared.tensors.port import TensorError

log = logging.getLogger(__name__)

MAX_ANSWERS = 256
TIMEOUT_S = 120.0
LEASE_S = 60.0
SHM_PARTS = 4
"""Parts of one export that go to shared memory, which frames and batches need as well; the rest is fetched over the bus."""


class MoveError(RuntimeError):
    """A request that this worker cannot carry out; the message is the line to tell."""


_TOLD = (
    MoveError,
    StageError,
    StatePartsError,
    NoSlotError,
    WeightsError,
    FileNotFoundError,
    TensorError,
    QueueFullError,
    ValueError,
    KeyError,
)


class Moving:
    """One worker's part in moves. ``sequencer`` is the one in use, ``resubscribe`` follows a new place in the pipeline."""

    def __init__(
        self,
        context: Context,
        runtime: Runtime,
        device: DeviceThread,
        assignments: Assignments,
        sequencer: Callable[[], BatchSequencer],
        resubscribe: Callable[[], Awaitable[None]],
    ) -> None:
        self._context, self._runtime, self._device, self._assignments = context, runtime, device, assignments
        self._sequencer, self._resubscribe = sequencer, resubscribe
        self._answers: OrderedDict[tuple[str, str, str], Moved] = OrderedDict()
        self._under_way: dict[tuple[str, str, str], asyncio.Task[None]] = {}
        self._blocks = asyncio.Lock()
        self._pieces: Pieces | None = None
        self._leases: list[tuple[str, TensorRef]] = []

    def on_move(self, message: Move) -> None:
        """Carry it out beside everything else, unless that is under way or done."""
        about = message.pipeline if isinstance(message, PrepareBlocks | CutOver) else message.stream
        key = (message.kind, message.move, about)
        if key in self._under_way:
            return
        task = asyncio.create_task(self._carry_out(key, message), name=message.kind)
        self._under_way[key] = task
        task.add_done_callback(lambda _: self._under_way.pop(key, None))

    def forget(self) -> None:
        """Every stream was let go: what was answered no longer holds."""
        self._answers.clear()
        for task in self._under_way.values():
            task.cancel()

    async def close(self) -> None:
        """Give up what is under way."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry_out(self, key: tuple[str, str, str], message: Move) -> None:
        answer = self._answers.get(key)
        if answer is None:
            try:
                answer = await asyncio.wait_for(self._do(message), TIMEOUT_S)
            except _TOLD as error:
                log.warning("%s %s: %s", message.kind, key[2], error)
                answer = _failed(message, str(error) if isinstance(error, MoveError | StageError) else one_line(error))
            except Exception as error:
                log.exception("%s %s failed", message.kind, key[2])
                answer = _failed(message, one_line(error))
            self._answers[key] = answer
            while len(self._answers) > MAX_ANSWERS:
                self._answers.popitem(last=False)
        await self._context.bus.publish(subjects.MOVED, answer)

    async def _do(self, message: Move) -> Moved:
        if isinstance(message, ExportState):
            return await self._export(message)
        if isinstance(message, ImportState):
            return await self._import(message)
        if isinstance(message, PrepareBlocks):
            return await self._prepare(message)
        if isinstance(message, CutOver):
            return await self._cut_over(message)
        return await self._suspend(message)

    # --- state -------------------------------------------------------------------------------------------------------

    async def _export(self, message: ExportState) -> StateExported:
        placed, runtime, stream = self._placed(message.stream, message.epoch), self._runtime, message.stream
        await self._release(lambda held: held not in self._assignments.streams)
        encoded = placed.encode_gate.newest
        carried = Carried({"vae": runtime.vae_name})
        if message.blocks is not None and runtime.stage is not None:
            stage, blocks = runtime.stage.stage, message.blocks.blocks
            carried.join(await self._device.call(Rank.STAGE, lambda: stage.export_stream(stream, blocks)))
        async with placed.decoding:  # what passed the gate waits for the device, so before what is asked of it now
            decoded = placed.decode_gate.newest
        for wanted, rank, role in self._caches(message.encode, message.decode):
            if wanted and role is not None:
                carried.join(await self._device.call(rank, lambda role=role: role.caches.carry(stream)))
        layout, parts = await asyncio.to_thread(to_parts, carried)
        refs = await asyncio.to_thread(self._publish, parts)
        self._leases += [(stream, ref) for ref in refs]
        source = f"{self._context.instance}/{stream}/{message.move}"
        state = StateParts(source=source, layout=layout, parts=tuple(refs), nbytes=sum(map(len, parts)))
        return StateExported(**_about(message), state=state, encoded=encoded, decoded=decoded)

    def _publish(self, parts: Sequence[torch.Tensor]) -> list[TensorRef]:
        tensors, refs = self._context.tensors, list[TensorRef]()
        try:
            for part in parts:
                if len(refs) < SHM_PARTS:
                    refs.append(tensors.put(part.numpy(), ttl_s=LEASE_S))
                else:
                    refs.append(tensors.put_local(part.clone(), tuple(part.shape), "uint8", ttl_s=LEASE_S))
        except BaseException:
            for ref in refs:
                tensors.release(ref)
            raise
        return refs

    async def _import(self, message: ImportState) -> StateImported:
        placed, runtime, stream = self._placed(message.stream, message.epoch), self._runtime, message.stream
        arrays = [await self._context.tensors.fetch(ref) for ref in message.state.parts]
        parts = [torch.from_numpy(array) for array in arrays]
        carried = await asyncio.to_thread(from_parts, message.state.layout, parts)
        if not {"encode", "decode"}.isdisjoint(carried.meta) and carried.meta.get("vae") != runtime.vae_name:
            raise MoveError(f"the caches are of {carried.meta.get('vae')}, this worker has {runtime.vae_name}")
        if runtime.stage is not None and (carried.blocks or carried.meta.get("prompts")):
            stage = runtime.stage.stage
            await self._device.call(Rank.STAGE, lambda: stage.import_stream(stream, carried))
        for _, rank, role in self._caches(True, True):
            if role is not None:
                await self._device.call(rank, lambda role=role: role.caches.restore(stream, carried))
        placed.encode_gate = _not_before(placed.encode_gate, message.encoded)
        placed.decode_gate = _not_before(placed.decode_gate, message.decoded)
        return StateImported(**_about(message))

    async def _suspend(self, message: SuspendStream) -> StreamSuspended:
        placed, runtime, stream = self._placed(message.stream, message.epoch), self._runtime, message.stream
        if not message.suspended and placed.suspended:
            self._assignments.check_room()
        host = 0
        if runtime.stage is not None:
            stage = runtime.stage.stage
            host += await self._device.call(Rank.STAGE, lambda: _aside(stage, stream, message.suspended))
        for _, rank, role in self._caches(True, True):
            if role is not None:
                caches = role.caches
                host += await self._device.call(rank, lambda caches=caches: _aside(caches, stream, message.suspended))
        placed.suspended = message.suspended
        return StreamSuspended(**_about(message), suspended=message.suspended, host_bytes=host)

    def _caches(self, encode: bool, decode: bool) -> tuple[tuple[bool, Rank, Any], ...]:
        return (encode, Rank.ENCODE, self._runtime.encode), (decode, Rank.DECODE, self._runtime.decode)

    def _placed(self, stream: str, epoch: int) -> Placed:
        placed = self._assignments.streams.get(stream)
        if placed is None or placed.take.epoch != epoch:
            raise MoveError(f"stream {stream} is not on {self._context.instance} in epoch {epoch}")
        return placed

    async def _release(self, over: Callable[[str], bool]) -> None:
        """Give back exports that nobody will read any more."""
        gone = [ref for stream, ref in self._leases if over(stream)]
        self._leases = [(stream, ref) for stream, ref in self._leases if not over(stream)][-MAX_ANSWERS:]
        for ref in gone:
            await self._context.tensors.release_anywhere(ref)

    # --- blocks ------------------------------------------------------------------------------------------------------

    async def _prepare(self, message: PrepareBlocks) -> BlocksReady:
        stage, blocks = self._stage(message.pipeline), self._checked(message.blocks)
        async with self._blocks:
            self._pieces = None
            begin = time.perf_counter()
            self._pieces = await asyncio.to_thread(stage.prepare, blocks)
            took_ms = (time.perf_counter() - begin) * 1e3
        return BlocksReady(instance=message.instance, pipeline=message.pipeline, move=message.move, load_ms=took_ms)

    async def _cut_over(self, message: CutOver) -> BlocksCut:
        stage, blocks, place = self._stage(message.pipeline), self._checked(message.blocks), self._runtime.place
        if message.stage >= message.stages:
            raise MoveError(f"there is no stage {message.stage} of {message.stages}")
        async with self._blocks:
            sequencer = self._sequencer()
            wanted, now = (message.term, message.generation), (sequencer.term, sequencer.generation)
            if wanted <= now:
                raise MoveError(
                    f"generation {message.generation} of term {message.term} is over: it is {now[1]} of {now[0]}"
                )
            pieces = (
                self._pieces if self._pieces is not None and self._pieces.blocks == blocks else stage.none_of(blocks)
            )
            try:
                missing = await self._device.call(Rank.STAGE, lambda: stage.set_blocks(pieces))
            except StageError:
                raise
            except Exception as error:  # half of it is done: a process that starts anew knows what it has
                self._context.fail(f"blocks could not be changed: {one_line(error)}")
                raise
            self._pieces = None
            self._sequencer().begin(*wanted)
            moved, place.stage, place.stages = place.stage != message.stage, message.stage, message.stages
            if moved:
                await self._resubscribe()
        await self._release(lambda _: True)
        log.info("stage %d of %d is blocks %d…%d now", place.stage, place.stages, blocks.start, blocks.stop - 1)
        return BlocksCut(
            instance=message.instance,
            pipeline=message.pipeline,
            move=message.move,
            generation=message.generation,
            missing=missing,
        )

    def _stage(self, pipeline: str) -> Stage:
        role = self._runtime.stage
        if role is None or pipeline != self._runtime.place.pipeline:
            raise MoveError(f"{self._context.instance} has no stage of pipeline {pipeline}")
        return role.stage

    def _checked(self, blocks: BlockRange) -> range:
        if blocks.last >= self._runtime.spec.layers:
            raise MoveError(
                f"{self._runtime.spec.name} has blocks 0…{self._runtime.spec.layers - 1}, not {blocks.last}"
            )
        return blocks.blocks


def _aside(holder: Any, stream: str, suspended: bool) -> int:
    """Suspend or resume in a stage or in caches; bytes on the host."""
    if suspended:
        return holder.suspend(stream)
    holder.resume(stream)
    return 0


def _about(message: ExportState | ImportState | SuspendStream) -> dict[str, Any]:
    return {"instance": message.instance, "stream": message.stream, "epoch": message.epoch, "move": message.move}


def _failed(message: Move, error: str) -> Moved:
    if isinstance(message, PrepareBlocks):
        return BlocksReady(instance=message.instance, pipeline=message.pipeline, move=message.move, error=error)
    if isinstance(message, CutOver):
        return BlocksCut(
            instance=message.instance,
            pipeline=message.pipeline,
            move=message.move,
            generation=message.generation,
            error=error,
        )
    if isinstance(message, ExportState):
        return StateExported(**_about(message), error=error)
    if isinstance(message, ImportState):
        return StateImported(**_about(message), error=error)
    return StreamSuspended(**_about(message), suspended=not message.suspended, error=error)


def _not_before(gate: OrderGate, newest: int) -> OrderGate:
    """The gate, for which chunks up to ``newest`` have passed."""
    return gate if gate.newest >= newest else OrderGate(newest)
