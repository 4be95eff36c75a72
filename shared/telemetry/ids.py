"""Span ids: random, unless ``propagation.GIVEN`` says which. Imported only where spans are exported (it needs the SDK)."""

from __future__ import annotations

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from shared.telemetry.propagation import GIVEN


class GivenIds(RandomIdGenerator):
    """A root span may be written down by another process than the one that made its ids."""

    def generate_span_id(self) -> int:
        """64 bits."""
        given = GIVEN.get()
        return given.span_id if given is not None else super().generate_span_id()

    def generate_trace_id(self) -> int:
        """128 bits."""
        given = GIVEN.get()
        return given.trace_id if given is not None else super().generate_trace_id()
