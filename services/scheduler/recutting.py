"""Moves the cuts of pipelines while they stream: when measurements say so, when an operator does, or when workers do not fit.

What is decided is decided in :mod:`balancing` and :mod:`placement`; the order of things is :mod:`rebalancing`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from services.scheduler.balancing import Balancer, StageMeter
from services.scheduler.core import PipelineCore
from services.scheduler.desk import StreamDesk
from services.scheduler.fleet import Fleet, Pipeline
from services.scheduler.messenger import RefusedError, all_of
from services.scheduler.moves import new_move
from services.scheduler.placement import best_cuts, check_cuts, cuts_of, ranges_of
from services.scheduler.rebalancing import Phase, Rebalancing, gains, transfers, whole
from services.scheduler.settings import Settings
from shared.bus.port import BusError
from shared.clock import Clock
from shared.contracts.beats import Beat
from shared.contracts.events import BatchDone, EventKind, MotionEstimated
from shared.contracts.moving import BlockRange, CutOver, ExportState, ImportState, PrepareBlocks
from shared.engine.plan.registry import model_spec
from shared.engine.plan.split import split_blocks

log = logging.getLogger(__name__)

LOOK_S = 0.25
POLL_S = 0.004
STEADY_S = 3.0  # beats tell of a cut within one of theirs: workers that do not fit for so long need mending
ASSUMED_PAUSE_S = 0.02  # for one block, until one was moved
Rebuild = Callable[[PipelineCore, str], Awaitable[None]]


@dataclass(slots=True)
class _Watched:
    """One pipeline."""

    state: Rebalancing = field(default_factory=Rebalancing)
    meter: StageMeter = field(default_factory=StageMeter)
    balancer: Balancer = field(default_factory=Balancer)
    block_pause_s: float = ASSUMED_PAUSE_S
    unfit_since: float | None = None
    opening: int = 0  # streams that are being opened on its workers
    task: asyncio.Task[None] | None = None


class Recutter:
    """One per scheduler. ``rebuild`` carries out a pipeline fault."""

    def __init__(self, settings: Settings, clock: Clock, fleet: Fleet, desk: StreamDesk, rebuild: Rebuild) -> None:
        self._settings, self._clock, self._fleet = settings, clock, fleet
        self._desk, self._rebuild = desk, rebuild
        self._watched: dict[str, _Watched] = {}
        self._looked = 0.0
        desk.opening = self.opening

    def of(self, pipeline: str) -> _Watched:
        """What is known of a pipeline."""
        return self._watched.setdefault(pipeline, _Watched())

    # --- from messages -----------------------------------------------------------------------------------------------

    def on_done(self, core: PipelineCore, done: BatchDone) -> None:
        """A batch came back; call it before the core takes it."""
        flight = core.in_flight.get(done.seq) if done.generation == core.generation else None
        if flight is None:
            return
        units = flight.units * len(flight.works)
        last = [work for work in flight.works if work.item is not None and work.item.is_last_step]
        finished = sum(flight.units * work.frames / work.forward_frames for work in last)
        watched = self.of(core.pipeline)
        watched.meter.batch(self._clock.monotonic(), units, done.stage_ms, finished)
        self._desk.admitting.meter.work(core.pipeline, units)

    def on_encoded(self, core: PipelineCore, chunk: MotionEstimated) -> None:
        """A chunk was encoded, whatever becomes of it: the first of a stream has more latent frames than those after."""
        queue = core.streams.get(chunk.stamp.stream)
        took = [timing.compute_ms for timing in chunk.timings if timing.hop == "encode"]
        if queue is None or not took or chunk.latent_frames < 1:
            return
        units = chunk.latent_frames * queue.model.tokens(queue.width, queue.height)
        watched = self.of(core.pipeline)
        watched.meter.encoded += units
        self._desk.admitting.meter.work(core.pipeline, units)
        watched.meter.role("encode", sum(took) / units, self._clock.monotonic())

    def on_beat(self, beat: Beat) -> None:
        """What decode takes: nothing else that comes here tells."""
        for cost in beat.measured if beat.pipeline else ():
            if cost.role == "decode" and cost.units > 0:
                self.of(beat.pipeline).meter.role("decode", cost.ms / cost.units, self._clock.monotonic())

    @asynccontextmanager
    async def opening(self, pipeline: str) -> AsyncIterator[None]:
        """A stream is being opened on a pipeline's workers: not while blocks change hands."""
        watched = self.of(pipeline)
        while watched.state.phase in (Phase.QUIESCING, Phase.MOVING, Phase.CUTTING, Phase.REPAIRING):
            await self._clock.sleep(POLL_S)
        watched.opening += 1
        try:
            yield
        finally:
            watched.opening -= 1

    # --- deciding ----------------------------------------------------------------------------------------------------

    def layers(self, pipeline: Pipeline) -> int:
        """DiT blocks of its model."""
        return model_spec(pipeline.model, self._settings.models_dir).layers

    async def tick(self) -> None:
        """Look at every pipeline, a few times a second."""
        now = self._clock.monotonic()
        if now - self._looked < LOOK_S:
            return
        self._looked = now
        for pipeline in self._fleet.pipelines(usable=False):
            watched = self.of(pipeline.name)
            if pipeline.stages < 2 or watched.state.busy or len(pipeline.blocks) != pipeline.stages:
                continue
            layers = self.layers(pipeline)
            if not whole(pipeline.blocks, layers):
                watched.unfit_since = watched.unfit_since if watched.unfit_since is not None else now
                if now - watched.unfit_since >= STEADY_S:
                    watched.task = asyncio.create_task(self._mend(pipeline, watched, layers))
                continue
            watched.unfit_since = None
            core = self._desk.cores.get(pipeline.name)
            if core is None or not self._settings.rebalance:
                continue
            cuts = cuts_of(pipeline.blocks)
            costs = watched.meter.workers(cuts, layers, pipeline.decode_stage, now)
            degraded = self._desk.tiering.degraded(pipeline.name)
            proposal = watched.balancer.observe(now, costs, cuts, layers, watched.block_pause_s, degraded)
            if proposal is not None:
                wanted = ranges_of(proposal.cuts, layers)
                watched.task = asyncio.create_task(self._automatic(core, pipeline, watched, wanted, proposal.reason))

    async def _automatic(
        self, core: PipelineCore, pipeline: Pipeline, watched: _Watched, wanted: Sequence[range], reason: str
    ) -> None:
        try:
            await self._move(core, pipeline, watched, wanted, reason)
        except RefusedError as error:
            log.warning("pipeline %s keeps its cuts: %s", pipeline.name, error)

    async def cut(self, name: str, cuts: Sequence[int]) -> None:
        """An operator's cuts, or with none those that measurements ask for. Raises RefusedError, CutsError."""
        pipeline = next((each for each in self._fleet.pipelines(usable=False) if each.name == name), None)
        if pipeline is None or len(pipeline.blocks) != pipeline.stages:
            raise RefusedError(f"pipeline {name} is not complete yet", 2.0)
        watched, layers = self.of(name), self.layers(pipeline)
        now, before = self._clock.monotonic(), cuts_of(pipeline.blocks)
        if cuts:
            wanted = check_cuts(cuts, layers, pipeline.stages)
        else:
            costs = watched.meter.workers(before, layers, pipeline.decode_stage, now)
            if costs is None:
                raise RefusedError("too little was measured in the last seconds: give the cuts, or let it stream", 2.0)
            wanted = best_cuts(costs, layers, current=before)
        if wanted == before:
            return
        core = self._desk.core_of(pipeline)
        await self._move(core, pipeline, watched, ranges_of(wanted, layers), "an operator asked for it")

    # --- acting ------------------------------------------------------------------------------------------------------

    async def _move(
        self, core: PipelineCore, pipeline: Pipeline, watched: _Watched, wanted: Sequence[range], reason: str
    ) -> None:
        state, now = watched.state, self._clock.monotonic
        if state.busy:
            raise RefusedError(f"blocks of pipeline {pipeline.name} are changing hands already", 1.0)
        state.begin(pipeline.blocks, wanted, reason, now())
        log.info("pipeline %s: %s", pipeline.name, reason)
        generation, held = core.generation, 0.0
        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(state.limit_s(0.0)):
                    gaining = gains(state.before, state.after)
                    await all_of(*(self._prepare(pipeline, k, blocks, state) for k, blocks in gaining.items()))
                    for record in [r for r in self._desk.records.values() if r.pipeline == pipeline.name]:
                        await stack.enter_async_context(record.changing)  # nor do prompts change, or streams migrate
                    state.prepared(now())
                    while watched.opening:
                        await self._clock.sleep(POLL_S)
                core.holding, held = True, now()
                async with asyncio.timeout(state.limit_s(self._settings.batch_timeout_s)):
                    while core.in_flight:
                        await self._clock.sleep(POLL_S)
                state.quiet(now())
                async with asyncio.timeout(state.limit_s(0.0)):
                    await self._transfer(core, pipeline, state)
                self._unbroken(core, generation)
                state.moved(now())
                await self._cut_all(core, pipeline, state, generation + 1)
                self._unbroken(core, generation)
            before, after = state.before, state.after
            core.cut_over({k: len(after[k]) / len(before[k]) for k in range(len(after)) if before[k] != after[k]})
            self._fleet.cut(pipeline, after, core.generation)
            state.done(now())
            moved = sum(len(each.blocks) for each in transfers(before, after))
            watched.block_pause_s += 0.5 * ((now() - held) / max(1, moved) - watched.block_pause_s)
            watched.balancer.moved(now())
            log.info("pipeline %s: %s", pipeline.name, state.last)
            for stream in list(core.streams):
                await self._desk.tell(stream, EventKind.REBALANCED, reason=f"{reason}: {state.last}")
        except Exception as error:
            why = str(error) or f"it took longer than {state.limit_s(self._settings.batch_timeout_s):g} s"
            watched.balancer.failed(now())
            if state.failed(why, now()):
                await self._rebuilt(core, f"its blocks were changing hands: {why}")
                await self._repair(core, pipeline, watched)
            else:
                await self._give_up(pipeline, state)
            raise RefusedError(state.last) from error
        finally:
            watched.meter.cleared(now())
            core.holding = False
            self._desk.pump()

    async def _prepare(self, pipeline: Pipeline, stage: int, blocks: range, state: Rebalancing) -> None:
        request = PrepareBlocks(
            instance=pipeline.workers[stage], pipeline=pipeline.name, move=new_move(), blocks=BlockRange.of(blocks)
        )
        await self._desk.moves.ask(request, state.limit_s(self._settings.batch_timeout_s))

    async def _transfer(self, core: PipelineCore, pipeline: Pipeline, state: Rebalancing) -> None:
        for piece in transfers(state.before, state.after):
            source, target = pipeline.workers[piece.source], pipeline.workers[piece.target]
            for stream, queue in list(core.streams.items()):
                blocks = BlockRange.of(piece.blocks)
                asked = {"stream": stream, "epoch": queue.epoch, "move": new_move()}
                export = ExportState(instance=source, blocks=blocks, **asked)
                exported = await self._desk.moves.ask(export, state.limit_s(0.0))
                if exported.state is None:
                    raise RefusedError(f"{source} exported nothing of stream {stream}")
                taken = ImportState(instance=target, state=exported.state, **asked)
                await self._desk.moves.ask(taken, state.limit_s(0.0))

    async def _cut_all(self, core: PipelineCore, pipeline: Pipeline, state: Rebalancing, generation: int) -> None:
        move, limit = new_move(), state.limit_s(0.0)
        requests = [
            CutOver(
                instance=worker,
                pipeline=pipeline.name,
                move=move,
                term=core.term,
                generation=generation,
                blocks=BlockRange.of(state.after[stage]),
                stage=stage,
                stages=pipeline.stages,
            )
            for stage, worker in enumerate(pipeline.workers)
        ]
        await all_of(*(self._cut_one(request, limit) for request in requests))

    async def _cut_one(self, request: CutOver, limit: float) -> None:
        await self._desk.moves.ask(request, limit)

    async def _give_up(self, pipeline: Pipeline, state: Rebalancing) -> None:
        """Nothing has changed: who prepared blocks lets them go."""
        for stage in gains(state.before, state.after):
            try:
                request = PrepareBlocks(
                    instance=pipeline.workers[stage],
                    pipeline=pipeline.name,
                    move=new_move(),
                    blocks=BlockRange.of(state.before[stage]),
                )
                await self._desk.moves.ask(request, 2.0)
            except RefusedError as error:
                log.warning("pipeline %s: blocks that were prepared may stay in memory: %s", pipeline.name, error)

    async def _mend(self, pipeline: Pipeline, watched: _Watched, layers: int) -> None:
        """A worker came back with the blocks it was started with: cut as when nothing is known."""
        core = self._desk.core_of(pipeline)
        wanted = split_blocks(layers, pipeline.stages)
        reason = "its workers' blocks did not fit together"
        watched.state.mend(pipeline.blocks, wanted, reason, self._clock.monotonic())
        core.holding = True
        try:
            if core.streams:
                await self._rebuilt(core, reason)
            await self._repair(core, pipeline, watched)
        finally:
            watched.unfit_since = None
            core.holding = False
            self._desk.pump()

    async def _rebuilt(self, core: PipelineCore, reason: str) -> None:
        """The core has decided before anything is told: telling may fail, and the repair goes on."""
        try:
            await self._rebuild(core, reason)
        except BusError as error:
            log.warning("pipeline %s was rebuilt, which could not be told everyone: %s", core.pipeline, error)

    async def _repair(self, core: PipelineCore, pipeline: Pipeline, watched: _Watched) -> None:
        """Cut every worker, with no slots to keep: the generation after is a rebuilt one."""
        state, now = watched.state, self._clock.monotonic
        try:
            await all_of(*(self._prepare(pipeline, k, blocks, state) for k, blocks in enumerate(state.after)))
            await self._cut_all(core, pipeline, state, core.generation + 1)
            core.generation += 1
            self._fleet.cut(pipeline, state.after, core.generation)
            core.fault("its blocks changed hands")  # the next batch empties every slot
            state.done(now())
            log.info("pipeline %s: %s", pipeline.name, state.last)
        except Exception as error:  # whatever it was: a pipeline that stays busy would take no stream ever again
            why = str(error) or type(error).__name__
            state.failed(why, now())
            log.warning("pipeline %s could not be cut: %s", pipeline.name, why)
            failing = (
                self._desk.fail(each, f"pipeline {pipeline.name} is not whole: {why}") for each in list(core.streams)
            )
            await asyncio.gather(*failing, return_exceptions=True)

    def _unbroken(self, core: PipelineCore, generation: int) -> None:
        if core.generation != generation:
            raise RefusedError("the pipeline was rebuilt meanwhile")

    async def close(self) -> None:
        """Stop acting."""
        tasks = [watched.task for watched in self._watched.values() if watched.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
