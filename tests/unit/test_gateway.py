"""The gateway names only files in the media folder, and turns every refusal into a problem."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.gateway.core import PathRefusedError, StreamCreate, inside, new_stream_id, spec_of_request, view_of
from shared.contracts import subjects
from shared.contracts.commands import FileSource, Mp4Sink, NullSink, StreamSpec
from shared.contracts.events import LedgerTotals


@pytest.mark.parametrize("name", ["../a.mp4", "/etc/passwd", "a/../../b", "a\\b.mp4", "a\0.mp4"])
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
