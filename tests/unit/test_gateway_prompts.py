"""Prompts by weight, timelines, models and styles, at the gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from services.gateway.app import Parts, build_api
from services.gateway.settings import Settings
from services.gateway.timeline import Entry, TimelineView, due_entry
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.bus.port import Received
from shared.contracts import subjects
from shared.contracts.commands import StreamPatch, StreamSpec, UpdateStream
from shared.contracts.events import ChunkClosed, EventKind, LedgerTotals, StreamEvent
from shared.session.memory import MemoryStore
from shared.session.state import StreamState


@dataclass
class Desk:
    """Gateways on one bus and store, and a scheduler's answers."""

    bus: MemoryBus
    store: MemoryStore
    media: Path
    patches: list[StreamPatch] = field(default_factory=list[StreamPatch])
    open: list[Parts] = field(default_factory=list[Parts])

    async def gateway(self, name: str) -> httpx.AsyncClient:
        parts = Parts(self.bus, self.store, Settings(media_dir=self.media, answer_timeout_s=2.0, instance=name))
        await parts.start()
        self.open.append(parts)
        return httpx.AsyncClient(transport=httpx.ASGITransport(build_api(parts)), base_url="http://localhost")

    @property
    def prompts(self) -> list[str | None]:
        return [patch.prompt for patch in self.patches]

    async def until(self, done: Callable[[], bool], within_s: float = 5.0) -> None:
        begin = time.monotonic()
        while not done():
            assert time.monotonic() - begin < within_s, self.prompts
            await asyncio.sleep(0.02)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    bus = MemoryBus(MemoryBroker())
    made = Desk(bus, MemoryStore(), tmp_path)
    await made.store.create("a", StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon"}))

    async def answer(received: Received) -> None:
        command: UpdateStream = received.message
        made.patches.append(command.patch)
        kind = EventKind.REFUSED if command.patch.prompt == "bad" else EventKind.ACCEPTED
        told = StreamEvent(stream="a", event=kind, service="scheduler", at_ns=1, command=command.command, reason="no")
        await bus.publish(subjects.stream("a", "event"), told)

    await bus.subscribe(subjects.stream("a", "control"), answer)
    yield made
    for parts in made.open:
        await parts.close()
    await bus.close()


async def test_a_prompt_is_one_text_or_a_mix(desk: Desk) -> None:
    client = await desk.gateway("g0")
    path = "/v1/streams/a/prompt"
    assert (await client.post(path, json={"text": "ink", "blend_chunks": 3})).status_code == 202
    mix = [{"text": "pencil", "weight": 0.7}, {"text": "neon", "weight": 0.3}]
    assert (await client.post(path, json={"prompts": mix})).status_code == 202
    assert desk.patches[0] == StreamPatch(prompt="ink", blend_chunks=3)
    assert [(part.text, part.weight) for part in desk.patches[1].prompts] == [("pencil", 0.7), ("neon", 0.3)]
    for body in ({}, {"text": "a", "prompts": mix}, {"text": " "}, {"prompts": [{"text": "a", "weight": -1}]}):
        assert (await client.post(path, json=body)).status_code == 422, body
    assert (await client.post("/v1/streams/a/reset")).status_code == 202
    assert desk.patches[-1].reset


async def test_a_timeline_plays_in_order_and_ends(desk: Desk) -> None:
    client = await desk.gateway("g0")
    path = "/v1/streams/a/timeline"
    assert (await client.get(path)).status_code == 404
    entries = [
        {"at_s": 0.0, "prompt": "one"},
        {"at_s": 0.15, "prompt": "bad"},
        {"at_chunk": 5, "prompt": "three", "blend_chunks": 2},
    ]
    put = await client.put(path, json={"entries": entries})
    assert put.status_code == 200, put.text
    assert (await client.post(f"{path}/play")).json()["playing"]
    await desk.until(lambda: len(desk.patches) == 2)
    await asyncio.sleep(0.2)
    assert len(desk.patches) == 2, "the third waits for its chunk"
    shown = (await client.get(path)).json()
    assert (shown["next"], "entry 1" in shown["error"]) == (2, True), "what was refused is told, and passed over"
    closed = ChunkClosed(stream="a", epoch=1, closed_chunks=6, through=6, totals=LedgerTotals())
    await desk.bus.publish(subjects.stream("a", "closed"), closed)
    await desk.until(lambda: len(desk.patches) == 3)
    assert desk.patches[2].blend_chunks == 2
    await asyncio.sleep(0.2)
    assert (await client.get(path)).json()["playing"] is False
    again = {"entries": put.json()["entries"], "loop_s": put.json()["loop_s"]}
    assert (await client.put(path, json=again)).status_code == 200, "what GET gives, PUT takes"
    assert (await client.delete(path)).status_code == 204


async def test_a_timeline_loops_until_it_is_stopped(desk: Desk) -> None:
    client = await desk.gateway("g0")
    path = "/v1/streams/a/timeline"
    entries = [{"at_s": 0.0, "prompt": "one"}, {"at_s": 0.2, "prompt": "two"}]
    await client.put(path, json={"entries": entries, "loop_s": 0.5})
    await client.post(f"{path}/play", json={"entry": 1})
    await desk.until(lambda: len(desk.patches) >= 3)
    assert desk.prompts[:3] == ["two", "one", "two"]
    assert (await client.post(f"{path}/stop")).json()["playing"] is False
    await asyncio.sleep(0.1)
    seen = len(desk.patches)
    await asyncio.sleep(0.6)
    assert len(desk.patches) == seen
    assert (await client.post(f"{path}/play", json={"entry": 2})).status_code == 404


async def test_another_gateway_goes_on_with_a_timeline(desk: Desk) -> None:
    client = await desk.gateway("g0")
    path = "/v1/streams/a/timeline"
    entries = [{"at_s": 0.0, "prompt": "one"}, {"at_s": 0.6, "prompt": "two"}]
    await client.put(path, json={"entries": entries})
    await client.post(f"{path}/play")
    await desk.until(lambda: desk.prompts == ["one"])
    await desk.open.pop().close()
    await desk.gateway("g1")
    await desk.until(lambda: len(desk.patches) >= 2)
    assert desk.prompts == ["one", "two"]


async def test_a_timeline_ends_with_its_stream(desk: Desk) -> None:
    client = await desk.gateway("g0")
    path = "/v1/streams/a/timeline"
    await client.put(path, json={"entries": [{"at_s": 0.0, "prompt": "one"}, {"at_s": 0.3, "prompt": "two"}]})
    await client.post(f"{path}/play")
    await desk.until(lambda: desk.prompts == ["one"])
    for state in (StreamState.STOPPING, StreamState.STOPPED):
        await desk.store.move("a", state)
    await asyncio.sleep(0.5)
    assert desk.prompts == ["one"]
    assert (await client.get(path)).json()["playing"] is False
    assert (await client.post(f"{path}/play")).status_code == 409


async def test_timelines_that_cannot_be_are_refused(desk: Desk) -> None:
    client = await desk.gateway("g0")
    one = {"at_s": 1.0, "prompt": "a"}
    for body, word in (
        ({"entries": []}, "entries"),
        ({"entries": [one] * 65}, "64"),
        ({"entries": [{"prompt": "a"}]}, "at_s or at_chunk"),
        ({"entries": [{**one, "at_chunk": 3}]}, "at_s or at_chunk"),
        ({"entries": [{"at_s": 1.0}]}, "prompt"),
        ({"entries": [{"at_s": 2.0, "prompt": "a"}, one]}, "order"),
        ({"entries": [one], "loop_s": 0.5}, "loop"),
        ({"entries": [{**one, "steps": 3}]}, "steps"),
    ):
        answer = await client.put("/v1/streams/a/timeline", json=body)
        assert answer.status_code == 422, body
        assert word in answer.json()["detail"], answer.text


def test_of_several_overdue_entries_the_newest_counts() -> None:
    entries = (
        Entry(at_s=0, prompt="a"),
        Entry(at_s=1, prompt="b"),
        Entry(at_chunk=9, prompt="c"),
        Entry(at_s=2, prompt="d"),
    )
    view = TimelineView(entries=entries, playing=True, next=0, began_ns=0)
    assert due_entry(view, int(5e9), chunk=3) == 1, "the third holds up what comes after it"
    assert due_entry(view, int(5e9), chunk=9) == 3
    assert due_entry(view.model_copy(update={"next": 4}), int(5e9), chunk=9) == -1


async def test_models_and_their_styles(desk: Desk) -> None:
    client = await desk.gateway("g0")
    models = {each["name"]: each for each in (await client.get("/v1/models")).json()["models"]}
    assert models["rheo-tiny"]["served"] is None, "no scheduler said"
    assert (models["rheo-tiny"]["layers"], models["rheo-tiny"]["styles"]) == (6, 16)
    styles = (await client.get("/v1/models/rheo-tiny/styles")).json()["styles"]
    assert styles[0]["name"] == "pencil"
    for style in styles:
        picture = await client.get(style["thumbnail"])
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/webp"), style
        assert 500 < len(picture.content) < 8000
    assert (await client.get("/v1/models/wan2.1-1.3b/styles")).json()["styles"] == []
    for path in ("none", "none/styles", "rheo-tiny/styles/none-such.webp"):
        assert (await client.get(f"/v1/models/{path}")).status_code == 404, path
    assert (await client.get("/v1/models/..%2f..%2fetc/styles")).status_code in (404, 422)
