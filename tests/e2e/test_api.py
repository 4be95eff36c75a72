"""``rheocast up``: the API over HTTP, on real files."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Rheocast
from tests.support import clips
from tests.support.lab import frames_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


@pytest.fixture
def api(rheocast: Rheocast, tmp_path: Path) -> Iterator[httpx.Client]:
    media = tmp_path / "media"
    media.mkdir()
    clips.make_clip(media / "in.mp4", frames=160, width=96, height=64, fps=16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = rheocast.start("up", "--port", str(port), "--media", media)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=40)
    until = time.monotonic() + 60
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "Rheocast is up" in line, line
    while time.monotonic() < until:
        try:
            client.get("/healthz").raise_for_status()
            break
        except httpx.HTTPError:
            time.sleep(0.1)
    yield client
    client.close()
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 0, err


def wait_for(api: httpx.Client, stream: str, *states: str) -> dict:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        view = api.get(f"/v1/streams/{stream}").json()
        if view["state"] in states:
            return view
        time.sleep(0.1)
    raise AssertionError(f"{stream} never became {states}: {view}")


def test_a_stream_from_create_to_delete(api: httpx.Client, tmp_path: Path) -> None:
    body = {
        "id": "mine",
        "source": {"kind": "file", "path": "in.mp4"},
        "sinks": [{"kind": "mp4", "path": "out.mp4"}],
        "prompt": "a pencil drawing",
        "width": 96,
        "height": 64,
    }
    created = api.post("/v1/streams", json=body)
    assert created.status_code == 201, created.text
    assert created.headers["location"] == "/v1/streams/mine"
    assert created.json()["state"] == "live"
    assert created.json()["promise"]["latency_ms"] > 0
    assert created.json()["tier"]["steps"] == created.json()["steps"]
    assert api.post("/v1/streams", json=body).status_code == 409, "the id is taken"
    assert [s["id"] for s in api.get("/v1/streams").json()["streams"]] == ["mine"]
    patched = api.patch("/v1/streams/mine", json={"prompt": "neon", "steps": 1})
    assert patched.status_code == 202, patched.text
    assert patched.json()["version"] == 2
    shown = api.get("/v1/streams/mine").json()
    assert (shown["prompt"], shown["steps"], shown["frames_per_block"], shown["paused"]) == ("neon", 1, 1, False)
    assert api.post("/v1/streams/mine/pause").status_code == 202
    assert api.get("/v1/streams/mine").json()["paused"] is True
    assert api.post("/v1/streams/mine/resume").status_code == 202
    assert api.get("/v1/streams/mine").json()["paused"] is False
    alone = api.patch("/v1/streams/mine", json={"blend_chunks": 3})
    assert alone.status_code == 422
    assert "give one" in alone.json()["detail"]
    time.sleep(2.0)
    assert api.delete("/v1/streams/mine").status_code == 202
    view = wait_for(api, "mine", "stopped", "failed")
    assert view["state"] == "stopped"
    ledger = view["ledger"]
    closed = ledger["on_time"] + ledger["late"] + ledger["skipped"] + sum(ledger["dropped"].values())
    assert closed == ledger["frames_in"] > 0
    assert len(frames_of(tmp_path / "media" / "out.mp4")) == ledger["on_time"] + ledger["late"]
    total = api.get("/v1/ledger").json()
    assert (total["open"], total["ledger"]["frames_in"]) == (0, ledger["frames_in"])
    capacity = api.get("/v1/capacity", params={"width": 96, "height": 64, "fps": 8}).json()
    assert (capacity["streams"], capacity["tiers"][0]["tier"]["width"]) == (0, 96)
    assert capacity["tiers"][0]["more"] > 0, capacity  # one alone is always let in


def test_bad_requests_are_problems_that_say_what_would_do(api: httpx.Client) -> None:
    good = {"source": {"kind": "file", "path": "in.mp4"}, "prompt": "neon"}
    for change, status, word in (
        ({"prompt": " "}, 422, "prompt"),
        ({"steps": 9}, 422, "steps"),
        ({"source": {"kind": "file", "path": "../etc/passwd"}}, 422, "media folder"),
        ({"source": {"kind": "file", "path": "/etc/passwd"}}, 422, "media folder"),
        ({"source": {"kind": "file", "path": "none.mp4"}}, 409, "none.mp4"),
        ({"model": "sora"}, 409, "sora"),
        ({"width": 100, "height": 64}, 422, "multiple of 16"),
        ({"id": "a.b"}, 422, "id"),
        ({"frames_per_block": 4}, 422, "frames_per_block"),
        ({"steps": 1, "min_steps": 2}, 422, "min_steps"),
    ):
        answer = api.post("/v1/streams", json={**good, **change})
        assert answer.status_code == status, (change, answer.text)
        assert answer.headers["content-type"].startswith("application/problem+json")
        assert word in answer.json()["detail"], answer.text
    assert api.get("/v1/streams/none").status_code == 404
    assert api.get("/v1/capacity", params={"width": 100, "height": 64}).status_code == 422
    assert api.get("/v1/capacity", params={"model": "sora"}).status_code == 409
    assert api.get("/v1/streams", headers={"X-Rheocast-Tenant": "a.b"}).status_code == 200, "reading asks for no tenant"
    assert api.post("/v1/streams", json=good, headers={"X-Rheocast-Tenant": "a.b"}).status_code == 422
    assert api.patch("/v1/streams/none", json={"steps": 1}).status_code == 404
    assert api.post("/v1/streams", content=b"x" * (2 << 20)).status_code == 413
    paths = api.get("/openapi.json").json()["paths"]
    assert set(paths["/v1/streams"]) == {"get", "post"}
    assert set(paths["/v1/streams/{stream}"]) == {"get", "patch", "delete"}
