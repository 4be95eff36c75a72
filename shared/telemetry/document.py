"""Writes the table of all metrics: ``python -m shared.telemetry.document docs/metrics.md``. A test fails on drift."""

from __future__ import annotations

import sys
from pathlib import Path

from shared.telemetry.names import METRICS

HEAD = """# Metrics

Every service answers `/metrics` on its health port (Prometheus' text; OpenMetrics with exemplars for who accepts it). A
histogram's exemplars carry the `trace_id` of the chunk. `process_*` come beside these. Generated from
`shared/telemetry/names.py`: `python -m shared.telemetry.document docs/metrics.md`.

The port is `RHEOCAST_HEALTH_PORT`: 8080 in compose, and under `rheocast up` a free one, which the first line of the service's
log names (`rheocast-*/logs/` in the folder for temporary files).

| metric | type | labels | meaning |
| --- | --- | --- | --- |
"""


def document() -> str:
    """The whole page."""
    rows: list[str] = []
    for name, declared in METRICS.items():
        kind = "histogram" if declared.buckets else "counter" if declared.counter else "gauge"
        labels = ", ".join(f"`{label}`" for label in declared.labels) or "–"
        rows.append(f"| `{name}` | {kind} | {labels} | {declared.help} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document(), encoding="utf-8")
