"""Everything that can be refused before a process is started: paths, clip, size, prompt, servers."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from services.cli.errors import CommandError
from shared.contracts.commands import FileSource, Fit, Mode, Mp4Sink, NoSource, StreamSpec
from shared.credentials import without_password
from shared.engine.plan.model_parts import Part, PartMissingError, find_parts, needed_parts
from shared.engine.plan.registry import model_spec
from shared.engine.plan.spec import ModelSpec, SpecError
from shared.media.probe import MediaError, MediaInfo, probe
from shared.media.salvage import part_path

DEFAULT_MODELS = Path("models")
OUTPUT_SUFFIXES = (".mp4", ".m4v")
ANSWER_S = 3.0  # within which a server must answer


@dataclass(frozen=True, slots=True)
class RunRequest:
    """A validated ``rheocast run``, or ``generate``, which has no source. ``frames`` are expected to come out."""

    source: Path | None
    output: Path
    frames: int | None
    model: ModelSpec
    spec: StreamSpec
    stages: int
    models_dir: Path | None = None


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``WxH`` in pixels, both multiples of 16."""
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    try:
        size = (int(width), int(height))
    except ValueError:
        raise CommandError(f"--size {text}: write it as WIDTHxHEIGHT, e.g. --size 320x192") from None
    if any(side < 16 or side > 2048 or side % 16 for side in size):
        near = "x".join(str(min(2048, max(16, round(side / 16) * 16))) for side in size)
        raise CommandError(f"--size {text}: both sides must be multiples of 16 from 16 to 2048, e.g. --size {near}")
    return size


def default_size(info: MediaInfo, model: ModelSpec) -> tuple[int, int]:
    """The model's default size, turned upright for a portrait source."""
    wide = (model.default_width, model.default_height)
    return wide if info.width >= info.height else (wide[1], wide[0])


def given_models_dir() -> Path | None:
    """The models folder that the environment names, if it exists."""
    named = os.environ.get("RHEOCAST_MODELS_DIR")
    return Path(named) if named and Path(named).expanduser().is_dir() else None


def models_dir_of(given: Path | None) -> Path | None:
    """The models folder: the one that was named, else ``./models`` if there is one, else None: what ships is known anyway."""
    if given is not None:
        if not given.expanduser().is_dir():
            raise CommandError(
                f"--models-dir {given}: there is no such folder; fill it with: rheocast models fetch NAME"
            )
        return given.expanduser().absolute()
    return DEFAULT_MODELS.absolute() if DEFAULT_MODELS.is_dir() else None


def model_of(name: str, models_dir: Path | None = None) -> ModelSpec:
    """The spec of a model. Refused with the names that are known."""
    try:
        return model_spec(name, models_dir)
    except SpecError as error:
        raise CommandError(f"--model {name}: {error}") from None


def check_parts(spec: ModelSpec, models_dir: Path | None = None) -> None:
    """Every part of the model is somewhere. Refused with what is missing and how to get it."""
    environment = {
        Part.DIT: "RHEOCAST_DIT",
        Part.VAE: "RHEOCAST_VAE_WEIGHTS",
        Part.TAEHV: "RHEOCAST_TAEHV_WEIGHTS",
        Part.TEXT: "RHEOCAST_TEXT_WEIGHTS",
    }
    overrides = {part: Path(value) for part, name in environment.items() if (value := os.environ.get(name))}
    try:
        chosen = spec.with_vae(os.environ.get("RHEOCAST_VAE", "auto"))
        parts = find_parts(spec.name, models_dir, overrides)
        for part in needed_parts(chosen):
            parts.need(part)
    except (SpecError, PartMissingError) as error:
        raise CommandError(str(error)) from None


