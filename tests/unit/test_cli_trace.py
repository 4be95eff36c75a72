"""rheocast trace against a real HTTP server that answers as the gateway does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from services.cli.errors import CommandError
from services.cli.trace import ask, drawing, trace
from tests.support.answering import Answering, answering

MS = 1_000_000


def hop(name: str, begin_ms: float, wait_ms: float, duration_ms: float, stage: int = -1) -> dict[str, Any]:
    return {
        "hop": name,
        "begin_ns": round(begin_ms * MS),
        "wait_ms": wait_ms,
        "duration_ms": duration_ms,
        "stage": stage,
    }


def chunk(number: int, verdict: str = "on_time", reason: str = "") -> dict[str, Any]:
    hops = [hop("capture", 1000, 0, 40), hop("encode", 1060, 20, 10), hop("stage", 1080, 10, 20, stage=1)]
    return {
        "chunk": number,
        "trace_id": f"{number:032x}",
        "verdict": verdict,
        "reason": reason,
        "begin_ns": 1000 * MS,
        "end_ns": (1100 * MS) if verdict else 0,
        "hops": hops,
    }


@pytest.fixture
def gateway() -> Iterator[Answering]:
    with answering() as made:
        yield made


def test_a_bar_begins_where_the_one_before_ended_and_is_as_long_as_it_took() -> None:
    head, *lines = drawing(chunk(7), 11 + 22 + 100, (".", "#"))
    assert head == f"chunk 7  on_time  100.0 ms  trace {7:032x}"
    bars = [line[11:111] for line in lines]
    assert bars[0].rstrip() == "#" * 40
    assert bars[1].rstrip() == " " * 40 + "." * 20 + "#" * 10
    assert bars[2].rstrip() == " " * 70 + "." * 10 + "#" * 20
    assert [line[:11].strip() for line in lines] == ["capture", "encode", "stage 1"]
    assert lines[1].endswith("20.0 + 10.0 ms")


def test_what_is_too_short_for_a_column_is_still_seen_and_nothing_leaves_the_line() -> None:
    short = {
        **chunk(1, "dropped", "egress:lost"),
        "hops": [hop("motion", 1050, 0.1, 0.1), hop("egress", 1100, 50, 900)],
    }
    head, *lines = drawing(short, 80, ("░", "█"))
    assert "dropped" in head
    assert "egress:lost" in head
    assert "█" in lines[0]
    assert all(len(line) <= 80 for line in lines)


def test_it_asks_until_enough_chunks_have_their_verdict(gateway: Answering) -> None:
    slept: list[float] = []
    gateway.answers = [
        (200, {"stream": "a", "chunks": [], "jaeger_url": None}),
        (200, {"stream": "a", "chunks": [chunk(1), chunk(2, "")], "jaeger_url": None}),
        (200, {"stream": "a", "chunks": [chunk(1), chunk(2, "late"), chunk(3, "")], "jaeger_url": None}),
    ]
    found = ask(gateway.url, "a/b", 2, 10.0, sleep=slept.append)
    assert [each["chunk"] for each in found["chunks"]] == [1, 2]
    assert slept == [0.5, 0.5]
    assert gateway.asked == [("GET", "/v1/streams/a%2Fb/trace")] * 3


def test_a_stream_without_chunks_is_an_error_that_says_what_to_look_at(gateway: Answering) -> None:
    gateway.answers = [(200, {"stream": "a", "chunks": [chunk(1, "")], "jaeger_url": None})]
    with pytest.raises(CommandError, match="no chunk of a came in 1 s: is it live"):
        ask(gateway.url, "a", 1, 1.0, sleep=lambda _: None)


def test_the_command_draws_or_gives_json_and_names_jaeger(gateway: Answering) -> None:
    gateway.answers = [(200, {"stream": "a", "chunks": [chunk(1), chunk(2)], "jaeger_url": "http://j/search?x"})]
    drawn = CliRunner().invoke(trace, ["a", "--api", gateway.url, "--chunks", "1"], catch_exceptions=False)
    assert drawn.exit_code == 0
    assert drawn.output.startswith("chunk 2")
    assert drawn.output.endswith("in Jaeger: http://j/search?x\n")
    told = CliRunner().invoke(trace, ["a", "--api", gateway.url, "--chunks", "2", "--json"], catch_exceptions=False)
    assert json.loads(told.output) == gateway.answers[0][1]
