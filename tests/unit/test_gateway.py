"""The gateway names only files in the media folder, and turns every refusal into a problem."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from services.gateway.core import (
    PathRefusedError,
    StreamCreate,
    inside,
    new_stream_id,
    spec_of_request,
    sum_of,
    view_of,
)
from services.gateway.handlers import RefusedError
from services.gateway.problems import install
from shared.contracts import subjects
from shared.contracts.commands import FileSource, Mp4Sink, NullSink, StreamSpec
from shared.contracts.events import LedgerTotals
from shared.contracts.tiers import Refusal, Tier


@pytest.mark.parametrize("name", ["../a.mp4", "/etc/passwd", "a/../../b", "a\\b.mp4", "a\0.mp4", "x" * 300])
def test_paths_never_leave_the_media_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(PathRefusedError):
        inside(tmp_path, name)


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    (media / "link").symlink_to(tmp_path)
    with pytest.raises(PathRefusedError, match="leads out"):
        inside(media, "link/secret.mp4")
    assert inside(media, "a/b.mp4") == media / "a" / "b.mp4"


def test_a_request_becomes_a_spec_with_absolute_paths(tmp_path: Path) -> None:
    body = {
        "id": "x",
        "source": {"kind": "file", "path": "in.mp4"},
        "sinks": [{"kind": "mp4", "path": "o.mp4"}, {"kind": "null"}],
        "prompt": "neon",
    }
    request = StreamCreate.model_validate(body)
    spec = spec_of_request(request, tmp_path)
    assert type(spec) is StreamSpec
    assert spec.source == FileSource(path=str(tmp_path / "in.mp4"))
    assert spec.sinks == (Mp4Sink(path=str(tmp_path / "o.mp4")), NullSink())


def test_ids_are_subject_tokens() -> None:
    assert subjects.is_token(new_stream_id())
    assert new_stream_id() != new_stream_id()


def test_a_session_is_shown_with_its_resolved_size() -> None:
    spec = StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon"})
    session = {
        "spec": spec,
        "state": "live",
        "assignment": {"width": 320, "height": 192},
        "prompt": "ink",
        "prompt_version": 2,
    }
    view = view_of("a", session, LedgerTotals(frames_in=5, on_time=5))
    assert (view.width, view.height, view.prompt, view.prompt_version, view.state) == (320, 192, "ink", 2, "live")


def test_a_stream_is_shown_as_it_runs_now_not_as_it_was_started() -> None:
    spec = StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon", "steps": 2, "seed": 1})
    session: dict[str, object] = {"spec": spec, "state": "live"}
    view = view_of("a", session, LedgerTotals())
    assert (view.steps, view.seed, view.frames_per_block, view.noise, view.paused) == (2, 1, 1, None, False)
    session["settings"] = {"steps": 3, "seed": 7, "frames_per_block": 2, "noise": 0.25, "paused": True}
    view = view_of("a", session, LedgerTotals())
    assert (view.steps, view.seed, view.frames_per_block, view.noise, view.paused) == (3, 7, 2, 0.25, True)


def test_a_session_shows_what_was_promised_and_what_it_has() -> None:
    spec = StreamSpec.model_validate({"source": {"kind": "pattern"}, "prompt": "neon", "tenant": "acme"})
    tier = {"steps": 2, "fps": 8.0, "width": 160, "height": 96}
    session: dict[str, object] = {
        "spec": spec,
        "state": "live",
        "promise": {"fps": 8.0, "latency_ms": 420.0, "tier": tier},
    }
    view = view_of("a", session, LedgerTotals())
    assert view.tenant == "acme"
    assert view.promise is not None
    assert view.tier == view.promise.tier
    session["tier"] = {"tier": {**tier, "steps": 1}, "reason": "too much to do"}
    lower = view_of("a", session, LedgerTotals())
    assert lower.tier is not None
    assert (lower.tier.steps, lower.tier_reason) == (1, "too much to do")
    session["promise"] = {"of": "another version"}
    assert view_of("a", session, LedgerTotals()).promise is None


def test_the_tenant_is_the_headers_whatever_the_body_says(tmp_path: Path) -> None:
    request = StreamCreate.model_validate({"source": {"kind": "pattern"}, "prompt": "neon", "tenant": "other"})
    assert spec_of_request(request, tmp_path, "acme").tenant == "acme"


def test_ledgers_add_up() -> None:
    one = LedgerTotals(frames_in=9, on_time=5, late=1, dropped={"ingest:behind": 3})
    other = LedgerTotals(frames_in=4, skipped=2, dropped={"ingest:behind": 1, "scheduler:stale": 1})
    both = sum_of(one, other)
    assert both.frames_in == both.closed == 13
    assert both.dropped == {"ingest:behind": 4, "scheduler:stale": 1}


def test_quota_is_429_and_want_of_room_503_both_with_when_and_what() -> None:
    app = FastAPI()
    install(app)
    tier = Tier(steps=1, fps=8.0, width=160, height=96)
    refusals = {
        "quota": RefusedError("too many", 0.2, Refusal.QUOTA),
        "full": RefusedError("full", 7.4, Refusal.CAPACITY, tier),
        "bad": RefusedError("bad"),
    }

    @app.get("/{name}")
    async def refuse(name: str) -> None:
        raise refusals[name]

    with TestClient(app) as client:
        quota, full, bad = (client.get(f"/{name}") for name in refusals)
    assert (quota.status_code, quota.headers["retry-after"], quota.json()["refusal"]) == (429, "1", "quota")
    assert (full.status_code, full.headers["retry-after"]) == (503, "8")
    assert full.headers["content-type"] == "application/problem+json"
    assert full.json()["tier"] == {"steps": 1, "fps": 8.0, "width": 160, "height": 96, "frames_per_block": 1}
    assert (bad.status_code, "tier" in bad.json()) == (409, False)
