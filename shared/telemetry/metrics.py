"""Prometheus metrics of one process, served by its health server at ``/metrics``.

What is counted anyway is read when somebody asks (:meth:`Metrics.read`): it costs the hot path nothing. Only durations are
recorded as they happen (:meth:`Metrics.histogram`); with a trace id they leave an exemplar that leads from a slow bucket to
that very chunk's trace. Names and help texts stand in ``names.py``, in base units, as Prometheus' conventions have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector

from shared.telemetry import names
from shared.telemetry.propagation import is_sampled, span_context_of

Samples = Iterable[tuple[Mapping[str, str], float]]
Reader = Callable[[], Samples]


class _Read:
    """A collector over readers: a reader that raises costs its own metric only, and is counted."""

    def __init__(self) -> None:
        self.readers: dict[str, Reader] = {}
        self.failed = 0

    def collect(self) -> Iterable[Metric]:
        """All metrics, read now."""
        for name, read in list(self.readers.items()):
            declared = names.METRICS[name]
            kind = CounterMetricFamily if declared.counter else GaugeMetricFamily
            family = kind(
                name.removesuffix("_total") if declared.counter else name, declared.help, labels=declared.labels
            )
            try:
                for labels, value in read():
                    family.add_metric([str(labels.get(label, "")) for label in declared.labels], value)
            except Exception:
                self.failed += 1
                continue
            yield family
        failed = CounterMetricFamily(
            names.METRICS_FAILED.removesuffix("_total"), names.METRICS[names.METRICS_FAILED].help
        )
        failed.add_metric([], self.failed)
        yield failed


class Timing:
    """A histogram of durations, in seconds."""

    def __init__(self, histogram: Histogram, labels: tuple[str, ...]) -> None:
        self._histogram, self._labels = histogram, labels

    def record(self, seconds: float, trace: str = "", **labels: str) -> None:
        """One duration; ``trace`` is the chunk's W3C traceparent, "" for none. One that nobody writes down is no exemplar."""
        into = (
            self._histogram.labels(*(labels.get(label, "") for label in self._labels))
            if self._labels
            else self._histogram
        )
        context = span_context_of(trace) if is_sampled(trace) else None
        into.observe(max(0.0, seconds), {"trace_id": f"{context.trace_id:032x}"} if context is not None else None)


class Metrics:
    """All metrics of this process. Every name must be declared in ``names.METRICS``."""

    def __init__(self, service: str, instance: str) -> None:
        disable_created_metrics()  # a second series per histogram that says only when the process began
        self._registry = CollectorRegistry()
        self._read = _Read()
        self._registry.register(self._read)  # pyright: ignore[reportArgumentType]
        ProcessCollector(registry=self._registry)
        self.read(names.SERVICE_INFO, lambda: [({"service": service, "instance": instance}, 1.0)])

    def read(self, name: str, reader: Reader) -> None:
        """Ask ``reader`` for (labels, value) whenever the metrics are fetched. Raises LookupError for an undeclared name."""
        if name not in names.METRICS:
            raise LookupError(f"metric {name} is not declared in names.METRICS")
        self._read.readers[name] = reader

    def value(self, name: str, reader: Callable[[], float]) -> None:
        """Like :meth:`read`, for one number without labels."""
        self.read(name, lambda: [({}, reader())])

    def counts(self, name: str, label: str, reader: Callable[[], Mapping[str, int]]) -> None:
        """Like :meth:`read`, for a mapping of counts."""
        self.read(name, lambda: [({label: key}, count) for key, count in dict(reader()).items()])

    def histogram(self, name: str) -> Timing:
        """A histogram of durations. Raises LookupError for an undeclared name."""
        declared = names.METRICS.get(name)
        if declared is None or not declared.buckets:
            raise LookupError(f"histogram {name} is not declared in names.METRICS")
        made = Histogram(name, declared.help, declared.labels, registry=self._registry, buckets=declared.buckets)
        return Timing(made, declared.labels)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its content type: OpenMetrics (with exemplars) for who accepts it, else Prometheus' text."""
        encoder: Any
        encoder, content_type = choose_encoder(accept)
        return encoder(self._registry), content_type
