"""What clients of Scope's protocol ask for, in this system's words, and what egress makes of their video."""

from __future__ import annotations

import asyncio
import json
import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from services.egress.rtc.live_h264 import LiveH264
from services.egress.rtc.live_vp8 import LiveVp8
from services.egress.rtc.peer import ways_of
from services.egress.rtc.peer_input import PeerInput, covering
from services.egress.sinks.port import OutFrame
from services.gateway.demo import DEFAULT_PROMPT
from services.gateway.errors import InvalidError, UnknownPartError
from services.gateway.scope import (
    Candidates,
    Choice,
    Load,
    Loaded,
    LoadParams,
    Offer,
    fragment_of,
    loaded_by,
    patches_of,
    session_id,
    session_of,
    status_page,
    stream_of,
)
from shared.contracts import subjects
from shared.contracts.commands import StreamPatch
from shared.contracts.sources import PushedFrame
from shared.media.jpeg import decode_jpeg
from shared.rtc.decoding import FrameDecoder
from shared.rtc.fragments import parse_fragment
from shared.rtc.inbox import EncodedFrame, Inbox
from shared.rtc.scope_parameters import MAX_MESSAGE_BYTES, Parameters, ParametersError, Wanted, changes_of, read_message

SERVED = Choice("rheo-tiny", frozenset({"rheo-tiny", "wan-1.3b"}))


def offer(**parameters: Any) -> Offer:
    return Offer.model_validate({"sdp": "v=0", "type": "offer", "initialParameters": parameters, "user_id": None})


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ({"prompts": [{"text": "ink", "weight": 1.0}]}, {"prompt": "ink"}),
        ({"prompts": ["ink"]}, {"prompt": "ink"}),
        ({"prompts": [{"text": "ink", "weight": 100}, {"text": "neon", "weight": 0}]}, {"prompt": "ink"}),
        ({"prompts": [{"text": " ", "weight": 1}]}, {}),
        ({"prompts": []}, {}),
        (
            {"prompts": [{"text": "ink", "weight": 0.7}, {"text": "neon", "weight": 0.3}]},
            {"prompts": [{"text": "ink", "weight": 0.7}, {"text": "neon", "weight": 0.3}]},
        ),
        (
            {"prompts": ["old"], "transition": {"target_prompts": [{"text": "ink"}], "num_steps": 8}},
            {"prompt": "ink", "blend_chunks": 8},
        ),
        ({"transition": {"target_prompts": ["ink"], "num_steps": 900}}, {"prompt": "ink", "blend_chunks": 64}),
        ({"denoising_step_list": [1000, 750, 500, 250]}, {"steps": 4}),
        ({"denoising_step_list": [700, 500]}, {"steps": 2}),
        ({"denoising_step_list": [9, 8, 7, 6, 5, 4]}, {"steps": 4}),
        ({"noise_scale": 0.7, "noise_controller": True}, {"noise": 0.7}),
        ({"reset_cache": True}, {"reset": True}),
        ({"reset_cache": False, "paused": True, "node_id": "pipeline"}, {}),
        ({"base_seed": 7}, {"seed": 7}),
        ({"kv_cache_attention_bias": 0.5}, {}),
    ],
)
def test_parameters_become_changes(sent: dict[str, Any], meant: dict[str, Any]) -> None:
    assert changes_of(read_message(json.dumps(sent))) == meant
    StreamPatch.model_validate(meant)


@pytest.mark.parametrize(
    "message",
    [
        "what is this",
        b"\xff\xfe",
        "[1, 2]",
        "[" * 5000,
        '"a"',
        '{"noise_scale": 1.5}',
        '{"noise_scale": NaN}',
        '{"denoising_step_list": []}',
        '{"prompts": [{"text": "x", "weight": -1}]}',
        '{"prompts": {"text": "x"}}',
        json.dumps({"prompts": [{"text": "x" * 9000}]}),
        json.dumps({"prompts": [f"prompt {n}" for n in range(9)]}),
        '{"paused": "perhaps"}',
        " " * (MAX_MESSAGE_BYTES + 1),
    ],
)
def test_a_message_that_cannot_be_carried_out_says_why_in_one_line(message: str | bytes) -> None:
    with pytest.raises(ParametersError) as caught:
        Wanted().add(read_message(message))
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_waits_is_replaced_by_what_is_newer() -> None:
    wanted = Wanted()
    for message in (
        {"noise_scale": 0.1, "paused": True},
        {"noise_scale": 0.2, "denoising_step_list": [700]},
        {"transition": {"target_prompts": ["ink"], "num_steps": 8}},
        {"prompts": ["neon", "ink"], "paused": False},
    ):
        wanted.add(Parameters.model_validate(message))
    parts = [{"text": "neon", "weight": 1.0}, {"text": "ink", "weight": 1.0}]
    changed = StreamPatch.model_validate({"noise": 0.2, "steps": 1, "prompts": parts})
    assert wanted.take() == [changed, StreamPatch(paused=False)], "what is new comes before the stream goes on"
    assert wanted.replaced == 4  # noise, the prompt, its blend, the pause
    assert wanted.take() == []


