"""Names of spans, attributes and metrics. The only place that spells them."""

from __future__ import annotations

from dataclasses import dataclass

# Span attributes. Beside ours: OpenTelemetry's for messaging.
STREAM = "stream.id"
EPOCH = "stream.epoch"
STREAM_SPAN = "stream.span"  # start | whole: the two spans of a stream's own trace
CHUNK = "chunk.id"
VERDICT = "chunk.verdict"
REASON = "chunk.reason"
FRAMES_IN_CHUNK = "chunk.frames"
HOP = "rheocast.hop"
PIPELINE = "rheocast.pipeline"
STAGE_INDEX = "rheocast.stage"
STEP = "rheocast.step"
INSTANCE = "rheocast.instance"  # who did the work; of a stage: the worker
TRANSFER_MS = "rheocast.transfer_ms"
QUEUE_MS = "rheocast.queue_ms"
COMPUTE_MS = "rheocast.compute_ms"
KEPT = "rheocast.kept"  # egress wrote this trace down after the verdict: it was not in the share
MESSAGING_SYSTEM = "messaging.system"
DESTINATION = "messaging.destination.name"
TEMPLATE = "messaging.destination.template"
OPERATION = "messaging.operation.name"
OPERATION_TYPE = "messaging.operation.type"
BATCH_COUNT = "messaging.batch.message_count"

# Spans.
CHUNK_SPAN = "chunk"
STREAM_START = "start stream"
STREAM_WHOLE = "stream"

# Hops.
CAPTURE = "capture"
INGEST = "ingest"
ENCODE = "encode"
MOTION = "motion"
SCHEDULE = "scheduler"
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


@dataclass(frozen=True, slots=True)
class Operation:
    """What a hop is in the words of the messaging conventions. ``destination``: the subject its message came (or went) by."""

    name: str
    kind: str  # send | process
    destination: str


OPERATIONS = {
    INGEST: Operation("ingest", "send", "rheo.stream.{stream}.chunk"),
    ENCODE: Operation("encode", "process", "rheo.stream.{stream}.chunk"),
    MOTION: Operation("estimate", "process", "rheo.stream.{stream}.latents"),
    SCHEDULE: Operation("schedule", "process", "rheo.stream.{stream}.motion"),
    STAGE: Operation("denoise", "process", "rheo.pipeline.{pipeline}.stage.{stage}"),
    DECODE: Operation("decode", "process", "rheo.stream.{stream}.denoised"),
    EGRESS: Operation("show", "process", "rheo.stream.{stream}.frames"),
}


def hop_span_name(hop: str) -> str:
    """The span name of a hop's work: "<operation> <destination>", as the conventions have it."""
    operation = OPERATIONS.get(hop)
    return f"{operation.name} {operation.destination}" if operation is not None else hop


def wait_span_name(hop: str) -> str:
    """The span name of what comes before a hop's work: the way from the hop before, and the queue."""
    return f"wait {hop}"


@dataclass(frozen=True, slots=True)
class Declared:
    """One Prometheus metric. ``buckets`` (seconds) make it a histogram."""

    help: str
    labels: tuple[str, ...] = ()
    counter: bool = False
    buckets: tuple[float, ...] = ()


LATENCY_BUCKETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 4.0, 8.0)
COMPUTE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)

# Every service.
SERVICE_INFO = "rheocast_service_info"
SERVICE_READY = "rheocast_service_ready"
BUS_CONNECTED = "rheocast_bus_connected"
METRICS_FAILED = "rheocast_metrics_failed_total"
BUS_MESSAGES = "rheocast_bus_messages_total"
TENSOR_LEASES = "rheocast_tensor_leases"
TENSOR_BYTES = "rheocast_tensor_bytes"
TENSOR_EXPIRED = "rheocast_tensor_leases_expired_total"
INCIDENTS = "rheocast_incidents_total"
STREAMS = "rheocast_streams"
# Egress.
FRAMES_CLOSED = "rheocast_frames_total"
FRAMES_OPEN = "rheocast_frames_open"
FRAME_LATENCY = "rheocast_frame_latency_seconds"
STREAM_RATE = "rheocast_stream_frames_per_second"
# Scheduler.
LEADING = "rheocast_scheduler_leading"
WORKERS = "rheocast_workers"
QUEUED = "rheocast_pipeline_queued_items"
IN_FLIGHT = "rheocast_pipeline_batches_in_flight"
BATCHES = "rheocast_pipeline_batches_total"
COST_ERROR = "rheocast_cost_model_error_ratio"
# Worker and motion.
BUSY = "rheocast_worker_busy_seconds_total"
DEVICE_QUEUE = "rheocast_worker_queued_jobs"
STATE_BYTES = "rheocast_worker_memory_bytes"
ROLE_COMPUTE = "rheocast_hop_compute_seconds"

METRICS: dict[str, Declared] = {
    SERVICE_INFO: Declared("Always 1: which service and instance this is.", ("service", "instance")),
    SERVICE_READY: Declared("1 while the service is ready for work, as at /readyz."),
    BUS_CONNECTED: Declared("1 while the service is connected to NATS."),
    METRICS_FAILED: Declared("Metrics that could not be read, since the start.", counter=True),
    BUS_MESSAGES: Declared(
        "Messages by subject pattern and what became of them: published, received, dropped (mailbox full), bad (could not "
        "be decoded), handler_errors.",
        ("subject", "result"),
        counter=True,
    ),
    TENSOR_LEASES: Declared("Leased tensor slots of this process."),
    TENSOR_BYTES: Declared("Shared memory that this process holds for tensors."),
    TENSOR_EXPIRED: Declared("Leases that only the time limit ended: a reader died or forgot.", counter=True),
    INCIDENTS: Declared(
        "What should be rare, by its name in this service: old epochs, repetitions, refusals.", ("incident",), True
    ),
    STREAMS: Declared("Streams that this instance has, by state where it knows one.", ("state",)),
    FRAMES_CLOSED: Declared(
        "Input frames by what became of them: on_time, late, skipped, dropped (with who dropped it, and why).",
        ("verdict", "service", "reason"),
        True,
    ),
    FRAMES_OPEN: Declared(
        "Input frames without a verdict yet: frames in minus frames closed, of the streams playing here."
    ),
    FRAME_LATENCY: Declared("From a frame's capture to when it is shown.", buckets=LATENCY_BUCKETS),
    STREAM_RATE: Declared("Frames a second that a stream shows, over its life.", ("stream",)),
    LEADING: Declared("1 while this scheduler leads; one of all must."),
    WORKERS: Declared("Workers by state, as the leading scheduler sees them.", ("state",)),
    QUEUED: Declared("Items that could run now, by pipeline.", ("pipeline",)),
    IN_FLIGHT: Declared("Batches in flight, by pipeline; at most its stages plus one.", ("pipeline",)),
    BATCHES: Declared("Batches dispatched, by pipeline.", ("pipeline",), True),
    COST_ERROR: Declared("The cost model's usual relative error, by pipeline and kind of work.", ("pipeline", "work")),
    BUSY: Declared("Time the device thread spent computing.", counter=True),
    DEVICE_QUEUE: Declared("Jobs that wait for the device thread."),
    STATE_BYTES: Declared("Memory of this worker's device by use.", ("use",)),
    ROLE_COMPUTE: Declared("Compute time per hop and chunk.", ("hop",), buckets=COMPUTE_BUCKETS),
}
"""Every metric that any service exports. docs/metrics.md is made from this table and a test compares."""
