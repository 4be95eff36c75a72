"""The metrics' page: what it shows, what it refuses, and that a broken reader costs nobody else anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from services.egress.ledger import verdicts_of
from shared.contracts.events import LedgerTotals
from shared.telemetry import names
from shared.telemetry.document import document
from shared.telemetry.metrics import Metrics

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def values(page: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse(page.decode())
        for sample in family.samples
    }


def test_what_is_counted_is_read_when_the_page_is() -> None:
    metrics, counts = Metrics("egress", "egress-0"), {"old_epoch": 1}
    metrics.counts(names.INCIDENTS, "incident", lambda: counts)
    counts["old_epoch"] = 7
    page, content_type = metrics.exposition()
    found = values(page)
    assert content_type.startswith("text/plain")
    assert found[names.INCIDENTS, frozenset({("incident", "old_epoch")})] == 7
    assert found[names.SERVICE_INFO, frozenset({("service", "egress"), ("instance", "egress-0")})] == 1


def test_a_slow_frame_leads_to_its_trace() -> None:
    metrics = Metrics("egress", "egress-0")
    latency = metrics.histogram(names.FRAME_LATENCY)
    latency.record(0.12)
    latency.record(0.55, TRACE)
    page, content_type = metrics.exposition(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    samples = [s for family in parse_openmetrics(page.decode()) for s in family.samples]
    exemplars = [(s.labels["le"], s.exemplar) for s in samples if s.exemplar is not None]
    assert [(le, exemplar.labels["trace_id"], exemplar.value) for le, exemplar in exemplars] == [
        ("0.6", "0af7651916cd43dd8448eb211c80319c", 0.55)
    ]
    assert next(s.value for s in samples if s.name == f"{names.FRAME_LATENCY}_count") == 2


def test_a_reader_that_raises_costs_its_own_metric_only() -> None:
    metrics = Metrics("egress", "egress-0")

    def broken() -> float:
        raise RuntimeError("the device is gone")

    metrics.value(names.TENSOR_LEASES, broken)
    metrics.value(names.TENSOR_BYTES, lambda: 4096)
    found = values(metrics.exposition()[0])
    assert (names.TENSOR_LEASES, frozenset()) not in found
    assert found[names.TENSOR_BYTES, frozenset()] == 4096
    assert found[names.METRICS_FAILED, frozenset()] == 1


def test_an_undeclared_metric_is_refused() -> None:
    metrics = Metrics("egress", "egress-0")
    with pytest.raises(LookupError, match="not declared"):
        metrics.value("rheocast_made_up", lambda: 1)
    with pytest.raises(LookupError, match="not declared"):
        metrics.histogram(names.TENSOR_LEASES)


def test_names_follow_the_conventions() -> None:
    for name, declared in names.METRICS.items():
        assert name.startswith("rheocast_"), name
        assert name.endswith("_total") == declared.counter, name
        assert not declared.buckets or name.endswith("_seconds"), name
        assert declared.help.endswith("."), name


def test_the_words_of_a_failure_make_no_label() -> None:
    totals = LedgerTotals(
        frames_in=20,
        on_time=5,
        late=1,
        skipped=2,
        dropped={"scheduler:stale": 4, "worker:was restarted; see its log": 8},
    )
    assert verdicts_of(totals) == [
        ({"verdict": "on_time"}, 5),
        ({"verdict": "late"}, 1),
        ({"verdict": "skipped"}, 2),
        ({"verdict": "dropped", "service": "scheduler", "reason": "stale"}, 4),
        ({"verdict": "dropped", "service": "worker", "reason": "failed"}, 8),
    ]


def test_the_document_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
    assert page.read_text(encoding="utf-8") == document(), "run: python -m shared.telemetry.document docs/metrics.md"
