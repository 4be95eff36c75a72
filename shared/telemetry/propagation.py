"""W3C trace context in and out of message headers and chunk stamps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar, Token

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

TRACEPARENT = "traceparent"
GIVEN: ContextVar[SpanContext | None] = ContextVar("given", default=None)
"""The ids that the next root span takes: whoever ends a chunk writes down the root that ingest gave it."""

_FORM = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def traceparent_of(context: SpanContext) -> str:
    """The W3C form of a span, "" when it is not valid."""
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def span_context_of(traceparent: str) -> SpanContext | None:
    """The remote span that ``traceparent`` names; None when it is empty or malformed."""
    match = _FORM.fullmatch(traceparent)
    if match is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in match.groups())
    context = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
    return context if context.is_valid else None


def is_sampled(traceparent: str) -> bool:
    """Whether every service writes down its spans of this trace."""
    return traceparent.endswith(("1", "3", "5", "7", "9", "b", "d", "f")) and span_context_of(traceparent) is not None


def as_sampled(traceparent: str) -> str:
    """The same parent, in the share; "" stays ""."""
    return f"{traceparent[:-2]}01" if traceparent else ""


def context_of(traceparent: str) -> Context | None:
    """A context whose current span is the one ``traceparent`` names; None when there is none."""
    span = span_context_of(traceparent)
    return None if span is None else trace.set_span_in_context(NonRecordingSpan(span), Context())


def inject(headers: Mapping[str, str] | None = None) -> dict[str, str] | None:
    """``headers`` with the current trace context added; None when there is nothing to send."""
    current = trace.get_current_span().get_span_context()
    if not current.is_valid or (headers is not None and TRACEPARENT in headers):
        return dict(headers) if headers else None
    return {**(headers or {}), TRACEPARENT: traceparent_of(current)}


def attach(headers: Mapping[str, str]) -> Token[Context] | None:
    """Make the sender's trace context current. Give the result to ``detach``."""
    traceparent = headers.get(TRACEPARENT)
    context = context_of(traceparent) if traceparent else None
    return None if context is None else otel_context.attach(context)


def detach(token: Token[Context] | None) -> None:
    """Undo ``attach``."""
    if token is not None:
        otel_context.detach(token)
