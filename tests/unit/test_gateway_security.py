"""Every line of the gateway's security, as a table: who asks what, from where, and what comes of it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute

from services.gateway.app import Parts, build_api
from services.gateway.auth import Share, check_settings, read_share, sign_share
from services.gateway.guard import host_is_safe, origin_is_safe
from services.gateway.settings import Settings
from shared.access import Role, TokensFileError, add_token, hash_token, new_token, read_tokens
from shared.bus.memory import MemoryBus
from shared.contracts.commands import StreamSpec
from shared.lifecycle import UnusableError
from shared.session.memory import MemoryStore

BASE = "http://127.0.0.1:7860"


@dataclass
class Door:
    """A gateway and what opens it."""

    client: httpx.AsyncClient
    parts: Parts
    tokens: dict[str, str] = field(default_factory=dict[str, str])

    def bearer(self, who: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.tokens[who]}"} if who else {}


async def door_of(settings: Settings, tokens: dict[str, str] | None = None) -> Door:
    store = MemoryStore()
    parts = Parts(MemoryBus(), store, settings)
    await parts.start()
    for stream, tenant in (("mine", "acme"), ("theirs", "other")):
        await store.create(
            stream, StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon", "tenant": tenant})
        )
    transport = httpx.ASGITransport(build_api(parts), client=("10.0.0.9", 5))
    return Door(httpx.AsyncClient(transport=transport, base_url=BASE), parts, tokens or {})


@pytest.fixture
async def closed(tmp_path: Path) -> AsyncIterator[Door]:
    """With tokens: one of each role of tenant acme, and an admin."""
    path, tokens = tmp_path / "tokens.json", {}
    for name, role in (("viewer", Role.VIEWER), ("operator", Role.OPERATOR), ("admin", Role.ADMIN)):
        tokens[name], entry = new_token(name, role, "acme" if name != "admin" else "default")
        add_token(path, entry)
    door = await door_of(Settings(tokens_file=path, media_dir=tmp_path, answer_timeout_s=0.05), tokens)
    yield door
    await door.client.aclose()


@pytest.fixture
async def unlocked(tmp_path: Path) -> AsyncIterator[Door]:
    """On loopback, without tokens."""
    door = await door_of(Settings(media_dir=tmp_path, answer_timeout_s=0.05, cors_origins=("https://studio.example",)))
    yield door
    await door.client.aclose()


NEW = {"source": {"kind": "pattern"}, "prompt": "neon"}
TRICKLED = {"candidates": [{"candidate": ""}]}
# No scheduler answers here: 503 is what comes of a command that was let through.
RULES = [
    ("no token", "", "GET", "/v1/streams", None, 401),
    ("no token, unknown path", "", "GET", "/v1/nothing", None, 401),
    ("no token, old demo's path", "", "GET", "/api/settings", None, 401),
    ("health needs none", "", "GET", "/healthz", None, 200),
    ("the API's description needs none", "", "GET", "/openapi.json", None, 200),
    ("a viewer sees its tenant's stream", "viewer", "GET", "/v1/streams/mine", None, 200),
    ("and no other's", "viewer", "GET", "/v1/streams/theirs", None, 404),
    ("nor its events", "viewer", "GET", "/v1/streams/theirs/events", None, 404),
    ("a viewer starts nothing", "viewer", "POST", "/v1/streams", NEW, 403),
    ("nor by Scope's offer", "viewer", "POST", "/api/v1/webrtc/offer", {"sdp": "v=0"}, 403),
    ("and nobody without a token", "", "POST", "/api/v1/webrtc/offer", {"sdp": "v=0"}, 401),
    ("another tenant's session is not there", "operator", "PATCH", "/api/v1/webrtc/offer/theirs.x", TRICKLED, 404),
    ("nor can it be closed", "operator", "DELETE", "/api/v1/webrtc/offer/theirs.x", None, 404),
    ("changes nothing", "viewer", "PATCH", "/v1/streams/mine", {"steps": 1}, 403),
    ("stops nothing", "viewer", "DELETE", "/v1/streams/mine", None, 403),
    ("shares nothing", "viewer", "POST", "/v1/streams/mine/shares", None, 403),
    ("sees no fleet", "viewer", "GET", "/v1/workers", None, 403),
    ("an operator starts", "operator", "POST", "/v1/streams", NEW, 503),
    ("changes its own", "operator", "PATCH", "/v1/streams/mine", {"steps": 1}, 503),
    ("not another's", "operator", "PATCH", "/v1/streams/theirs", {"steps": 1}, 404),
    ("nor stops it", "operator", "DELETE", "/v1/streams/theirs", None, 404),
    ("nor pauses it", "operator", "POST", "/v1/streams/theirs/pause", None, 404),
    ("does not empty workers", "operator", "POST", "/v1/workers/w/drain", None, 403),
    ("nor cuts pipelines", "operator", "POST", "/v1/pipelines/p/cuts", {"cuts": []}, 403),
    ("nor migrates", "operator", "POST", "/v1/streams/mine/migrate", None, 403),
    ("an admin sees every tenant's", "admin", "GET", "/v1/streams/theirs", None, 200),
    ("and changes it", "admin", "PATCH", "/v1/streams/theirs", {"steps": 1}, 503),
    ("and the fleet", "admin", "POST", "/v1/workers/w/drain", None, 503),
]


@pytest.mark.parametrize(
    ("who", "method", "path", "body", "status"), [rule[1:] for rule in RULES], ids=[r[0] for r in RULES]
)
async def test_roles(closed: Door, who: str, method: str, path: str, body: object, status: int) -> None:
    answer = await closed.client.request(method, path, json=body, headers=closed.bearer(who))
    assert answer.status_code == status, answer.text
    if status >= 400:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["status"] == status
    if status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_every_route_of_the_api_is_behind_a_token(closed: Door) -> None:
    app = closed.client._transport.app  # type: ignore[attr-defined]
    routes = [route for route in app.routes if isinstance(route, APIRoute) and route.path.startswith(("/v1", "/api"))]
    schema = (await closed.client.get("/openapi.json")).json()
    asked = 0
    for path, verbs in schema["paths"].items():
        if not path.startswith(("/v1", "/api")):
            continue
        for verb in verbs:
            answer = await closed.client.request(verb, path.replace("{", "").replace("}", ""))
            assert answer.status_code == 401, (verb, path, answer.text)
            asked += 1
    assert asked >= 20, routes


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer rheo_guessed"}, 401),
        ({"Authorization": "Basic YTpi"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Bearer " + "x" * 5000}, 401),
        ({"X-Rheocast-Tenant": "other", "Authorization": "operator"}, 403),
        ({"X-Rheocast-Tenant": "acme", "Authorization": "operator"}, 503),
        ({"X-Rheocast-Tenant": "other", "Authorization": "admin"}, 503),
        ({"X-Rheocast-Tenant": "a.b", "Authorization": "admin"}, 422),
    ],
)
async def test_tokens_and_tenants(closed: Door, headers: dict[str, str], status: int) -> None:
    if headers.get("Authorization") in closed.tokens:
        headers = {**headers, **closed.bearer(headers["Authorization"])}
    assert (await closed.client.post("/v1/streams", json=NEW, headers=headers)).status_code == status


async def test_a_token_in_the_query_opens_media_only(closed: Door) -> None:
    token = closed.tokens["viewer"]
    assert (await closed.client.get(f"/v1/streams/mine?token={token}")).status_code == 401
    assert (await closed.client.get(f"/v1/streams?token={token}")).status_code == 401
    assert (await closed.client.delete(f"/v1/streams/mine?token={closed.tokens['operator']}")).status_code == 401
    assert (await closed.client.get(f"/v1/streams/theirs/events?token={token}")).status_code == 404
    assert (await closed.client.get("/v1/streams/theirs/events?token=rheo_guessed")).status_code == 401


async def test_nobody_tries_tokens_for_long(closed: Door) -> None:
    answers = [
        (await closed.client.get("/v1/streams", headers={"Authorization": f"Bearer {n}"})).status_code
        for n in range(40)
    ]
    assert answers[0] == 401
    assert answers[-1] == 429
    assert (await closed.client.get("/v1/streams", headers=closed.bearer("viewer"))).status_code == 200


async def test_a_token_that_is_taken_out_is_worth_nothing(closed: Door, tmp_path: Path) -> None:
    headers = closed.bearer("viewer")
    assert (await closed.client.get("/v1/streams", headers=headers)).status_code == 200
    path = tmp_path / "tokens.json"
    left = [entry for entry in json.loads(path.read_text())["tokens"] if entry["name"] != "viewer"]
    path.write_text(json.dumps({"tokens": left}))
    tokens = closed.parts.tokens
    assert tokens is not None
    assert tokens.find(closed.tokens["viewer"], time.monotonic() + 3) is None
    path.write_text("{")  # a slip of an editor locks nobody out
    assert tokens.find(closed.tokens["admin"], time.monotonic() + 6) is not None


async def test_share_links_show_one_stream_and_can_be_taken_back(closed: Door) -> None:
    made = await closed.client.post("/v1/streams/mine/shares", json={"lasts_s": 60}, headers=closed.bearer("operator"))
    assert made.status_code == 201, made.text
    share = made.json()
    assert share["path"].endswith(share["token"])
    link = {"Authorization": f"Bearer {share['token']}"}
    for path, status in (
        ("/v1/streams/mine", 200),
        ("/v1/streams/mine/stats", 200),
        ("/v1/streams/theirs", 404),
        ("/v1/streams", 403),
        ("/v1/ledger", 403),
        ("/v1/workers", 403),
    ):
        assert (await closed.client.get(path, headers=link)).status_code == status, path
    assert (await closed.client.patch("/v1/streams/mine", json={"steps": 1}, headers=link)).status_code == 403
    assert (await closed.client.delete("/v1/streams/mine", headers=link)).status_code == 403
    assert (await closed.client.get("/v1/streams/mine/shares", headers=link)).status_code == 403
    listed = await closed.client.get("/v1/streams/mine/shares", headers=closed.bearer("operator"))
    assert [each["id"] for each in listed.json()["shares"]] == [share["id"]]
    assert share["token"] not in listed.text
    path = f"/v1/streams/mine/shares/{share['id']}"
    assert (await closed.client.delete(path, headers=closed.bearer("operator"))).status_code == 204
    assert (await closed.client.get("/v1/streams/mine", headers=link)).status_code == 401
    long = await closed.client.post("/v1/streams/mine/shares", json={"lasts_s": 9e6}, headers=closed.bearer("operator"))
    assert long.status_code == 422


def test_a_share_is_worth_what_was_signed() -> None:
    key, share = b"k" * 32, Share("id", "mine", 2000)
    token = sign_share(share, key)
    assert read_share(token, key, now=1999.0) == share
    assert read_share(token, key, now=2000.0) is None, "it is over"
    assert read_share(token, b"o" * 32, now=1.0) is None
    other = sign_share(Share("id", "theirs", 2000), b"o" * 32)
    assert read_share(f"{other.split('.')[0]}.{token.split('.')[1]}", key, now=1.0) is None
    for broken in ("share_", "share_.", "share_a.b", "share_" + "é" * 9, token[:-3]):
        assert read_share(broken, key, now=1.0) is None


@pytest.mark.parametrize(
    ("headers", "method", "status"),
    [
        ({}, "GET", 200),
        ({"Host": "localhost:7860"}, "GET", 200),
        ({"Host": "[::1]:7860"}, "GET", 200),
        ({"Host": "evil.example"}, "GET", 421),  # a name that was made to point at this machine
        ({"Host": "127.0.0.1.evil.example:7860"}, "GET", 421),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, "POST", 421),
        ({"Origin": "http://evil.example"}, "POST", 403),
        ({"Origin": "null"}, "POST", 403),
        ({"Origin": "http://127.0.0.1:9999"}, "POST", 403),
        ({"Origin": BASE}, "POST", 503),
        ({"Origin": "https://studio.example"}, "POST", 503),
        ({}, "POST", 503),
    ],
)
async def test_without_tokens_no_other_page_may_act(
    unlocked: Door, headers: dict[str, str], method: str, status: int
) -> None:
    body = NEW if method == "POST" else None
    answer = await unlocked.client.request(method, "/v1/streams", json=body, headers=headers)
    assert answer.status_code == status, answer.text


async def test_cors_is_closed_but_for_those_named(unlocked: Door, closed: Door) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    fine = await unlocked.client.options("/v1/streams", headers={"Origin": "https://studio.example", **asks})
    assert fine.headers["access-control-allow-origin"] == "https://studio.example"
    foreign = await unlocked.client.options("/v1/streams", headers={"Origin": "https://evil.example", **asks})
    assert "access-control-allow-origin" not in foreign.headers
    none = await closed.client.options("/v1/streams", headers={"Origin": "https://studio.example", **asks})
    assert "access-control-allow-origin" not in none.headers


async def test_answers_carry_the_security_headers(unlocked: Door) -> None:
    for path in ("/", "/docs", "/v1/streams", "/v1/streams/none", "/v1/nothing"):
        headers = (await unlocked.client.get(path)).headers
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy, path
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"
    assert (await unlocked.client.get("/v1/streams")).headers["cache-control"] == "no-store"


async def test_requests_are_counted(tmp_path: Path) -> None:
    door = await door_of(Settings(media_dir=tmp_path, requests_per_s=1.0, requests_burst=3))
    answers = [await door.client.get("/v1/streams") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert answers[-1].headers["retry-after"] == "1"
    await door.client.aclose()


async def test_errors_are_problems_whoever_makes_them(unlocked: Door) -> None:
    for method, path, body, status in (
        ("GET", "/v1/nothing", None, 404),
        ("PUT", "/v1/streams", None, 405),
        ("POST", "/v1/streams", b"{", 422),
        ("POST", "/v1/streams", b"x" * (2 << 20), 413),
        ("GET", "/v1/streams?limit=0", None, 422),
        ("GET", "/v1/streams/a.b", None, 422),
    ):
        answer = await unlocked.client.request(
            method, path, content=body, headers={"content-type": "application/json"} if body else {}
        )
        assert answer.status_code == status, (path, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["detail"]
    assert (await unlocked.client.put("/v1/streams")).headers["allow"] == "GET, POST"
    assert (await unlocked.client.put("/v1/streams/a")).headers["allow"] == "DELETE, GET, PATCH"


@pytest.mark.parametrize(
    ("settings", "fine"),
    [
        ({}, True),
        ({"gateway_host": "::1"}, True),
        ({"gateway_host": "0.0.0.0"}, False),
        ({"gateway_host": "192.168.1.5"}, False),
        ({"gateway_host": "studio.example"}, False),
        ({"gateway_host": "0.0.0.0", "allow_no_auth": True}, True),
        ({"gateway_host": "0.0.0.0", "tokens_file": Path("t")}, True),
    ],
)
def test_nobody_listens_to_a_network_without_tokens(settings: dict[str, object], fine: bool) -> None:
    made = Settings.model_validate(settings)
    if fine:
        check_settings(made)
        return
    with pytest.raises(UnusableError, match="RHEOCAST_TOKENS_FILE"):
        check_settings(made)


async def test_a_tokens_file_that_will_not_do_stops_the_start(tmp_path: Path) -> None:
    parts = Parts(MemoryBus(), MemoryStore(), Settings(tokens_file=tmp_path / "none.json"))
    with pytest.raises(UnusableError, match=r"none\.json"):
        await parts.start()


def test_tokens_are_kept_as_hashes(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    token, entry = new_token("ci", Role.OPERATOR, "acme")
    add_token(path, entry)
    again, newer = new_token("ci", Role.VIEWER)
    add_token(path, newer)
    assert token not in path.read_text()
    assert again not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    path.chmod(0o644)
    add_token(path, newer)
    assert path.stat().st_mode & 0o777 == 0o644, "a container's user may still read it"
    assert list(read_tokens(path)) == [hash_token(again)], "the same name: replaced"
    for text, word in (("{", "JSON"), ('{"tokens": [{"name": "a"}]}', "sha256"), ('{"token": []}', "token")):
        path.write_text(text)
        with pytest.raises(TokensFileError, match=word):
            read_tokens(path)


@pytest.mark.parametrize(
    ("host", "safe"),
    [("localhost", True), ("10.1.2.3:80", True), ("", False), ("a.b", False), ("studio", True), ("[", False)],
)
def test_hosts(host: str, safe: bool) -> None:
    assert host_is_safe(host, ("studio",)) is safe


@pytest.mark.parametrize(
    ("origin", "safe"),
    [("http://h:1", True), ("https://h:1", True), ("http://h", False), ("file://h:1", False), ("null", False)],
)
def test_origins(origin: str, safe: bool) -> None:
    assert origin_is_safe(origin, "h:1", ()) is safe