def test_a_managed_cache_is_made_anew_with_each_prompt() -> None:
    wanted = Wanted()
    wanted.add(Parameters(manage_cache=True))
    assert wanted.take() == []
    wanted.add(Parameters(prompts=["ink"]))
    assert wanted.take() == [StreamPatch(prompt="ink", recache=True)]
    with pytest.raises(ParametersError):
        wanted.add(Parameters(manage_cache=False, prompts=[f"{n}" for n in range(9)]))
    wanted.add(Parameters(prompts=["ink"]))
    assert wanted.take() == [StreamPatch(prompt="ink", recache=True)], "nothing of a bad message counts"


def test_parameters_that_change_nothing_are_named() -> None:
    sent = {"vace_ref_images": ["/a.png"], "output_sinks": {}, "kv_cache_attention_bias": 0.5, "whatever": 1}
    assert read_message(json.dumps(sent)).not_served == ["kv_cache_attention_bias", "vace_ref_images"]


def test_an_offer_becomes_a_stream_that_belongs_to_its_client() -> None:
    asked = offer(
        input_mode="video", prompts=[{"text": "ink", "weight": 1}], denoising_step_list=[700, 500, 200], noise_scale=0.5
    )
    loaded = Loaded(pipeline_ids=["depth", "wan-1.3b"], params=LoadParams(width=853, height=480, base_seed=42))
    stream, spec = stream_of(asked, loaded, SERVED, "acme")
    assert subjects.is_token(stream)
    assert (spec.source.kind, spec.prompt, spec.steps, spec.noise, spec.seed) == ("push", "ink", 3, 0.5, 42)
    assert (spec.width, spec.height, spec.model, spec.tenant) == (848, 480, "wan-1.3b", "acme")
    assert spec.peer_grace_s is not None
    assert not spec.audio
    assert patches_of(asked) == []
    assert session_of(session_id(stream, "peer-1")) == (stream, "peer-1")


def test_an_offer_without_parameters_makes_video_from_text() -> None:
    bare = Offer(sdp="v=0")
    stream, spec = stream_of(bare, Loaded(), SERVED, "acme")
    assert (spec.source.kind, spec.prompt, spec.model, spec.width) == ("none", DEFAULT_PROMPT, "rheo-tiny", None)
    assert stream != stream_of(bare, Loaded(), SERVED, "acme")[0]
    graph = {"nodes": [{"id": "a", "type": "source"}, {"id": "b", "type": "sink"}], "edges": []}
    assert stream_of(offer(graph=graph), Loaded(), SERVED, "acme")[1].source.kind == "push"
    assert stream_of(offer(input_mode="text", graph=graph), Loaded(), SERVED, "acme")[1].source.kind == "none"


@pytest.mark.parametrize("sdp", ["", "hello", " v=0", "v=01", "o=- 1 2 IN IP4 0.0.0.0"])
def test_what_is_no_sdp_starts_no_stream(sdp: str) -> None:
    with pytest.raises(ValidationError):
        Offer(sdp=sdp)


def test_a_mix_and_a_pause_follow_the_start() -> None:
    mixed = offer(prompts=[{"text": "ink", "weight": 0.2}, {"text": "neon", "weight": 0.8}], paused=True)
    assert stream_of(mixed, Loaded(), SERVED, "acme")[1].prompt == "neon"
    mix, pause = patches_of(mixed)
    assert [part.text for part in mix.prompts] == ["ink", "neon"]
    assert pause == StreamPatch(paused=True)
    with pytest.raises(InvalidError, match="too many"):
        stream_of(offer(prompts=[f"{n}" for n in range(9)]), Loaded(), SERVED, "acme")


def test_a_load_is_remembered_and_a_pipeline_is_a_model_where_its_name_is_one() -> None:
    both = Load.model_validate(
        {
            "pipelines": [
                {"node_id": "a", "pipeline_id": "depth", "load_params": {}},
                {"node_id": "b", "pipeline_id": "wan-1.3b", "load_params": {"width": 512, "height": 512, "loras": []}},
            ]
        }
    )
    assert loaded_by(both) == Loaded(pipeline_ids=["depth", "wan-1.3b"], params=LoadParams(width=512, height=512))
    with pytest.raises(InvalidError, match="pipeline_ids"):
        loaded_by(Load())
    assert SERVED.model(["longlive"]) == "rheo-tiny"
    assert Choice("rheo-tiny", frozenset({"wan-14b"})).model(["longlive"]) == "wan-14b"
    assert status_page(loaded_by(both), SERVED)["status"] == "loaded"
    assert status_page(Loaded(pipeline_ids=["longlive"]), SERVED)["pipeline_id"] == "longlive"
    assert status_page(Loaded(), Choice("rheo-tiny", None))["status"] == "loading"
    nobody = status_page(Loaded(), Choice("rheo-tiny", frozenset()))
    assert (nobody["status"], "rheo-tiny" in nobody["error"]) == ("error", True)


