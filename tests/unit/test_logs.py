"""A log line knows whose it is; JSON unless a person looks."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider

from services.worker.core import Rank
from services.worker.device_thread import DeviceThread, Outcome
from shared.bus.delivery import run_handler
from shared.bus.port import Counters, Received
from shared.contracts.commands import LeaveStream
from shared.contracts.events import Beat, ChunkDropped, LatentsDenoised
from shared.logs import JsonFormatter, about
from tests.support.messages import ref, stamp

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
WHOSE = {"stream": "s1", "trace_id": TRACE, "span_id": "b7ad6b7169203331"}
log = logging.getLogger("services.test")


class Lines(logging.Handler):
    """Keeps what is logged as JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter("worker", "worker-1"))
        self.told: list[dict[str, object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(json.loads(self.format(record)))

    def whose(self) -> dict[str, object]:
        """What the newest line is about."""
        return {key: self.told[-1][key] for key in WHOSE if key in self.told[-1]}


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    for name in ("services.test", "shared.bus.delivery"):
        logging.getLogger(name).addHandler(handler)
    yield handler
    for name in ("services.test", "shared.bus.delivery"):
        logging.getLogger(name).removeHandler(handler)


async def test_what_a_handler_logs_is_about_its_message(lines: Lines) -> None:
    dropped = ChunkDropped(stamp=stamp(trace=PARENT), service="worker", reason="stale")
    started: list[asyncio.Task[None]] = []

    async def later() -> None:
        log.warning("later")

    async def handle(received: Received) -> None:
        log.warning("about %s", received.message.stamp.chunk)
        started.append(asyncio.create_task(later()))
        raise ValueError("broken")

    assert not await run_handler(handle, Received("rheo.x", dropped, 0, {}), Counters())
    assert [line["message"] for line in lines.told] == ["about 0", "the handler of rheo.x raised"]
    assert all({key: line[key] for key in WHOSE} == WHOSE for line in lines.told)
    log.warning("after")
    assert lines.whose() == {}, "and nothing else is"
    await started[0]
    assert lines.whose() == WHOSE, "what it started is"


def test_it_is_found_in_whatever_names_a_stream(lines: Lines) -> None:
    block = LatentsDenoised(stamps=(stamp(trace=PARENT),), latents=ref(), block=0, steps=1, prompt_version=1)
    for what in (stamp(trace=PARENT), block):
        with about(what):
            log.warning("x")
        assert lines.whose() == WHOSE
    with about(LeaveStream(instance="i", stream="s1", epoch=1, drain=True)):
        log.warning("x")
    assert lines.whose() == {"stream": "s1"}
    for what in (Beat(service="t", instance="w", incarnation="1"), stamp("", trace="rubbish"), object()):
        with about(what):
            log.warning("x")
        assert lines.whose() == {}


def test_a_span_that_is_under_way_goes_first(lines: Lines) -> None:
    tracer = TracerProvider().get_tracer("t")
    with about(stamp(trace=PARENT)), tracer.start_as_current_span("now") as span:
        log.warning("x")
    context = span.get_span_context()
    assert lines.whose() == {
        "stream": "s1",
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
    }


async def test_a_devices_answer_is_about_what_the_job_was_for(lines: Lines) -> None:
    device, done = DeviceThread(asyncio.get_running_loop(), lambda: None), asyncio.Event()

    def tell(_: Outcome) -> None:
        log.warning("done")
        done.set()

    device.start()
    with about(stamp(trace=PARENT)):
        device.submit(Rank.ENCODE, lambda: None, tell)
    await asyncio.wait_for(done.wait(), 5)
    device.stop()
    assert lines.whose() == WHOSE


CODE = """
import logging
from shared import logs
logs.configure('worker', 'w-1', 'INFO'{})
logging.getLogger('shared.x').info('hé')
"""


def test_json_where_no_terminal_is_and_text_where_one_is() -> None:
    piped = subprocess.run([sys.executable, "-c", CODE.format("")], capture_output=True, check=True)
    told = json.loads(piped.stderr)
    assert (told["message"], told["service"], told["instance"], told["level"]) == ("hé", "worker", "w-1", "INFO")
    assert piped.stdout == b""
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", CODE.format("")], stderr=theirs, check=True)
    os.close(theirs)
    assert os.read(ours, 4096).decode().rstrip().endswith("INFO w-1 shared.x: hé")
    os.close(ours)
    asked = subprocess.run([sys.executable, "-c", CODE.format(", False")], capture_output=True, check=True)
    assert asked.stderr.decode().rstrip().endswith("INFO w-1 shared.x: hé")
