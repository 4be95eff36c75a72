"""Video clips made on the spot with PyAV: every kind of file that ingest must take, small and quick to make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BEEP_S = 0.2


@dataclass(frozen=True)
class Audio:
    """A sound track: a tone of ``seconds``, starting at ``offset_s``. ``codec`` is FFmpeg's encoder name.

    ``beeps``: it is silent but for 0.2 s from each of these times on.
    """

    codec: str = "aac"
    rate: int = 48_000
    seconds: float = 1.0
    offset_s: float = 0.0
    beeps: tuple[float, ...] = ()


def moving(index: int, width: int, height: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: a bright bar that moves with the index over a colour gradient."""
    index += 5 * seed
    y, x = np.mgrid[0:height, 0:width]
    blue = np.full_like(x, 90 + 20 * seed % 160)
    picture = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), blue], axis=-1)
    left = index * 7 % max(1, width - 8)
    picture[:, left : left + 8] = 235
    return picture.astype(np.uint8)


def corners(width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: quarters in red (top left), green (top right), blue (bottom left) and white."""
    picture = np.zeros((height, width, 3), np.uint8)
    half_y, half_x = height // 2, width // 2
    picture[:half_y, :half_x] = (220, 30, 30)
    picture[:half_y, half_x:] = (30, 220, 30)
    picture[half_y:, :half_x] = (30, 30, 220)
    picture[half_y:, half_x:] = (230, 230, 230)
    return picture


def make_clip(
    path: Path,
    *,
    width: int = 96,
    height: int = 64,
    frames: int = 12,
    fps: float = 16,
    pts: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 90_000),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int = 0,
    sample_aspect: Fraction | None = None,
    audio: Audio | bool = False,
    picture: Any = moving,
    seed: int = 0,
    container_options: dict[str, str] | None = None,
    flashes: Sequence[float] | None = None,
) -> Path:
    """Write a clip. ``pts`` gives every frame's timestamp in ``time_base``, else they are even. Returns ``path``.

    ``flashes``: it is black, and white for 0.2 s from each of these times on.
    """
    if pix_fmt == "yuv420p" and (width % 2 or height % 2):
        pix_fmt = "yuv444p"  # halved colour needs even sides
    if audio is True:
        audio = Audio(seconds=frames / fps)
    stamps = list(pts) if pts is not None else [round(i / fps / time_base) for i in range(frames)]
    with av.open(str(path), "w", options=container_options or {}) as container:
        video: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        video.width, video.height, video.pix_fmt = width, height, pix_fmt
        video.codec_context.time_base = video.time_base = time_base
        if codec in ("libx264", "libx265"):
            video.options = {"preset": "ultrafast", "bf": "0", "x265-params": "log-level=none"}
        if sample_aspect is not None:
            video.codec_context.sample_aspect_ratio = sample_aspect
        if rotation:
            video.set_display_rotation(rotation)
        sound = _Tone(container, audio) if isinstance(audio, Audio) else None
        for index, stamp in enumerate(stamps):
            array = picture(index, width, height, seed) if picture is moving else picture(width, height)
            if flashes is not None:
                at = float(stamp * time_base)
                array = np.full_like(array, 255 * any(flash <= at + 1e-6 < flash + BEEP_S for flash in flashes))
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = stamp, time_base
            container.mux(video.encode(frame))
            if sound is not None:
                sound.until(float(stamp * time_base))
        container.mux(video.encode(None))
        if sound is not None:
            sound.finish()
    return path


class _Tone:
    def __init__(self, container: Any, audio: Audio) -> None:
        self._container, self._audio = container, audio
        self._stream: Any = container.add_stream(audio.codec, rate=audio.rate)
        self._stream.layout = "stereo"
        context = self._stream.codec_context
        self._resampler = av.AudioResampler(
            format=context.format, layout="stereo", rate=audio.rate, frame_size=context.frame_size or 0
        )
        self._done = 0

    def until(self, seconds: float) -> None:
        while self._done / self._audio.rate < min(seconds, self._audio.seconds):
            phase = (self._done + np.arange(1024)) * (2 * np.pi * 440 / self._audio.rate)
            wave = (np.sin(phase) * 0.3).astype(np.float32)
            if self._audio.beeps:
                at = (self._done + np.arange(1024)) / self._audio.rate
                wave *= np.any([(at >= beep) & (at < beep + BEEP_S) for beep in self._audio.beeps], axis=0)
            frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
            frame.sample_rate = self._audio.rate
            frame.time_base = Fraction(1, self._audio.rate)
            frame.pts = self._done + round(self._audio.offset_s * self._audio.rate)
            self._done += 1024
            self._encode(self._resampler.resample(frame))

    def finish(self) -> None:
        self.until(self._audio.seconds)
        self._encode(self._resampler.resample(None))
        self._container.mux(self._stream.encode(None))

    def _encode(self, frames: list[Any]) -> None:
        for frame in frames:
            self._container.mux(self._stream.encode(frame))


def make_vfr_clip(path: Path, *, frames: int = 12, **options: Any) -> Path:
    """A clip with a variable frame rate: gaps of 1/30, 1/60, 1/20 and 1/8 s in turn."""
    pts, stamps = 0, list[int]()
    for index in range(frames):
        stamps.append(pts)
        pts += (3000, 1500, 4500, 11250)[index % 4]
    return make_clip(path, pts=stamps, **options)


def make_jumping_clip(path: Path, *, frames: int = 12, ahead_s: int = 2) -> Path:
    """A clip whose clock jumps ahead by ``ahead_s`` in its middle."""
    half = frames // 2
    return make_clip(path, pts=[i * 5625 + (ahead_s * 90_000 if i >= half else 0) for i in range(frames)])


def make_backward_clip(path: Path, *, frames: int = 12) -> Path:
    """A transport stream (.ts) whose clock starts again in its middle, as when two recordings are joined."""
    pieces = [make_clip(path.with_suffix(f".{n}.ts"), frames=frames // 2, seed=n) for n in (0, 1)]
    path.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    return path


def make_rotated_clip(path: Path, *, frames: int = 6, degrees: int = -90, **options: Any) -> Path:
    """A clip from an upright phone: stored lying, to be turned when it is shown (``degrees`` counter-clockwise)."""
    return make_clip(path, frames=frames, rotation=degrees, **options)


def make_ten_bit_clip(path: Path, *, frames: int = 6) -> Path:
    """Ten bits a sample."""
    return make_clip(path, frames=frames, pix_fmt="yuv420p10le")


def make_alpha_clip(path: Path, *, frames: int = 6) -> Path:
    """With transparency (.mov)."""
    return make_clip(path, frames=frames, codec="prores_ks", pix_fmt="yuva444p10le")


def make_audio_only(path: Path) -> Path:
    """A file with a sound track and no pictures."""
    with av.open(str(path), "w") as container:
        tone = _Tone(container, Audio(seconds=0.3))
        tone.finish()
    return path


def make_without_index(path: Path) -> Path:
    """An MP4 cut off before its index: a recording whose power was cut."""
    whole = make_clip(path.with_suffix(".whole.mp4"))
    data = whole.read_bytes()
    path.write_bytes(data[: data.index(b"moov") - 4])
    return path


def make_cut_clip(path: Path, *, frames: int = 48, keep: float = 0.5, **options: Any) -> Path:
    """An MP4 with its index in front and only the first part of its pictures behind it: a copy cut short."""
    whole = make_clip(
        path.with_suffix(".whole.mp4"), frames=frames, container_options={"movflags": "+faststart"}, **options
    )
    data = whole.read_bytes()
    begin = data.index(b"mdat") + 4
    path.write_bytes(data[: begin + int((len(data) - begin) * keep)])
    return path


def make_broken_clip(path: Path, *, frames: int = 48) -> Path:
    """A clip from whose middle on there is noise instead of pictures."""
    whole = make_clip(path.with_suffix(f".whole{path.suffix}"), frames=frames)
    data = bytearray(whole.read_bytes())
    middle = len(data) // 2
    noise = np.random.default_rng(1).integers(0, 256, len(data) // 4, dtype=np.uint8)
    data[middle : middle + noise.size] = noise.tobytes()
    path.write_bytes(data)
    return path


def timestamps(path: Path, kind: str = "video") -> list[Fraction]:
    """The presentation time in seconds of every decoded frame of a file's first ``kind`` stream."""
    with av.open(str(path)) as container:
        frames = container.decode(video=0) if kind == "video" else container.decode(audio=0)
        return [frame.pts * frame.time_base for frame in frames]


def boxes(path: Path) -> list[str]:
    """The names of an MP4's outermost boxes, in order."""
    data, names, position = path.read_bytes(), list[str](), 0
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        names.append(data[position + 4 : position + 8].decode("latin1"))
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        position += size or len(data)
    return names


def lip_sync(path: Path) -> list[float]:
    """How long after each flash its beep begins, in seconds: from its first bright frame to the first loud sample."""
    flashes: list[float] = []
    beeps: list[float] = []
    with av.open(str(path)) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        was_bright, quiet_until = True, -1.0
        for frame in container.decode(video, sound):
            assert frame.time is not None
            if isinstance(frame, av.VideoFrame):
                bright = bool(frame.to_ndarray(format="gray").mean() > 128)
                if bright and not was_bright:
                    flashes.append(frame.time)
                was_bright = bright
                continue
            loud = np.flatnonzero(np.abs(frame.to_ndarray().astype(np.float64)).reshape(-1)[: frame.samples] > 0.1)
            if loud.size:
                begins = frame.time + float(loud[0]) / frame.sample_rate
                if begins > quiet_until:
                    beeps.append(begins)
                quiet_until = frame.time + 2 * frame.samples / frame.sample_rate
    return [min((beep - flash for beep in beeps), key=abs, default=float("inf")) for flash in flashes]


def sound_begins(path: Path) -> float:
    """When sound sets in, in seconds: the first sample that is not silence."""
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            samples = np.abs(frame.to_ndarray().astype(np.float64)).reshape(-1)
            samples = samples / {"s16": 2**15, "s16p": 2**15, "s32p": 2**31, "s32": 2**31}.get(frame.format.name, 1)
            channels = 1 if frame.format.is_planar else frame.layout.nb_channels
            loud = np.flatnonzero(samples > 0.1)
            if loud.size and frame.time is not None:
                return frame.time + float(loud[0] // channels % frame.samples) / frame.sample_rate
    raise AssertionError(f"{path} is silent")


def decoder_name(path: Path) -> str:
    """FFmpeg's name of the sound track's codec."""
    with av.open(str(path)) as container:
        return container.streams.audio[0].codec_context.name
