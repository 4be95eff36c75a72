"""One chunk, one trace: spans of all seven hops, received by a real OTLP/HTTP endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Rheocast
from tests.support import clips
from tests.support.otlp import attributes, otlp_receiver

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

HOPS = {"ingest", "encode", "motion", "scheduler", "stage", "decode", "egress"}


def test_every_chunk_has_one_trace_through_all_seven_hops(rheocast: Rheocast, tmp_path: Path) -> None:
    source = clips.make_clip(tmp_path / "in.mp4", frames=21, width=96, height=64)
    with otlp_receiver() as (endpoint, receiver):
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        result = rheocast("run", source, "out.mp4", "--prompt", "neon", "--size", "96x64", "--json", env=env)
        assert result.code == 0, result.err
        by_chunk: dict[int, list[tuple[bytes, dict[str, Any]]]] = {}
        for span in receiver.spans:
            values = attributes(span)
            if "rheocast.chunk" in values:
                by_chunk.setdefault(int(values["rheocast.chunk"]), []).append((span.trace_id, values))
    assert sorted(by_chunk) == [0, 1, 2, 3, 4]
    for chunk, spans in by_chunk.items():
        assert len({trace for trace, _ in spans}) == 1, f"chunk {chunk} is one trace"
        hops = {values["rheocast.hop"] for _, values in spans if "rheocast.hop" in values}
        assert hops == HOPS
        for _, values in spans:
            assert values["rheocast.stream.id"].startswith("run-")
            if "rheocast.hop" in values:
                assert values["rheocast.queue_ms"] >= 0
                assert values["rheocast.compute_ms"] >= 0
    assert len({spans[0][0] for spans in by_chunk.values()}) == 5
