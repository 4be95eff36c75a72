"""From an assignment to the constants that its stream is played by."""

from __future__ import annotations

from services.egress.core import Rules
from services.egress.settings import Settings
from shared.contracts.commands import Mode, TakeStream


def rules_of(take: TakeStream, settings: Settings) -> Rules:
    """The constants a stream is played by."""
    return Rules(
        live=take.spec.mode is Mode.LIVE,
        deadline_ns=take.spec.deadline_ms * 1_000_000,
        lost_after_ns=int(settings.lost_after_s * 1e9),
        reorder_ns=int(settings.reorder_ms * 1e6),
        loss_timeout_ns=int(settings.loss_timeout_s * 1e9),
        stall_ns=int(settings.stall_s * 1e9),
    )
