"""What may happen to a stream, in one word."""

from __future__ import annotations

from enum import StrEnum


class EventKind(StrEnum):
    """What ``rheo.stream.<id>.event`` may tell."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    APPLIED = "applied"
    LIVE = "live"
    TIER_CHANGED = "tier_changed"
    RECOVERING = "recovering"
    RESUMED = "resumed"
    WARNING = "warning"
    MIGRATED = "migrated"  # from this chunk on another pipeline makes it
    REBALANCED = "rebalanced"  # its pipeline's DiT blocks changed hands
    LISTENING = "listening"  # ingest waits for a push; ``reason`` is the address
    SOURCE_LOST = "source_lost"  # it gives nothing; it is opened again
    SOURCE_BACK = "source_back"
    STOPPED = "stopped"
    FAILED = "failed"
