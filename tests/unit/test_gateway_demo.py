"""The public demo's protocol, as its client speaks it."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from pydantic import ValidationError

from services.gateway.demo import (
    DEFAULT_PROMPT,
    Awaited,
    Params,
    ProtocolError,
    Talk,
    settings_page,
    spec_of,
    stream_of,
)
from shared.contracts import subjects
from shared.contracts.commands import StreamPatch
from shared.contracts.sources import MAX_PUSHED_BYTES

JPEG = b"\xff\xd8\xff\xe0...."


def frame(talk: Talk, settings: dict[str, Any], data: bytes = JPEG) -> list[Any]:
    """One round as the demo's page does it."""
    return [talk.on_json({"status": "next_frame", "timestamp": 1}), talk.on_json(settings), talk.on_bytes(data)]


def test_a_client_is_greeted_and_its_first_settings_begin_the_stream() -> None:
    talk = Talk()
    assert [said["status"] for said in talk.hello()] == ["connected", "wait", "send_frame"]
    _, begun, shown = frame(talk, {"prompt": "ink", "width": 512, "height": 512, "restart": True, "later": 1})
    assert begun.begin is not None
    assert begun.begin.prompt == "ink"
    assert begun.patch is None
    assert (shown.frame, shown.say, shown.ask_again) == (JPEG, [{"status": "wait"}], True)
    spec = spec_of(begun.begin, "rheo-tiny", "acme")
    assert (spec.source.kind, spec.prompt, spec.fps, spec.tenant) == ("push", "ink", 16.0, "acme")
    user = uuid.uuid4()
    assert subjects.is_token(stream_of(user))


def test_settings_change_the_running_stream() -> None:
    talk = Talk()
    frame(talk, {"prompt": "ink"})
    assert frame(talk, {"prompt": "ink"})[1].patch is None
    assert frame(talk, {"prompt": "neon"})[1].patch == StreamPatch(prompt="neon")
    assert frame(talk, {"prompt": "neon", "restart": True})[1].patch == StreamPatch(reset=True)
    assert frame(talk, {"prompt": " "})[1].patch == StreamPatch(prompt=DEFAULT_PROMPT)


def test_pauses_uploads_and_what_is_not_known() -> None:
    talk = Talk()
    assert talk.on_json({"status": "pause"}).patch is None, "nothing has begun"
    frame(talk, {"prompt": "ink"})
    assert talk.on_json({"status": "pause"}).patch == StreamPatch(paused=True)
    resumed = talk.on_json({"status": "resume"})
    assert (resumed.patch, resumed.ask_again) == (StreamPatch(paused=False), True)
    assert talk.on_json({"status": "upload_done"}).say == [{"status": "upload_done_ack"}]
    assert talk.on_json({"status": "no_frame"}).ask_again
    assert talk.on_json({"status": "dance"}) == talk.on_json({})
    assert frame(talk, {"prompt": "ink"}, b"")[2].ask_again, "an empty frame: it is asked again"


def test_who_does_not_keep_to_it_is_told() -> None:
    with pytest.raises(ProtocolError, match="next_frame"):
        Talk().on_bytes(JPEG)
    with pytest.raises(ProtocolError, match="object"):
        Talk().on_json([1])
    for data in (b"GIF89a", JPEG + b"x" * MAX_PUSHED_BYTES):
        with pytest.raises(ProtocolError, match="JPEG"):
            frame(Talk(), {"prompt": "ink"}, data)
    with pytest.raises(ValidationError):
        frame(Talk(), {"prompt": "x" * 9000})
    talk = Talk(awaited=Awaited.SETTINGS)
    with pytest.raises(ValidationError):
        talk.on_json({"prompt": 5})


def test_the_settings_page_names_the_fields() -> None:
    page = settings_page("rheo-tiny", 8)
    assert set(page["input_params"]["properties"]) == set(Params.model_fields)
    assert page["info"]["properties"]["input_mode"]["default"] == "image"
    assert page["max_queue_size"] == 8
