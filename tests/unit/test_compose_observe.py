"""The observe profile's files name what compose starts."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.support.compose import COMPOSE, ROOT, WAYS, module_of, ours, services

BASE = services(COMPOSE)
FOLDER = ROOT / "deploy/observe"


def loaded(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def test_prometheus_scrapes_every_service_of_a_host_at_its_health_port() -> None:
    found = {
        name: lookup["port"]
        for job in loaded("prometheus.yaml")["scrape_configs"]
        for lookup in job.get("dns_sd_configs", ())
        for name in lookup["names"]
    }
    for way in ("compose", "two-gpus", "four-gpus"):
        for name, service in ours(services(*WAYS[way])).items():
            assert str(found[name]) == service["environment"]["RHEOCAST_HEALTH_PORT"], module_of(service)


def test_it_keeps_exemplars_and_reads_the_rules_that_are_mounted() -> None:
    prometheus = BASE["prometheus"]
    assert "--enable-feature=exemplar-storage" in prometheus["command"]
    mounted = {volume.split(":")[1] for volume in prometheus["volumes"]}
    assert {f"/etc/prometheus/{name}" for name in loaded("prometheus.yaml")["rule_files"]} <= mounted


def test_the_collector_listens_where_services_are_told_to_send_and_hands_on_to_jaeger() -> None:
    told = re.search(r"http://(\S+):(\d+) sends", (ROOT / ".env.example").read_text())
    assert told is not None
    assert told.group(1) in BASE
    config = loaded("collector.yaml")
    assert config["receivers"]["otlp"]["protocols"]["http"]["endpoint"].endswith(f":{told.group(2)}")
    assert config["exporters"]["otlp/jaeger"]["endpoint"].split(":")[0] in BASE


def test_grafana_finds_its_sources_and_its_dashboards() -> None:
    sources = loaded("grafana/provisioning/datasources/rheocast.yaml")["datasources"]
    for url in (source["url"] for source in sources):
        host, port = re.fullmatch(r"http://([a-z]+):(\d+)", url).groups()  # type: ignore[union-attr]
        assert any(published.endswith(f":{port}") for published in BASE[host]["ports"])
    mounted = {volume.split(":")[1] for volume in BASE["grafana"]["volumes"]}
    for provider in loaded("grafana/provisioning/dashboards/rheocast.yaml")["providers"]:
        assert provider["options"]["path"] in mounted
