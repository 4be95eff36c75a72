"""One chunk, one trace: spans of all hops, received by a real OTLP/HTTP endpoint, with no time that nobody accounts for."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

from shared.client import Api
from shared.contracts.commands import Mode, PatternSource
from shared.contracts.events import EventKind
from shared.embedded import free_port
from tests.support import clips
from tests.support.lab import Lab
from tests.support.observe import metrics_pages
from tests.support.otlp import OtlpReceiver, attributes, otlp_receiver

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

HOPS = {"capture", "ingest", "encode", "motion", "scheduler", "stage", "decode", "egress"}
SERVICES = {"ingest", "worker", "motion", "scheduler", "egress"}
GAP_MS = 5.0
STAGES = 2
EXPORTED_S = 1.5  # spans are exported once a second
TRACED_S = 20.0


class Traced:
    """A running system whose spans and waterfalls can be read."""

    def __init__(self, lab: Lab, receiver: OtlpReceiver, http: httpx.AsyncClient) -> None:
        self.lab, self.receiver, self.http = lab, receiver, http

    def traces(self, stream: str) -> dict[int, list[Span]]:
        """By chunk, all spans of its trace, the root first."""
        by_trace: dict[bytes, list[Span]] = defaultdict(list)
        for span in list(self.receiver.spans):
            if attributes(span).get("stream.id") == stream and "chunk.id" in attributes(span):
                by_trace[span.trace_id].append(span)
        return {
            int(attributes(spans[0])["chunk.id"]): sorted(spans, key=lambda span: span.name != "chunk")
            for spans in by_trace.values()
        }

    async def all_of(self, stream: str, chunks: int, steps: int) -> dict[int, list[Span]]:
        """The same, once every service has exported what it has of these chunks."""
        until = time.monotonic() + TRACED_S
        while time.monotonic() < until:
            whole = [spans for spans in self.traces(stream).values() if is_whole(spans, steps)]
            if len(whole) >= chunks:
                # The root has ended, and so has all else of it: who has more sends it now.
                await asyncio.sleep(EXPORTED_S)
                return self.traces(stream)
            await asyncio.sleep(0.2)
        seen = {chunk: sorted(span.name for span in spans) for chunk, spans in self.traces(stream).items()}
        raise AssertionError(seen)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def traced(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Traced]:
    port = free_port()
    with otlp_receiver() as (endpoint, receiver):
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "RHEOCAST_JAEGER_URL": "http://jaeger.test:16686"}
        env["RHEOCAST_REBALANCE"] = "false"  # the way of a chunk is the same all the time
        folder = tmp_path_factory.mktemp("trace")
        async with (
            Lab.start(folder, stages=STAGES, env=env, gateway_port=port) as lab,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http,
        ):
            yield Traced(lab, receiver, http)


def hops(spans: list[Span]) -> set[str]:
    return {attributes(span)["rheocast.hop"] for span in spans if "rheocast.hop" in attributes(span)}


def is_whole(spans: list[Span], steps: int) -> bool:
    """Whether a chunk's root is there, every hop, and every pass of each stage, which are processes of their own."""
    told = [attributes(span) for span in spans if span.name.startswith("denoise")]
    passes = {(each["rheocast.stage"], each["rheocast.step"]) for each in told}
    return spans[0].name == "chunk" and hops(spans) >= HOPS and len(passes) == STAGES * steps


def uncovered_ms(spans: list[Span]) -> float:
    """The longest time of the root (which comes first) in which none of its children is under way."""
    root, at, longest = spans[0], spans[0].start_time_unix_nano, 0
    for span in sorted(spans[1:], key=lambda each: each.start_time_unix_nano):
        longest = max(longest, span.start_time_unix_nano - at)
        at = max(at, span.end_time_unix_nano)
    return max(longest, root.end_time_unix_nano - at) / 1e6


def check_tree(stream: str, chunk: int, spans: list[Span], links: set[bytes]) -> None:
    root, children = spans[0], spans[1:]
    assert [span.name for span in spans].count("chunk") == 1, f"chunk {chunk} has one root"
    assert not root.parent_span_id
    assert {span.parent_span_id for span in children} == {root.span_id}, f"chunk {chunk} is one tree"
    assert {link.trace_id for link in root.links} == links, "the root is linked to the stream's"
    assert uncovered_ms(spans) <= GAP_MS, f"chunk {chunk}: some of its time is nobody's"
    for span in spans:
        told = attributes(span)
        assert told["stream.id"] == stream
        assert root.start_time_unix_nano <= span.start_time_unix_nano + 1000
        assert span.start_time_unix_nano <= span.end_time_unix_nano <= root.end_time_unix_nano + 1000
        if span.kind in (Span.SPAN_KIND_CONSUMER, Span.SPAN_KIND_PRODUCER):
            assert told["messaging.system"] == "nats"
            assert told["messaging.operation.type"] == ("send" if span.kind == Span.SPAN_KIND_PRODUCER else "process")
            assert span.name == f"{told['messaging.operation.name']} {told['messaging.destination.template']}"
            assert told["messaging.destination.name"].startswith(("rheo.stream." + stream, "rheo.pipeline."))


