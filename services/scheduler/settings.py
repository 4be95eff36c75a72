"""The scheduler's settings; the only reader of its environment."""

from __future__ import annotations

from pathlib import Path

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
    max_streams: int = 16  # per pipeline
    suspend_after_s: float = 10.0  # a stream paused for so long goes to host memory; below 0: never
    batch_log: Path | None = None  # every batch as a JSON line
