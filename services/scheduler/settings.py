"""The scheduler's settings; the only reader of its environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from services.scheduler.quotas import TenantLimits
from shared.config import ServiceSettings


class Settings(ServiceSettings):
    """``RHEOCAST_…`` variables of the scheduler."""

    lease_ttl_s: float = 3.0
    batch_timeout_s: float = 5.0  # live: a batch that is not done by then is a pipeline fault
    lossless_batch_timeout_s: float = 60.0
    beat_timeout_s: float = 1.5
    recover_s: float = 30.0  # how long a live stream may wait for a pipeline after its own was lost
    answer_timeout_s: float = 20.0  # how long a service may take to answer an assignment
    max_batch: int = 8  # items in one forward
    rebalance: bool = True  # move DiT blocks between the workers of a pipeline when the measured times ask for it
    migrate_timeout_s: float = 15.0  # what a stream has under way must be done by then, or it stays where it is
    max_streams: int = 16  # per pipeline
    admission: bool = True  # False: whoever asks is let in, up to max_streams, to measure what holds
    target_load: float = Field(default=0.85, gt=0.0, le=1.0)  # streams are let in up to this predicted load
    unmeasured_streams: int = Field(default=4, ge=1)  # … and so many per pipeline while nobody knows what they cost
    tenant_default: TenantLimits = TenantLimits()  # {"max_streams": 0, "max_share": 1.0}; 0: any number
    tenants: dict[str, TenantLimits] = Field(default_factory=dict[str, TenantLimits])  # by name, as JSON
    suspend_after_s: float = 10.0  # a stream paused for so long goes to host memory; below 0: never
    batch_log: Path | None = None  # every batch as a JSON line