async def test_every_chunk_is_one_tree_without_gaps_whatever_its_block(traced: Traced) -> None:
    """Lossless, two steps over two stages, frame blocks of two chunks: each chunk has its own waits."""
    source = clips.make_clip(traced.lab.folder / "in.mp4", frames=21, width=96, height=64)
    running = await traced.lab.run(source, width=96, height=64, steps=2, frames_per_block=2)
    assert running.last.event is EventKind.STOPPED, running.last.reason
    traces = await traced.all_of(running.stream, 5, steps=2)
    assert sorted(traces) == [0, 1, 2, 3, 4]
    starts = [span for span in traced.receiver.named("start stream") if attributes(span)["stream.id"] == running.stream]
    (whole,) = [span for span in traced.receiver.named("stream") if span.trace_id == starts[0].trace_id]
    assert attributes(whole)["stream.frames.on_time"] == 21
    for chunk, spans in traces.items():
        check_tree(running.stream, chunk, spans, {starts[0].trace_id})
        assert hops(spans) == HOPS
        assert attributes(spans[0])["chunk.verdict"] == "on_time"
        denoised = [attributes(span) for span in spans if span.name.startswith("denoise")]
        assert {(told["rheocast.stage"], told["rheocast.step"]) for told in denoised} == {
            (stage, step) for stage in (0, 1) for step in (0, 1)
        }
        assert all(told["rheocast.instance"] and told["rheocast.pipeline"] for told in denoised)
    assert {service.removeprefix("rheocast-") for service in traced.receiver.service_of.values()} == SERVICES


def figures_of(spans: list[Span]) -> dict[tuple[str, int, int], tuple[int, int, float, float]]:
    """Of each hop's span: (hop, stage, when its work began) → begin, end, transfer, queue."""
    found = {}
    for span in spans[1:]:
        told = attributes(span)
        if not span.name.startswith("wait "):
            begin = span.end_time_unix_nano if told["rheocast.hop"] == "scheduler" else span.start_time_unix_nano
            key = (told["rheocast.hop"], told.get("rheocast.stage", -1), begin)
            found[key] = (begin, span.end_time_unix_nano, told["rheocast.transfer_ms"], told["rheocast.queue_ms"])
    return found


async def test_the_waterfall_shows_the_spans_own_figures_over_the_api_and_in_the_terminal(traced: Traced) -> None:
    live = {"mode": Mode.LIVE, "width": 96, "height": 64, "steps": 1, "fps": 12.0, "deadline_ms": 4000}
    running = await traced.lab.begin(PatternSource(), **live)
    assert running.accepted, running.last.reason
    path = f"/v1/streams/{running.stream}/trace"
    assert (await traced.http.get(path)).json()["stream"] == running.stream
    port = str(traced.http.base_url)
    drawn = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cli", "trace", running.stream, "--api", port, "--chunks", "2", "--wait", "30",
        stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    out = (await drawn.communicate())[0].decode()
    await traced.lab.stop(running)
    told = (await traced.http.get(path)).json()
    async with Api(port) as api:
        assert (await api.trace(running.stream)).model_dump(mode="json") == told
    closed = {each["chunk"]: each for each in told["chunks"] if each["verdict"] in ("on_time", "late")}
    assert closed, told
    traces = await traced.all_of(running.stream, len(closed), steps=1)
    for number, chunk in closed.items():
        spans, root = traces[number], traces[number][0]
        assert chunk["trace_id"] == root.trace_id.hex()
        assert chunk["jaeger_url"] == f"http://jaeger.test:16686/trace/{root.trace_id.hex()}"
        assert chunk["verdict"] == attributes(root)["chunk.verdict"]
        assert chunk["begin_ns"] == root.start_time_unix_nano
        assert abs(chunk["end_ns"] - root.end_time_unix_nano) <= 1000
        figures = figures_of(spans)
        assert len(figures) == len(chunk["hops"])
        for hop in chunk["hops"]:
            begin, end, transfer_ms, queue_ms = figures[hop["hop"], hop["stage"], hop["begin_ns"]]
            assert (hop["transfer_ms"], hop["queue_ms"]) == (transfer_ms, queue_ms)
            assert hop["wait_ms"] == transfer_ms + queue_ms
            assert abs(begin + round(hop["duration_ms"] * 1e6) - end) <= 1000
    assert drawn.returncode == 0
    lines = [line.split() for line in out.splitlines() if line.startswith("chunk ")]
    assert len(lines) == 2
    assert {line[-1] for line in lines} <= {spans[0].trace_id.hex() for spans in traces.values()}
    assert {"encode", "scheduler", "decode", "egress"} <= {line.split()[0] for line in out.splitlines() if line}
    assert "in Jaeger: http://jaeger.test:16686/search?" in out


async def test_a_slow_bucket_leads_to_the_trace_of_a_chunk_in_it(traced: Traced) -> None:
    """After the streams above: exemplars of the latency of frames and of every hop's compute time."""
    openmetrics = "application/openmetrics-text; version=1.0.0"
    pages = await asyncio.to_thread(metrics_pages, traced.lab.system.run_id, openmetrics)
    led: dict[str, set[str]] = defaultdict(set)
    for page in (page for (module, _), page in pages.items() if module != "services.gateway"):
        for family in parse(page):
            for sample in family.samples:
                if sample.exemplar is not None:
                    led[family.name].add(sample.exemplar.labels["trace_id"])
    known = {span.trace_id.hex() for span in traced.receiver.named("chunk")}
    assert set(led) == {"rheocast_frame_latency_seconds", "rheocast_hop_compute_seconds"}
    for name, ids in led.items():
        assert ids <= known, f"{name} leads to a trace that was never written down"
