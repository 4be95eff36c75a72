"""Names of spans, attributes and metrics. The only place that spells them."""

from __future__ import annotations

# Span attributes.
STREAM = "rheocast.stream.id"
CHUNK = "rheocast.chunk"
EPOCH = "rheocast.epoch"
QUEUE_MS = "rheocast.queue_ms"
COMPUTE_MS = "rheocast.compute_ms"
HOP = "rheocast.hop"

# Spans.
CHUNK_SPAN = "chunk"

# Hops, which are span names: "hop encode", …
INGEST = "ingest"
ENCODE = "encode"
MOTION = "motion"
SCHEDULE = "schedule"
STAGE = "stage"
DECODE = "decode"
EGRESS = "egress"

# Metrics.
HOP_QUEUE = "rheocast.hop.queue"  # histogram, ms
HOP_COMPUTE = "rheocast.hop.compute"  # histogram, ms
FRAMES = "rheocast.frames"  # counter, by verdict
LATENCY = "rheocast.latency"  # histogram, ms: emitted − captured
BUS_PUBLISHED = "rheocast.bus.published"
BUS_RECEIVED = "rheocast.bus.received"
BUS_DROPPED = "rheocast.bus.dropped"
BUS_BAD = "rheocast.bus.bad"
BUS_HANDLER_ERRORS = "rheocast.bus.handler_errors"
TENSORS_LEASED = "rheocast.tensors.leased"
TENSORS_BYTES = "rheocast.tensors.bytes"
TENSORS_EXPIRED = "rheocast.tensors.expired"
BATCH_SIZE = "rheocast.batch.size"


def hop_span_name(hop: str) -> str:
    """The span name of a hop."""
    return f"hop {hop}"
