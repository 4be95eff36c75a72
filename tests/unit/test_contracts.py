"""The contract: every subject has its messages, names are safe, and what is generated from it has not drifted."""

from __future__ import annotations

import inspect
from typing import get_args

import msgpack
import pytest
import yaml
from pydantic import ValidationError

from shared.contracts import beats, commands, events, moving, operating, signalling, sinks, sources, subjects, tiers
from shared.contracts.asyncapi import DOCUMENT, document, render
from shared.contracts.catalog import CHANNELS, Delivery, channel_of, matches
from shared.contracts.codec import BadMessageError, decode, decode_subject, encode
from shared.contracts.commands import StopStream, StreamPatch
from shared.contracts.events import BatchDone, Beat, ChunkCaptured, SourceEnded, SourceTotals
from shared.contracts.refs import Wire
from tests.support.messages import spec


def all_messages() -> set[type[Wire]]:
    return {message for channel in CHANNELS for message in (*channel.messages, *channel.replies)}


def test_every_message_with_a_kind_travels_somewhere() -> None:
    defined = {
        each
        for module in (beats, events, commands, moving, operating, signalling, sinks, sources, tiers)
        for _, each in inspect.getmembers(module, inspect.isclass)
        if issubclass(each, Wire) and each.__module__ == module.__name__ and "kind" in each.model_fields
    }
    nested = {*get_args(get_args(sources.Source)[0]), *get_args(get_args(sinks.Sink)[0])}
    assert defined - nested == all_messages()


def test_within_a_subject_each_kind_is_one_message() -> None:
    for channel in CHANNELS:
        for union in (channel.messages, channel.replies):
            kinds = [message.model_fields["kind"].default for message in union]
            assert len(kinds) == len(set(kinds)), channel.subject


def test_a_subject_belongs_to_one_channel() -> None:
    for channel in CHANNELS:
        subject = channel.subject.replace("*", "x1")
        assert channel_of(subject) is channel
        assert channel_of(channel.subject) is channel
        assert [each for each in CHANNELS if matches(each.subject, subject)] == [channel]
    with pytest.raises(LookupError, match=r"'rheo\.stream\.x\.nothing' is not in the catalog"):
        channel_of("rheo.stream.x.nothing")


def test_only_requests_have_replies() -> None:
    for channel in CHANNELS:
        assert bool(channel.replies) is (channel.delivery is Delivery.REQUEST)


def test_every_message_says_who_sends_it() -> None:
    for message in all_messages():
        text = message.__doc__ or ""
        assert "→" in text or text.startswith(("Reply to", "Take ", "Let ", "Compute ")), message.__name__


@pytest.mark.parametrize("name", ["s1", "A-b_9", "x" * 64])
def test_a_name_that_may_be_part_of_a_subject(name: str) -> None:
    assert subjects.is_token(name)
    assert subjects.stream_of(subjects.stream(name, "chunk")) == name


@pytest.mark.parametrize("name", ["", "a.b", "a b", ">", "**", "a*", "x" * 65, "ä", "a\n", "a\r\nPUB x", "*.>"])
def test_a_name_that_may_not(name: str) -> None:
    assert not subjects.is_token(name)
    for make in (
        lambda: subjects.stream(name, "chunk"),
        lambda: subjects.stream("s", name),
        lambda: subjects.pipeline_stage(name, 0),
        lambda: subjects.pipeline_done(name),
        lambda: subjects.assign(name),
        lambda: subjects.beat(name),
        lambda: subjects.tensor_get(name),
    ):
        with pytest.raises(ValueError, match="cannot be part of a subject"):
            make()


def test_unknown_fields_are_ignored_and_missing_new_ones_have_defaults() -> None:
    plain = msgpack.unpackb(encode(SourceEnded(stream="s", epoch=1, totals=SourceTotals(captured=3))))
    plain["invented_later"] = {"a": 1}
    plain["totals"]["invented_later"] = 2
    del plain["error"]
    message = decode_subject("rheo.stream.s.chunk", msgpack.packb(plain))
    assert message == SourceEnded(stream="s", epoch=1, totals=SourceTotals(captured=3))


def test_a_message_of_another_subject_is_a_bad_message() -> None:
    data = encode(StopStream(command="c", stream="s"))
    with pytest.raises(BadMessageError):
        decode_subject("rheo.stream.s.chunk", data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x81",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 2000,
        msgpack.packb(None),
        msgpack.packb([]),
        msgpack.packb({"kind": "beat"}),
        msgpack.packb({1: 2}),
        msgpack.packb({"kind": 3}),
        msgpack.packb({"kind": "beat", "service": b"\xff", "instance": "i", "incarnation": "1"}),
        msgpack.packb({"kind": msgpack.Timestamp(1, 1)}),
        encode(Beat(service="s", instance="i", incarnation="1")) + b"more",
    ],
    ids=range(13),
)
def test_rubbish_is_a_bad_message_with_one_line_and_nothing_else(data: bytes) -> None:
    with pytest.raises(BadMessageError) as raised:
        decode((Beat,), data)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200
    with pytest.raises(BadMessageError):
        decode((BatchDone, ChunkCaptured), data)


def test_messages_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        StopStream(command="c", stream="s").stream = "t"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompt": "   "}, "the prompt is empty"),
        ({"prompt": "x" * 8001}, "at most 8000"),
        ({"width": 640}, "give both width and height"),
        ({"width": 100, "height": 64}, "width 100 will not do: a multiple of 16"),
        ({"width": 64, "height": 4096}, "height 4096 will not do"),
        ({"steps": 5}, "less than or equal to 4"),
        ({"noise": 1.5}, "less than or equal to 1"),
        ({"fps": 0}, "greater than 0"),
        ({"steps": 1, "min_steps": 2}, "min_steps 2 is above steps 1: give at most 1"),
        ({"fps": 8, "min_fps": 9}, "min_fps 9 is above fps 8"),
        ({"frames_per_block": 2, "max_frames_per_block": 1}, "max_frames_per_block 1 is below"),
        ({"tenant": "a.b"}, "tenant"),
        ({"quality": "cheap"}, "lowest_latency"),
    ],
)
def test_a_spec_says_what_would_be_accepted(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        spec(**changes)


def test_a_patch_may_not_blank_the_prompt() -> None:
    assert StreamPatch(steps=1).prompt is None
    with pytest.raises(ValidationError, match="the prompt is empty"):
        StreamPatch(prompt=" ")


def test_the_document_has_not_drifted() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(), "run: python -m shared.contracts.asyncapi"


def test_the_document_is_yaml_and_its_references_lead_somewhere() -> None:
    loaded = yaml.safe_load(render())
    assert loaded == document()
    assert loaded["asyncapi"] == "3.0.0"
    assert {channel["address"] for channel in loaded["channels"].values()} >= {
        "rheo.stream.{stream}.chunk",
        "rheo.pipeline.{pipeline}.stage.{stage}",
        "rheo.tensor.{owner}.get",
    }

    def check(node: object) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                target: object = loaded
                for part in node["$ref"].removeprefix("#/").split("/"):
                    assert isinstance(target, dict), node["$ref"]
                    assert part in target, node["$ref"]
                    target = target[part]
            for value in node.values():
                check(value)
        elif isinstance(node, list):
            for value in node:
                check(value)

    check(loaded)
    assert set(loaded["components"]["messages"]) == {message.__name__ for message in all_messages()}
