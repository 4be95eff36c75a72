"""``/v1/capacity`` and ``/v1/ledger``: how many more streams fit, and what became of every frame."""

from __future__ import annotations

import math

from fastapi import APIRouter, Query

from services.gateway.access import Tenant, Viewer
from services.gateway.errors import RefusedError
from services.gateway.handlers import Desk
from services.gateway.problems import PROBLEM_RESPONSES
from shared.contracts.commands import MAX_SIDE
from shared.contracts.tiers import CapacityAsked, CapacityTold, TierCapacity
from shared.contracts.views import TotalLedger


def finite(tier: TierCapacity) -> TierCapacity:
    """A tier of which none fit has no latency: JSON knows no infinity."""
    return tier if math.isfinite(tier.latency_ms) else tier.model_copy(update={"latency_ms": 0.0})


def router(desk: Desk) -> APIRouter:
    """The routes, bound to a desk."""
    api = APIRouter(prefix="/v1", tags=["capacity"], responses=PROBLEM_RESPONSES)

    @api.get("/capacity", operation_id="getCapacity")
    async def capacity(
        _: Viewer,
        tenant: Tenant,
        model: str = Query(default="rheo-tiny", min_length=1, max_length=64),
        width: int | None = Query(default=None, ge=16, le=MAX_SIDE, multiple_of=16),
        height: int | None = Query(default=None, ge=16, le=MAX_SIDE, multiple_of=16),
        fps: float | None = Query(default=None, ge=0.1, le=240),
        steps: int | None = Query(default=None, ge=1, le=4),
        frames_per_block: int | None = Query(default=None, ge=1, le=3),
        deadline_ms: int = Query(default=600, ge=50, le=60_000),
    ) -> CapacityTold:
        """How many more such streams of this tenant would be let in now, and of the tiers below. Decided as a start is."""
        asked = CapacityAsked(
            model=model,
            width=width,
            height=height,
            fps=fps,
            steps=steps,
            frames_per_block=frames_per_block,
            deadline_ms=deadline_ms,
            tenant=tenant,
        )
        told = await desk.capacity(asked)
        if told.error is not None:
            raise RefusedError(told.error, told.retry_after_s, told.refusal)
        return told.model_copy(update={"tiers": tuple(finite(tier) for tier in told.tiers)})

    @api.get("/ledger", operation_id="getLedger")
    async def ledger(caller: Viewer) -> TotalLedger:
        """What became of every frame, over all streams that are listed."""
        return await desk.ledger(caller.may_see)

    return api
