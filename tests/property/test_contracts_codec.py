"""Any message of the catalog survives the wire; any bytes give a message or BadMessageError."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_origin

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from shared.contracts.catalog import CHANNELS
from shared.contracts.codec import BadMessageError, decode, encode
from shared.contracts.refs import DTYPE_BYTES, Wire

INT = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return values(args[0])
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([values(each) for each in args])
    if origin is tuple:
        if len(args) == 2 and args[1] is ...:
            return st.lists(values(args[0]), max_size=3).map(tuple)
        return st.tuples(*(values(each) for each in args))
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if kind is type(None):
        return st.none()
    if isinstance(kind, type) and issubclass(kind, Enum):
        return st.sampled_from(kind)
    if isinstance(kind, type) and issubclass(kind, Wire):
        return messages(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{field.name: values(hints[field.name]) for field in dataclasses.fields(kind)})
    return {
        int: INT,
        float: st.floats(allow_nan=False),
        str: TEXT,
        bool: st.booleans(),
        bytes: st.binary(max_size=20),
    }[kind]


SMALL = {
    "prompt": st.text("abc ", min_size=1, max_size=20).filter(str.strip),
    "path": st.text("abc/", min_size=1, max_size=20),
    "width": st.none(),
    "height": st.none(),
    "fps": st.one_of(st.none(), st.floats(1, 240)),
    "steps": st.integers(1, 4),
    "noise": st.floats(0, 1),
    "seed": st.integers(0, 2**63 - 1),
    "frames_per_block": st.integers(1, 3),
    "deadline_ms": st.integers(50, 60_000),
    "skip_similar": st.floats(0, 1),
    "steadying": st.one_of(st.none(), st.floats(0, 0.9)),
    "frames": st.integers(0, 1000),
    "prompts": st.just(()),  # or prompt, not both
    "paused": st.none(),  # it comes alone
    "blend_chunks": st.integers(0, 64),
    "tenant": st.text("abcXYZ012_-", min_size=1, max_size=64),
    "min_steps": st.just(1),
    "min_fps": st.one_of(st.none(), st.floats(0.1, 1)),
    "peer_grace_s": st.one_of(st.none(), st.floats(1, 3600)),
    "max_frames_per_block": st.one_of(st.none(), st.just(3)),
    "shape": st.lists(st.integers(0, 12), max_size=8).map(tuple).filter(lambda shape: math.prod(shape) <= 1 << 27),
    "dtype": st.sampled_from(sorted(DTYPE_BYTES)),
    "first": st.integers(0, 20),
    "last": st.integers(20, 1023),
    "stage": st.integers(0, 1023),
    "stages": st.integers(1, 1024),
}
"""Fields with limits that they do not declare themselves, or to be kept small: a stream's spec and patch, and a tensor."""


def bounded(field: FieldInfo) -> st.SearchStrategy[Any]:
    """Values of a field, within the limits that it declares itself."""
    kind = field.annotation
    limits: dict[str, Any] = {}
    for each in field.metadata:
        limits |= {n: v for n in ("ge", "gt", "le", "lt", "pattern") if (v := getattr(each, n, None)) is not None}
        limits |= {n: v for n in ("min_length", "max_length") if (v := getattr(each, n, None)) is not None}
    if not limits or kind not in (int, float, str, bytes):
        return values(kind)
    if kind is str and "pattern" in limits:
        return st.from_regex(limits["pattern"], fullmatch=True)
    if kind in (str, bytes):
        low, high = limits.get("min_length", 0), min(limits.get("max_length", 20), 20)
        return st.binary(min_size=low, max_size=high) if kind is bytes else st.text("abc/", min_size=low, max_size=high)
    low, high = limits.get("ge", limits.get("gt", -(2**63))), limits.get("le", limits.get("lt", 2**63 - 1))
    if kind is int:
        return st.integers(low + ("gt" in limits), high - ("lt" in limits))
    return st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits)


def messages(message: type[Wire]) -> st.SearchStrategy[Wire]:
    """Valid messages of a type."""
    limited = message.__name__ in (
        "StreamSpec",
        "StreamPatch",
        "TensorRef",
        "BlockRange",
        "CutOver",
    )
    fields = {
        name: SMALL[name] if limited and name in SMALL else bounded(field)
        for name, field in message.model_fields.items()
        if name != "kind"
    }
    return st.deferred(lambda: st.fixed_dictionaries(fields).map(lambda given: _valid(message, given)))


def _valid(message: type[Wire], given: dict[str, Any]) -> Wire:
    try:
        return message(**given)
    except ValidationError as error:  # a limit that SMALL should know of
        raise AssertionError(f"{message.__name__}: {error}") from error


UNIONS = [union for channel in CHANNELS for union in (channel.messages, channel.replies) if union]
CASES = [pytest.param(union, message, id=message.__name__) for union in UNIONS for message in union]


@pytest.mark.parametrize(("union", "message"), CASES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_message_survives_the_wire(union: tuple[type[Wire], ...], message: type[Wire], data: st.DataObject) -> None:
    sent = data.draw(messages(message))
    wire = encode(sent)
    assert decode(union, wire) == sent
    grown = {**msgpack.unpackb(wire, strict_map_key=False), "a_field_of_the_future": [1, {"x": None}]}
    assert decode(union, msgpack.packb(grown)) == sent


def message_or_bad(union: tuple[type[Wire], ...], data: bytes) -> None:
    """Decode; nothing but BadMessageError may come of it."""
    with contextlib.suppress(BadMessageError):
        assert isinstance(decode(union, data), union)


@settings(max_examples=300, deadline=None)
@given(union=st.sampled_from(UNIONS), data=st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_bad_message(union: tuple[type[Wire], ...], data: bytes) -> None:
    message_or_bad(union, data)


PLAIN = st.recursive(
    st.none() | st.booleans() | INT | st.floats() | TEXT | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | INT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(union=st.sampled_from(UNIONS), data=st.data())
def test_any_maps_are_a_message_or_a_bad_message(union: tuple[type[Wire], ...], data: st.DataObject) -> None:
    message = data.draw(st.sampled_from(union))
    kind = message.model_fields["kind"].default
    names = st.sampled_from([name for name in message.model_fields if name != "kind"])
    plain = {**data.draw(st.dictionaries(names, PLAIN, max_size=6)), "kind": kind}
    message_or_bad(union, msgpack.packb(plain))


@pytest.mark.parametrize(("union", "message"), CASES)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_message_cut_short_is_a_bad_message(
    union: tuple[type[Wire], ...], message: type[Wire], data: st.DataObject
) -> None:
    wire = encode(data.draw(messages(message)))
    cut = data.draw(st.integers(0, len(wire) - 1))
    with pytest.raises(BadMessageError):
        decode(union, wire[:cut])
