"""``/v1/workers`` and ``/v1/pipelines``: what an operator sees, and how a worker is emptied before it is stopped."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from services.gateway.access import needs
from services.gateway.errors import UnknownPartError
from services.gateway.handlers import Desk
from services.gateway.problems import PROBLEM_RESPONSES
from shared.access import Role
from shared.contracts.operating import CutPipeline, DrainWorker, FleetAsked, PipelineView, WorkerView


class WorkerList(BaseModel):
    """All workers that were seen lately."""

    workers: tuple[WorkerView, ...]


class PipelineList(BaseModel):
    """All complete pipelines."""

    pipelines: tuple[PipelineView, ...]


class Cuts(BaseModel):
    """The first DiT block of stage 1, 2, …; empty: where the measured costs say."""

    cuts: tuple[int, ...] = Field(default=(), max_length=64)


def router(desk: Desk) -> APIRouter:
    """The routes, bound to a desk."""
    api = APIRouter(prefix="/v1", tags=["fleet"], responses=PROBLEM_RESPONSES)
    see = act = [Depends(needs(Role.ADMIN))]  # it tells of every tenant's streams

    async def worker_of(name: str, request: FleetAsked | DrainWorker) -> WorkerView:
        told = await desk.fleet(request)
        found = next((worker for worker in told.workers if worker.instance == name), None)
        if found is None:
            raise UnknownPartError(f"there is no worker {name}")
        return found

    async def pipeline_of(name: str, request: FleetAsked | CutPipeline) -> PipelineView:
        told = await desk.fleet(request)
        found = next((pipeline for pipeline in told.pipelines if pipeline.name == name), None)
        if found is None:
            raise UnknownPartError(f"there is no complete pipeline {name}")
        return found

    @api.get("/workers", operation_id="listWorkers", dependencies=see)
    async def workers() -> WorkerList:
        """Every worker: what it hosts, how busy it is, whether it may be stopped."""
        return WorkerList(workers=(await desk.fleet(FleetAsked())).workers)

    @api.get("/workers/{worker}", operation_id="getWorker", dependencies=see)
    async def worker(worker: str) -> WorkerView:
        """One worker. While it is drained, ``stuck`` says which streams could not be moved away yet, and why."""
        return await worker_of(worker, FleetAsked(worker=worker))

    @api.post("/workers/{worker}/drain", status_code=202, operation_id="drainWorker", dependencies=act)
    async def drain(worker: str, force: bool = Query(default=False)) -> WorkerView:
        """Empty a worker: its pipeline takes no stream, those on it are moved as others have room. It may be stopped once its
        state is drained. ``force`` ends what cannot be moved now."""
        return await worker_of(worker, DrainWorker(worker=worker, force=force))

    @api.delete("/workers/{worker}/drain", operation_id="undrainWorker", dependencies=act)
    async def undrain(worker: str) -> WorkerView:
        """The worker may be used again."""
        return await worker_of(worker, DrainWorker(worker=worker, undo=True))

    @api.get("/pipelines", operation_id="listPipelines", dependencies=see)
    async def pipelines() -> PipelineList:
        """Every complete pipeline: its workers, its cuts, how busy its stages are, its streams."""
        return PipelineList(pipelines=(await desk.fleet(FleetAsked())).pipelines)

    @api.get("/pipelines/{pipeline}", operation_id="getPipeline", dependencies=see)
    async def pipeline(pipeline: str) -> PipelineView:
        """One pipeline."""
        return await pipeline_of(pipeline, FleetAsked())

    @api.post("/pipelines/{pipeline}/cuts", operation_id="cutPipeline", dependencies=act)
    async def cut(pipeline: str, body: Cuts) -> PipelineView:
        """Split its DiT blocks here while it streams; answered when that is done. Without cuts: where measurements say."""
        return await pipeline_of(pipeline, CutPipeline(pipeline=pipeline, cuts=body.cuts))

    return api
