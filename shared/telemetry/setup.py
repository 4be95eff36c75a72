"""Builds the tracer and the meter of a service. Without an endpoint both do nothing and no exporter is imported."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry.metrics import Meter, NoOpMeter
from opentelemetry.trace import NoOpTracer, Tracer

log = logging.getLogger(__name__)

METRICS_EVERY_S = 5.0
SPANS_EVERY_S = 1.0
EXPORT_TIMEOUT_S = 3
MAX_QUEUED_SPANS = 8192


def _nothing() -> None:
    """There is nothing to shut down."""


@dataclass(frozen=True, slots=True)
class Telemetry:
    """``shutdown`` flushes and stops; it may take up to a few seconds when the receiver does not answer."""

    tracer: Tracer
    meter: Meter
    enabled: bool = False
    shutdown: Callable[[], None] = _nothing


def silent() -> Telemetry:
    """Telemetry that goes nowhere."""
    return Telemetry(NoOpTracer(), NoOpMeter("rheocast"))


def setup(service: str, instance: str, otlp_endpoint: str) -> Telemetry:
    """Telemetry of one process, exported over OTLP/HTTP to ``otlp_endpoint`` ("http://host:4318"); "": to nowhere."""
    if not otlp_endpoint:
        return silent()
    # Imported here: a quarter of a second that most starts can do without.
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from shared.telemetry.ids import GivenIds

    base = otlp_endpoint.rstrip("/")
    resource = Resource.create({"service.name": f"rheocast-{service}", "service.instance.id": instance})
    # atexit handlers would flush a second time, after the event loop and maybe the receiver are gone.
    traces = TracerProvider(resource=resource, shutdown_on_exit=False, id_generator=GivenIds())
    traces.add_span_processor(
        BatchSpanProcessor(
            OTLPSpanExporter(f"{base}/v1/traces", timeout=EXPORT_TIMEOUT_S),
            max_queue_size=MAX_QUEUED_SPANS,
            schedule_delay_millis=SPANS_EVERY_S * 1000,
        )
    )
    reader = PeriodicExportingMetricReader(
        OTLPMetricExporter(f"{base}/v1/metrics", timeout=EXPORT_TIMEOUT_S),
        export_interval_millis=METRICS_EVERY_S * 1000,
        export_timeout_millis=EXPORT_TIMEOUT_S * 1000,
    )
    metrics = MeterProvider(metric_readers=[reader], resource=resource, shutdown_on_exit=False)

    def shutdown() -> None:
        for close in (traces.shutdown, metrics.shutdown):
            try:
                close()
            except Exception:
                log.warning("telemetry was not flushed", exc_info=True)

    return Telemetry(traces.get_tracer("rheocast"), metrics.get_meter("rheocast"), True, shutdown)