def test_candidates_become_a_fragment() -> None:
    host = "candidate:1 1 udp 2130706431 127.0.0.1 40001 typ host"
    sent = {"candidates": [{"candidate": host, "sdpMid": "0", "sdpMLineIndex": 0}, {"candidate": ""}]}
    fragment = parse_fragment(fragment_of(Candidates.model_validate(sent)))
    assert [(each.line, each.mid) for each in fragment.candidates] == [(host, "0")]
    assert fragment.ended
    assert fragment_of(Candidates(candidates=[])) == ""
    for wrong in ("nowhere", "a.b.c", "a.", "../x.y", "a.b\n"):
        with pytest.raises(UnknownPartError):
            session_of(wrong)


@pytest.mark.parametrize(
    ("theirs", "takes_input", "ours"),
    [
        (["sendrecv"], True, ["sendrecv"]),
        (["sendrecv"], False, ["sendonly"]),
        (["recvonly"], False, ["sendonly"]),
        (["sendonly", "recvonly"], True, ["recvonly", "sendonly"]),
        (["recvonly", "sendonly"], True, ["sendonly", "recvonly"]),
        (["sendrecv", "sendonly", "recvonly"], True, ["sendrecv", "inactive", "inactive"]),
    ],
)
def test_each_section_of_an_offer_has_its_use(theirs: list[str], takes_input: bool, ours: list[str]) -> None:
    assert ways_of(theirs, takes_input) == ours


@pytest.mark.parametrize(("theirs", "takes_input"), [(["sendonly"], True), (["recvonly"], True), (["inactive"], False)])
def test_an_offer_that_lacks_a_way_is_told_which(theirs: list[str], takes_input: bool) -> None:
    with pytest.raises(ValueError, match="the offer"):
        ways_of(theirs, takes_input)


def test_a_picture_is_made_no_larger_than_the_stream_needs() -> None:
    assert covering(1920, 1080, 480, 832) == (1480, 832)
    assert covering(320, 240, 832, 480) == (320, 240)
    assert covering(640, 480, 320, 176) == (320, 240)


def coloured(width: int, height: int, colour: tuple[int, int, int]) -> OutFrame:
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = colour
    return OutFrame(pixels, 0, 0, Fraction(1, 90_000), 0, 0, 0)


def test_vp8_keeps_colours_and_gives_a_key_frame_when_asked() -> None:
    encoder, inbox = LiveVp8(96, 64), Inbox()
    decoder = FrameDecoder(inbox)
    keys: list[bool] = []
    for number in range(8):
        (packet,) = encoder.encode(coloured(96, 64, (200, 60, 90)), number * 9000, key=number in (0, 5))
        assert packet.pts == number * 9000
        keys.append(packet.key)
        frame = decoder.decode(EncodedFrame("a", "VP8", packet.data, 0, packet.key))
        assert np.abs(frame.to_ndarray(format="rgb24").mean(axis=(0, 1)) - (200, 60, 90)).max() < 8
    assert keys == [number in (0, 5) for number in range(8)]
    assert decoder.decode(EncodedFrame("b", "VP8", b"\x00\x00", 0, True)) is None
    assert inbox.undecodable


async def test_a_clients_frames_are_pushed_as_pictures_and_the_newest_wins() -> None:
    pushed: list[PushedFrame] = []
    free = asyncio.Event()

    async def push(frame: PushedFrame) -> None:
        pushed.append(frame)
        await free.wait()

    client = PeerInput("s", (96, 64), push)
    client.start()
    encoder = LiveH264(192, 128)
    for number in range(12):
        for packet in encoder.encode(coloured(192, 128, (20 * number, 60, 90)), number * 9000, key=number == 0):
            client.inbox.put(EncodedFrame("a", "H264", packet.data, number, packet.key))
    until = time.monotonic() + 10
    while not pushed or client.inbox.waiting:
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    free.set()
    while pushed[-1].captured_ns < 11 or client.counters["peer_frames_pushed"] < len(pushed):
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    await client.close()
    picture = decode_jpeg(pushed[-1].data)
    assert (picture.width, picture.height) == (96, 64)
    assert len(pushed) + client.counters["peer_frames_left_out"] == 12
    assert client.counters["peer_frames_pushed"] == len(pushed) < 12
