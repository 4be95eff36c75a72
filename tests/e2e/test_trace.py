"""One chunk, one trace: spans of all seven hops, received by a real OTLP/HTTP endpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import Rheocast
from tests.support import clips
from tests.support.otlp import OtlpReceiver

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

HOPS = {"ingest", "encode", "motion", "scheduler", "stage", "decode", "egress"}


def test_every_chunk_has_one_trace_through_all_seven_hops(rheocast: Rheocast, tmp_path: Path) -> None:
    source = clips.make_clip(tmp_path / "in.mp4", frames=21, width=96, height=64)
    with OtlpReceiver() as receiver:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}
        result = rheocast("run", source, "out.mp4", "--prompt", "neon", "--size", "96x64", "--json", env=env)
        assert result.code == 0, result.err
        by_chunk: dict[int, list] = {}
        for span in receiver.spans():
            if "rheocast.chunk" in span.attributes:
                by_chunk.setdefault(int(span.attributes["rheocast.chunk"]), []).append(span)
    assert sorted(by_chunk) == [0, 1, 2, 3, 4]
    for chunk, spans in by_chunk.items():
        assert len({span.trace_id for span in spans}) == 1, f"chunk {chunk} is one trace"
        assert {span.attributes["rheocast.hop"] for span in spans} == HOPS
        for span in spans:
            assert span.attributes["rheocast.stream.id"].startswith("run-")
            assert span.attributes["rheocast.queue_ms"] >= 0
            assert span.attributes["rheocast.compute_ms"] >= 0
    assert len({spans[0].trace_id for spans in by_chunk.values()}) == 5