def check_output(source: Path | None, output: Path) -> None:
    """The output can be written, and is not the input."""
    if output.suffix.lower() not in OUTPUT_SUFFIXES:
        raise CommandError(f"{output}: the output is an MP4 file, so name it *.mp4")
    if output.is_dir():
        raise CommandError(f"{output}: is a folder; name a file in it, e.g. {output / 'out.mp4'}")
    if not output.parent.is_dir():
        raise CommandError(f"{output}: its folder does not exist; create it with: mkdir -p {output.parent}")
    for written in (output, part_path(output)):
        if source is not None and source.exists() and written.exists() and source.samefile(written):
            raise CommandError(f"{output}: the output would overwrite the input; choose another name")
    probe_path = output.parent / f".{output.name}.{os.getpid()}.writable"
    try:
        probe_path.touch(exist_ok=False)
        probe_path.unlink()
        if output.exists() and not os.access(output, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise CommandError(
            f"{output}: cannot be written ({error.strerror}); choose a folder you may write to"
        ) from None


def run_request(
    source: Path,
    output: Path,
    *,
    prompt: str,
    steps: int,
    size: str | None,
    fps: float | None,
    seed: int,
    noise: float | None,
    stages: int,
    realtime: bool,
    model: str,
    fit: Fit,
    audio: bool = True,
    models_dir: Path | None = None,
) -> RunRequest:
    """Check everything about a run. Raises CommandError with the one line to show."""
    source, output = source.expanduser().absolute(), output.expanduser().absolute()
    wanted = parse_size(size)
    model_spec = model_of(model, models_dir)
    if not 1 <= stages <= model_spec.layers:
        raise CommandError(f"--stages {stages}: {model} can be split into 1 to {model_spec.layers} stages")
    try:
        info = probe(source)
    except MediaError as error:
        raise CommandError(str(error)) from None
    check_output(source, output)
    check_parts(model_spec, models_dir)
    width, height = wanted or default_size(info, model_spec)
    try:
        spec = StreamSpec(
            source=FileSource(path=str(source)),
            sinks=(Mp4Sink(path=str(output)),),
            prompt=prompt,
            mode=Mode.LIVE if realtime else Mode.LOSSLESS,
            model=model,
            width=width,
            height=height,
            fit=fit,
            fps=fps,
            steps=steps,
            noise=noise,
            seed=seed,
            audio=audio,
        )
    except ValidationError as error:
        raise CommandError(_first_complaint(error)) from None
    frames = info.frames if fps is None else round(info.duration_s * fps)
    return RunRequest(source, output, frames, model_spec, spec, stages, models_dir)


def generate_request(
    output: Path,
    *,
    prompt: str,
    seconds: float,
    steps: int,
    size: str | None,
    fps: float | None,
    seed: int,
    stages: int,
    model: str,
    models_dir: Path | None = None,
) -> RunRequest:
    """Check everything about video from text alone. Raises CommandError with the one line to show."""
    output, wanted = output.expanduser().absolute(), parse_size(size)
    model_spec = model_of(model, models_dir)
    if not 1 <= stages <= model_spec.layers:
        raise CommandError(f"--stages {stages}: {model} can be split into 1 to {model_spec.layers} stages")
    check_output(None, output)
    check_parts(model_spec, models_dir)
    width, height = wanted or (model_spec.default_width, model_spec.default_height)
    rate = fps or float(model_spec.default_fps)
    frames = max(1, round(seconds * rate))
    try:
        spec = StreamSpec(
            source=NoSource(frames=frames),
            sinks=(Mp4Sink(path=str(output)),),
            prompt=prompt,
            mode=Mode.LOSSLESS,
            model=model,
            width=width,
            height=height,
            fps=rate,
            steps=steps,
            seed=seed,
            audio=False,
        )
    except ValidationError as error:
        raise CommandError(_first_complaint(error)) from None
    return RunRequest(None, output, frames, model_spec, spec, stages, models_dir)


def _first_complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if isinstance(part, str))
    message = first["msg"].removeprefix("Value error, ")
    return f"--{place.replace('_', '-')}: {message}, not {first['input']!r}" if place and place != "prompt" else message


def shown_server(url: str, name: str) -> str:
    """A server's address as it may be shown: without a password, and with the scheme that may be left out."""
    return without_password(url if "://" in url else f"{name.lower()}://{url.removeprefix('//')}")


async def check_server(url: str, name: str, variable: str) -> None:
    """A TCP connection to the server a variable names. Refused with the variable to change."""
    shown, usual = shown_server(url, name), 6379 if name == "Redis" else 4222
    try:
        parts = urlsplit(shown)  # no piece of a password is taken for the host or the port
        host, port = parts.hostname or "127.0.0.1", parts.port or usual
    except ValueError as error:
        raise CommandError(f"{variable}={shown} is no address ({error}); write it like 127.0.0.1:{usual}") from None
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), ANSWER_S)
    except (OSError, TimeoutError):
        raise CommandError(
            f"{name} does not answer at {host}:{port}; start it, or unset {variable} to use the built-in one"
        ) from None
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


def check_port(host: str, port: int) -> None:
    """The port is free to listen on."""
    if not 1 <= port <= 65535:
        raise CommandError(f"--port {port}: choose one from 1 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise CommandError(
                f"port {port} on {host} is taken ({error.strerror}); choose another with --port"
            ) from None
