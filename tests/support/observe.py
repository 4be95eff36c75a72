"""What deploy/observe/ names: alerts, dashboards, and the metrics and labels in their expressions."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
OBSERVE = ROOT / "deploy" / "observe"
_METRIC = re.compile(r"\b(?:rheocast|process)_[a-z0-9_]+\b")
_SELECTOR = re.compile(r"\b(rheocast_[a-z0-9_]+)\{([^}]*)\}")
_LABEL = re.compile(r"([a-z_]+)\s*(?:=~|!~|!=|=)")


def loaded(name: str) -> Any:
    """A YAML file of deploy/observe/."""
    return yaml.safe_load((OBSERVE / name).read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    """All rules."""
    return [rule for group in loaded("alerts.yaml")["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    """All alerts."""
    return [rule for rule in rules() if "alert" in rule]


def dashboards() -> dict[str, dict[str, Any]]:
    """By file name, without its ending."""
    folder = OBSERVE / "grafana" / "dashboards"
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def expressions() -> list[str]:
    """Every PromQL expression of an alert or a dashboard."""
    found = [rule["expr"] for rule in rules()]
    for board in dashboards().values():
        found += [target["expr"] for panel in board["panels"] for target in panel["targets"] if "expr" in target]
        found += [each["definition"] for each in board["templating"]["list"]]
        found += [each["expr"] for each in board["annotations"]["list"]]
    return found


def metrics_named() -> set[str]:
    """Every metric in them, a histogram by its own name."""
    names = {name for expression in expressions() for name in _METRIC.findall(expression)}
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}


def labels_selected() -> set[tuple[str, str]]:
    """(metric, label) of every selector in them."""
    return {
        (re.sub(r"_(bucket|count|sum)$", "", metric), label)
        for expression in expressions()
        for metric, inside in _SELECTOR.findall(expression)
        for label in _LABEL.findall(re.sub(r'"[^"]*"', '""', inside))
    }


def metrics_pages(run_id: str, accept: str = "text/plain") -> dict[tuple[str, int], str]:
    """What every process of a run serves at /metrics, by its module and process id."""
    pages: dict[tuple[str, int], str] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RHEOCAST_RUN_ID") != run_id or "-m" not in process.cmdline():
                continue
            for port in {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}:
                asked = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
                with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(asked, timeout=5) as answer:
                    pages[process.cmdline()[-1], process.pid] = answer.read().decode()
    return pages
