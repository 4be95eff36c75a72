"""deploy/observe/: the tools accept it, and it speaks of what there is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from shared.contracts.timing import Verdict
from shared.telemetry import names
from tests.support.observe import (
    OBSERVE,
    ROOT,
    alerts,
    dashboards,
    expressions,
    labels_selected,
    loaded,
    metrics_named,
    rules,
)

RUNBOOK = ROOT / "docs" / "runbook.md"
TARGET_LABELS = {"job", "instance"}
PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
@pytest.mark.parametrize(
    "check", ["check config prometheus.yaml", "check rules alerts.yaml", "test rules alerts.test.yaml"]
)
def test_promtool_accepts_it(check: str) -> None:
    done = subprocess.run([PROMTOOL or "", *check.split()], cwd=OBSERVE, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_section_and_every_section_its_alert() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    sections = dict(zip(*[iter(re.split(r"^## (\w+)$", text, flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert set(sections) == {alert["alert"] for alert in alerts()}
    for name, section in sections.items():
        assert [word for word in ("**Means.**", "**Look at.**", "**Do.**") if word not in section] == [], name
    for link in re.findall(r"\]\(#(\w+)\)", text):
        assert link in {name.lower() for name in sections}, f"#{link} leads nowhere"
    for alert in alerts():
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"]


def test_every_metric_and_label_that_is_named_is_declared() -> None:
    named = metrics_named()
    assert len(expressions()) > 50
    assert {name for name in named if name.startswith("rheocast_")} <= set(names.METRICS)
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for text in expressions() for name in re.findall(r"rheocast:[a-z0-9_:]+", text)}
    assert used <= recorded
    for metric, label in labels_selected():
        assert label in {*names.METRICS[metric].labels, *TARGET_LABELS}, f"{metric} has no label {label}"


def test_every_declared_metric_is_on_a_dashboard_or_in_an_alert() -> None:
    assert set(names.METRICS) - metrics_named() == set()


def test_dashboards_are_whole() -> None:
    boards = dashboards()
    assert set(boards) == {"fleet", "pipeline", "stream"}
    sources = {each["uid"] for each in loaded("grafana/provisioning/datasources/rheocast.yaml")["datasources"]}
    assert sources == {"prometheus", "jaeger"}
    assert len({board["uid"] for board in boards.values()}) == 3
    for board in boards.values():
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        seen: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            assert panel["title"]
            assert {target["datasource"]["uid"] for target in panel["targets"]} <= sources
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert at["x"] + at["w"] <= 24
            assert not cells & seen, f"{panel['title']} lies on another panel"
            seen |= cells
    (provider,) = loaded("grafana/provisioning/dashboards/rheocast.yaml")["providers"]
    assert provider["options"]["path"] in (ROOT / "compose.yaml").read_text(encoding="utf-8")


def test_a_scheduler_that_stands_by_is_not_shown_as_not_ready() -> None:
    (panel,) = (each for each in dashboards()["fleet"]["panels"] if each["title"] == "Not ready")
    assert [target["expr"] for target in panel["targets"]] == [
        'count(rheocast_service_ready{job!="scheduler"} == 0) or vector(0)'
    ]


def test_the_collector_keeps_every_bad_chunk() -> None:
    collector = loaded("collector.yaml")
    parts = {kind: set(collector[kind]) for kind in ("receivers", "processors", "exporters")}
    for pipeline in collector["service"]["pipelines"].values():
        for kind, known in parts.items():
            assert set(pipeline.get(kind, [])) <= known
    sampling = collector["processors"]["tail_sampling"]
    assert "tail_sampling" in collector["service"]["pipelines"]["traces"]["processors"]
    policies = {each["type"]: each for each in sampling["policies"] if each["name"] != "streams"}
    bad = policies["string_attribute"]["string_attribute"]
    assert bad["key"] == names.VERDICT
    assert set(bad["values"]) == {verdict.value for verdict in Verdict} - {Verdict.ON_TIME, Verdict.SKIPPED}
    assert policies["status_code"]["status_code"]["status_codes"] == ["ERROR"]
    streams = next(each for each in sampling["policies"] if each["name"] == "streams")["string_attribute"]
    assert (streams["key"], set(streams["values"])) == (names.STREAM_SPAN, {"start", "whole"})
    assert collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"].endswith(":4318")


def test_prometheus_scrapes_every_service_of_compose_where_it_listens() -> None:
    composed: dict[str, str] = {}
    for path in (ROOT / "compose.yaml", *sorted((ROOT / "deploy" / "compose").glob("*.yaml"))):
        services = yaml.safe_load(path.read_text(encoding="utf-8"))["services"]
        for name, service in services.items():
            command = [str(word) for word in service.get("command") or []]
            if any(word.startswith("services.") for word in command):
                composed[name] = str(service["environment"]["RHEOCAST_HEALTH_PORT"])
    scraped = {
        name: str(found["port"])
        for job in loaded("prometheus.yaml")["scrape_configs"]
        for found in job["dns_sd_configs"]
        for name in found["names"]
    }
    assert {"ingest", "worker", "egress"} <= set(composed)
    assert scraped == composed
    assert Path(OBSERVE, *loaded("prometheus.yaml")["rule_files"]).is_file()
