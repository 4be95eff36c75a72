"""One running system with tokens, asked as a platform asks: receipts, events, figures, and whatever the schema allows."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from shared.access import Role, add_token, new_token
from tests.e2e.conftest import Rheocast, processes_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

SPEC = {
    "source": {"kind": "pattern"},
    "prompt": "a pencil drawing",
    "width": 96,
    "height": 64,
    "fps": 8,
    "steps": 1,
    "deadline_ms": 2000,
}


@dataclass
class Platform:
    """A system's address and a token of each role."""

    url: str
    tokens: dict[str, str]
    media: Path

    def client(self, role: str = "operator") -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=40, headers={"Authorization": f"Bearer {self.tokens[role]}"})


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    folder = tmp_path_factory.mktemp("platform")
    media, path, tokens = folder / "media", folder / "tokens.json", dict[str, str]()
    media.mkdir()
    for role in Role:
        tokens[role.value], entry = new_token(role.value, role, "acme")
        add_token(path, entry)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rheocast = Rheocast(folder)
    process = rheocast.start(
        "up",
        "--port",
        str(port),
        "--media",
        media,
        "--tokens",
        path,
        env={"RHEOCAST_REQUESTS_PER_S": "2000", "RHEOCAST_UNKNOWN_TOKENS_BURST": "2000"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "Rheocast is up" in line, line
    made = Platform(f"http://127.0.0.1:{port}", tokens, media)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            httpx.get(f"{made.url}/healthz").raise_for_status()
            break
        except httpx.HTTPError:
            time.sleep(0.1)
    yield made
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    assert processes_of(rheocast.run_id) == []


def applied(api: httpx.Client, stream: str, command: str) -> dict[str, Any]:
    """The receipt once the command is in force."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        receipt = api.get(f"/v1/streams/{stream}/receipts/{command}").json()
        if receipt.get("state") == "applied":
            return receipt
        time.sleep(0.1)
    raise AssertionError(receipt)


def events_of(api: httpx.Client, stream: str, after: str, until: str) -> list[tuple[str, str]]:
    """(id, kind) of a stream's events after an id, to the first of kind ``until``."""
    found: list[tuple[str, str]] = []
    headers = {"Last-Event-ID": after}
    with api.stream("GET", f"/v1/streams/{stream}/events", headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        number = kind = ""
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            number = value if name == "id" else number
            kind = value if name == "event" else kind
            if not line and kind:
                if kind != "stats":
                    found.append((number, kind))
                if kind == until:
                    break
                kind = ""
    return found


def test_changes_are_told_with_their_chunk(platform: Platform) -> None:
    with platform.client() as api:
        created = api.post("/v1/streams", json={"id": "changes", **SPEC})
        assert created.status_code == 201, created.text
        assert created.json()["tenant"] == "acme"
        mix = {"prompts": [{"text": "a pencil drawing", "weight": 1}, {"text": "neon", "weight": 1}]}
        chunk = -1
        for method, path, body in (
            ("POST", "prompt", mix),
            ("POST", "prompt", {"text": "thermal camera", "blend_chunks": 2}),
            ("POST", "reset", None),
            ("PATCH", "", {"steps": 2, "seed": 5}),
            ("PATCH", "", {"fps": 4}),
        ):
            answer = api.request(method, f"/v1/streams/changes/{path}".rstrip("/"), json=body)
            assert answer.status_code == 202, answer.text
            receipt = applied(api, "changes", answer.json()["command"])
            assert receipt["chunk"] > chunk, "each is in force from a later chunk on"
            chunk = receipt["chunk"]
        view = api.get("/v1/streams/changes").json()
        assert (view["prompt"], view["prompts"], view["steps"], view["fps"]) == ("thermal camera", [], 2, 4)
        told = events_of(api, "changes", "0", "applied")
        assert told[-1][1] == "applied"
        rest = events_of(api, "changes", told[-1][0], "applied")
        assert set(told).isdisjoint(rest), "it goes on where the client was"
        refused = api.patch("/v1/streams/changes", json={"steps": 4, "fps": 500})
        assert refused.status_code == 422


def test_figures_and_the_waterfall(platform: Platform) -> None:
    with platform.client("viewer") as api:
        assert api.get("/v1/streams/changes/chunks").status_code == 200
        until = time.monotonic() + 30
        chunks: list[dict[str, Any]] = []
        while time.monotonic() < until and not any(each["closed_ns"] and each["hops"] for each in chunks):
            time.sleep(0.3)
            chunks = api.get("/v1/streams/changes/chunks").json()["chunks"]
        whole = next(each for each in chunks if each["closed_ns"] and each["hops"])
        assert {"encode", "motion", "stage", "decode"} <= {hop["hop"] for hop in whole["hops"]}, whole
        assert whole["captured_ns"] <= whole["published_ns"] < whole["decoded_ns"] < whole["closed_ns"]
        live = api.get("/v1/streams/changes/stats").json()["live"]
        assert live["chunk"] >= 0
        assert live["latency_ms"] > 0
        models = {each["name"]: each["served"] for each in api.get("/v1/models").json()["models"]}
        assert models["rheo-tiny"] is True


def test_a_timeline_restyles_by_itself(platform: Platform) -> None:
    with platform.client() as api:
        entries = [{"at_s": 0, "prompt": "ink"}, {"at_s": 1.0, "prompt": "neon", "blend_chunks": 2}]
        assert api.put("/v1/streams/changes/timeline", json={"entries": entries}).status_code == 200
        assert api.post("/v1/streams/changes/timeline/play").status_code == 200
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if api.get("/v1/streams/changes").json()["prompt"] == "neon":
                break
            time.sleep(0.1)
        assert api.get("/v1/streams/changes").json()["prompt"] == "neon"
        assert api.get("/v1/streams/changes/timeline").json()["error"] == ""


def test_the_last_event_ends_the_stream_of_events(platform: Platform) -> None:
    with platform.client() as api:
        last = events_of(api, "changes", "0", "applied")[-1][0]
        stopped = api.delete("/v1/streams/changes", params={"drain": False}).json()
        told = events_of(api, "changes", last, "stopped")
        assert told[-1][1] == "stopped"
        assert api.get("/v1/streams/changes/events", headers={"Last-Event-ID": told[-1][0]}).status_code == 204
        assert json.dumps(stopped)
        ledger = api.get("/v1/streams/changes/ledger").json()
        assert ledger["balanced"], ledger


class DemoPage:
    """What the public demo's page does: answers ``send_frame`` with settings and a JPEG, and shows the motion JPEG stream."""

    def __init__(self, platform: Platform, prompt: str) -> None:
        self.user, self.prompt = str(uuid.uuid4()), prompt
        self.said: list[str] = []
        self.colours: list[float] = []  # of each picture shown: mean distance between its strongest and weakest channel
        self._url, self._token = platform.url, platform.tokens["operator"]
        self._sent = 0

    def address(self) -> str:
        return f"{self._url.replace('http', 'ws', 1)}/api/ws/{self.user}?token={self._token}"

    def play(self, socket: ClientConnection, until: Callable[[], bool], limit_s: float = 40.0) -> None:
        """Send frames as they are asked for, until something is seen."""
        end = time.monotonic() + limit_s
        while not until() and time.monotonic() < end:
            status = json.loads(socket.recv(timeout=20))["status"]
            self.said.append(status)
            if status == "send_frame":
                socket.send(json.dumps({"status": "next_frame", "timestamp": self._sent}))
                socket.send(json.dumps({"prompt": self.prompt, "width": 512, "height": 512, "restart": False}))
                socket.send(self._frame())

    def watch(self) -> None:
        """Show what comes until the server ends it."""
        data = b""
        url = f"{self._url}/api/stream/{self.user}?token={self._token}"
        with httpx.stream("GET", url, timeout=40) as answer:
            assert answer.headers["content-type"].startswith("multipart/x-mixed-replace"), answer.headers
            for more in answer.iter_bytes():
                *parts, data = (data + more).split(b"--frame\r\n")
                for part in parts:
                    if jpeg := part.partition(b"\r\n\r\n")[2]:
                        with Image.open(BytesIO(jpeg)) as picture:
                            self.colours.append(float(np.ptp(np.asarray(picture.convert("RGB")), axis=-1).mean()))

    def _frame(self) -> bytes:
        """A red and a blue half, with a bar that moves."""
        picture = np.zeros((96, 160, 3), np.uint8)
        picture[:, :80], picture[:, 80:] = (220, 40, 30), (30, 60, 220)
        left = self._sent * 5 % 150
        picture[:, left : left + 10] = (240, 220, 40)
        self._sent += 1
        kept = BytesIO()
        Image.fromarray(picture).save(kept, "JPEG")
        return kept.getvalue()


def test_a_page_of_the_public_demo_works_as_it_is(platform: Platform) -> None:
    page = DemoPage(platform, "a pencil drawing")
    with platform.client() as api, connect(page.address()) as socket:
        shown = api.get("/api/settings").json()
        assert {"prompt", "restart"} <= shown["input_params"]["properties"].keys()
        assert shown["info"]["properties"]["input_mode"]["default"] == "image"
        shows = threading.Thread(target=page.watch, daemon=True)
        shows.start()
        page.play(socket, lambda: len(page.colours) > 8 and max(page.colours[-4:]) < 40)
        assert page.said[:3] == ["connected", "wait", "send_frame"]
        assert page.colours, "no picture was shown"
        assert max(page.colours[-4:]) < 40, f"a pencil drawing of red and blue halves has no colours: {page.colours}"
        assert api.get("/api/queue").json() == {"queue_size": 1}
        page.prompt = "thermal camera"
        page.play(socket, lambda: min(page.colours[-4:]) > 80)
        assert min(page.colours[-4:]) > 80, f"the new prompt is on the picture: {page.colours[-40:]}"
    shows.join(20)
    assert not shows.is_alive(), "its pictures end when it leaves"
    stream = f"demo-{uuid.UUID(page.user).hex}"
    with platform.client() as api:
        until = time.monotonic() + 20
        while api.get(f"/v1/streams/{stream}").json()["state"] != "stopped" and time.monotonic() < until:
            time.sleep(0.1)
        assert api.get(f"/v1/streams/{stream}").json()["state"] == "stopped"
        ledger = api.get(f"/v1/streams/{stream}/ledger").json()
        assert ledger["balanced"], ledger
        assert api.get("/api/queue").json() == {"queue_size": 0}
        assert api.get(f"/api/stream/{uuid.uuid4()}").status_code == 404, "no client of that id"
    with pytest.raises(InvalidStatus) as refused, connect(page.address().partition("?")[0]):
        pass
    assert refused.value.response.status_code == 401


ENDLESS = ("streamEvents", "getMjpeg", "getSourceMjpeg", "getSnapshot", "getSourceSnapshot", "demoStream")
"""They go on for as long as pictures and events come, or wait for one: other tests ask for them."""
SPOKEN_SDP = ("whip", "whep", "whipTrickle", "whepTrickle", "whipCreate", "scopeOffer", "scopeTrickle")
"""SDP cannot be made up from a schema: test_webrtc.py sends these good and bad ones."""
CONFIG = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 503]
"""
# 503 is an answer: there is no room now, or nobody to ask. What fits the schema may still be refused for what it means: the
# check that it must not is left out.


def test_nothing_that_the_schema_allows_breaks_it(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    with platform.client() as api:
        begun = api.post(
            "/v1/streams", json={"id": "s-3f9a0c1d2e4b", **SPEC, "deadline_ms": 5000}
        )  # the schema's example id
        assert begun.status_code == 201, begun.text
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{platform.url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {platform.tokens['operator']}", "--checks", "all", "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "3", "--generation-deterministic"]
    command += ["--request-timeout", "35", "--max-time", "35", "--warnings", "off"]
    command += ["--exclude-checks", "positive_data_acceptance"]
    for operation in (*ENDLESS, *SPOKEN_SDP):
        command += ["--exclude-operation-id", operation]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout[-6000:]
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated is not None, done.stdout[-2000:]
    assert int(generated[1]) > 300
    with platform.client() as api:
        for view in api.get("/v1/streams", params={"limit": 500}).json()["streams"]:
            if view["state"] not in ("stopped", "failed"):
                api.delete(f"/v1/streams/{view['id']}", params={"drain": False})
        assert httpx.get(f"{platform.url}/healthz").status_code == 200
