"""Which encoder is taken, and with which options: hardware is pretended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import av
import av.error
import numpy as np
import pytest
from av.video.frame import PictureType

from services.egress import app
from services.egress.live import h264
from services.egress.live.h264 import SharedEncoder, best_encoder
from services.egress.settings import Settings
from services.egress.sinks.port import OutFrame

IDR = {"h264_nvenc": "forced-idr", "h264_qsv": "forced_idr"}


class Codec:
    """As NVENC and QSV are: only the first frame is a keyframe, unless they are told that a forced I-frame is one too.

    ``late``: it keeps a frame until the next comes. ``mute``: frames that it never gives back.
    """

    def __init__(self, name: str, late: bool = False, mute: int = -1, deaf: bool = False) -> None:
        self.name, self.options, self._late, self._mute, self._deaf = name, dict[str, str](), late, mute, deaf
        self._held: list[Any] = []
        self._count = 0

    def encode(self, picture: Any) -> list[Any]:
        if picture is None:
            held, self._held = self._held, []
            return held
        forced = picture.pict_type == PictureType.I and self.options.get(IDR[self.name]) == "1" and not self._deaf
        self._held.append(SimpleNamespace(pts=picture.pts, is_keyframe=self._count == 0 or forced))
        self._held = [packet for packet in self._held if packet.pts != self._mute]
        self._count += 1
        given, self._held = (self._held[:-1], self._held[-1:]) if self._late else (self._held, [])
        return given


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, Any]]]:
    """What hardware this machine has: name → how it behaves."""
    has: dict[str, dict[str, Any]] = {}

    def create(name: str, mode: str) -> Codec:
        if name not in has:
            raise av.error.ExternalError(1, "no device")
        return Codec(name, **has[name])

    monkeypatch.setattr(h264.av, "CodecContext", SimpleNamespace(create=create))
    best_encoder.cache_clear()
    yield has
    best_encoder.cache_clear()


def test_without_hardware_it_is_software(machine: dict[str, dict[str, Any]]) -> None:
    assert best_encoder() == h264.SOFTWARE


@pytest.mark.parametrize("name", sorted(IDR))
def test_hardware_that_is_told_to_make_keyframes_is_taken(machine: dict[str, dict[str, Any]], name: str) -> None:
    machine[name] = {}
    assert best_encoder() == name


@pytest.mark.parametrize("behaves", [{"deaf": True}, {"mute": 1}, {"mute": 2}], ids=str)
def test_hardware_that_gives_no_keyframe_or_no_packet_is_passed_over(
    machine: dict[str, dict[str, Any]], behaves: dict[str, Any]
) -> None:
    machine["h264_nvenc"] = behaves
    assert best_encoder() == h264.SOFTWARE
    best_encoder.cache_clear()
    machine["h264_qsv"] = {"late": True}
    assert best_encoder() == "h264_qsv"


@pytest.mark.parametrize("name", sorted(IDR))
def test_without_its_option_none_would_be_taken(
    machine: dict[str, dict[str, Any]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine[name] = {}
    monkeypatch.delitem(h264.OPTIONS, name)
    assert best_encoder() == h264.SOFTWARE


@pytest.mark.parametrize("name", ["h264_nvenc", "h264_qsv", h264.SOFTWARE])
def test_a_stream_encodes_with_the_options_that_were_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, str]]] = []
    opened = av.open

    class Mother:
        def __init__(self, container: Any) -> None:
            self._container = container

        def add_stream(self, name: str, **given: Any) -> Any:
            asked.append((name, given["options"]))
            return self._container.add_stream(h264.SOFTWARE, rate=given["rate"])

    monkeypatch.setattr(h264.av, "open", lambda *args, **given: Mother(opened(*args, **given)))
    encoder = SharedEncoder(64, 48, Fraction(10), name)
    encoder.encode(picture(0), True)
    ((got, options),) = asked
    assert got == name
    assert h264.OPTIONS[name].items() <= options.items()
    assert (options.get("preset") is None) == (name != h264.SOFTWARE), "x264's options are only x264's"


def test_a_keyframe_in_between_is_one_that_a_sink_can_begin_with() -> None:
    encoder = SharedEncoder(64, 48, Fraction(10))
    packets = [packet for pts in range(6) for packet in encoder.encode(picture(pts), pts == 3)]
    assert [packet.key for packet in packets] == [True, False, False, True, False, False]
    kinds = [{unit[0] & 31 for unit in packet.data.split(b"\x00\x00\x01")[1:]} for packet in packets]
    assert [5 in kind for kind in kinds] == [packet.key for packet in packets], "an IDR picture, not just an I-frame"


async def test_hardware_is_tried_before_a_stream_comes_and_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[tuple[str, bool]] = []
    loop = threading.current_thread()

    def tries(setting: str) -> str:
        happened.append((setting, threading.current_thread() is loop))
        return h264.SOFTWARE

    class Handlers:
        def __init__(self, *_: Any) -> None: ...

        async def start(self) -> None:
            happened.append(("start", True))

    monkeypatch.setattr(app, "encoder_of", tries)
    monkeypatch.setattr(app, "Handlers", Handlers)
    context: Any = SimpleNamespace(
        instance="egress-0",
        bus=None,
        store=None,
        tensors=None,
        clock=None,
        telemetry=SimpleNamespace(tracer=None),
        metrics=SimpleNamespace(histogram=lambda _: None),
    )
    await app.Egress(context, Settings(h264_encoder="auto")).start()
    assert happened == [("auto", False), ("start", True)]


def picture(pts: int) -> OutFrame:
    return OutFrame(np.full((48, 64, 3), 30 * pts, np.uint8), pts, 1, Fraction(1, 10))
