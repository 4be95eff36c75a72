"""Settings, clocks, logs and the health page: the parts of a service's life that need no broker."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.error
import urllib.request

import pytest
from pydantic import ValidationError

from shared.clock import VirtualClock
from shared.config import ServiceSettings
from shared.health import HealthServer
from shared.lifecycle import one_line
from shared.logs import JsonFormatter


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHEOCAST_NATS_URL", "nats://n:1")
    monkeypatch.setenv("RHEOCAST_RUN_ID", "r1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://o:4318")
    settings = ServiceSettings()
    assert (settings.nats_url, settings.run_id, settings.otlp_endpoint) == ("nats://n:1", "r1", "http://o:4318")
    monkeypatch.setenv("RHEOCAST_OTLP_ENDPOINT", "http://ours:4318")
    assert ServiceSettings().otlp_endpoint == "http://ours:4318"


def test_an_instance_without_a_name_gets_a_unique_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RHEOCAST_INSTANCE", raising=False)
    one, two = ServiceSettings().named("motion"), ServiceSettings().named("motion")
    assert one.instance.startswith("motion-")
    assert one.instance != two.instance
    assert one.named("motion").instance == one.instance


@pytest.mark.parametrize(
    ("name", "value"),
    [("INSTANCE", "a.b"), ("RUN_ID", "a b"), ("LOG_LEVEL", "loud"), ("HEALTH_PORT", "70000"), ("DRAIN_S", "-1")],
)
def test_a_bad_setting_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"RHEOCAST_{name}", value)
    with pytest.raises(ValidationError) as raised:
        ServiceSettings()
    text = one_line(raised.value)
    assert text.startswith(f"RHEOCAST_{name}: ")
    assert "\n" not in text


async def test_a_virtual_clock_wakes_sleepers_in_the_order_of_their_times() -> None:
    clock, woken = VirtualClock(), []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.monotonic()))

    tasks = [asyncio.create_task(sleeper(*each)) for each in (("late", 3.0), ("soon", 1.0), ("later", 5.0))]
    start_ns = clock.now_ns()
    await clock.advance(4.0)
    assert woken == [("soon", 1.0), ("late", 3.0)]
    assert clock.now_ns() - start_ns == 4_000_000_000
    await clock.advance(1.0)
    await asyncio.gather(*tasks)
    assert woken[-1] == ("later", 5.0)


def test_a_json_log_line_is_one_object_with_the_traceback() -> None:
    formatter = JsonFormatter("worker", "worker-1")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        import sys

        record = logging.LogRecord("services.x", logging.ERROR, "f", 1, "it %s", ("broke",), sys.exc_info())
    line = formatter.format(record)
    assert "\n" not in line
    told = json.loads(line)
    assert told["message"] == "it broke"
    assert told["instance"] == "worker-1"
    assert "two\nlines" in told["traceback"]


async def test_the_health_page_tells_alive_from_ready() -> None:
    ready = False
    server = HealthServer(lambda: (ready, {"phase": "starting", "ready": ready}))
    await server.start("127.0.0.1", 0)

    def get(path: str, method: str = "GET") -> tuple[int, dict[str, object]]:
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    assert await asyncio.to_thread(get, "/healthz") == (200, {"phase": "starting", "ready": False})
    assert (await asyncio.to_thread(get, "/readyz"))[0] == 503
    ready = True
    assert await asyncio.to_thread(get, "/readyz?verbose=1") == (200, {"phase": "starting", "ready": True})
    assert (await asyncio.to_thread(get, "/other"))[0] == 404
    assert (await asyncio.to_thread(get, "/healthz", "POST"))[0] == 405
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"\x00" * 20_000)
    await writer.drain()
    await reader.read()
    writer.close()
    assert (await asyncio.to_thread(get, "/healthz"))[0] == 200
    await server.close()
