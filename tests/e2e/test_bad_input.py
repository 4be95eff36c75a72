"""What will not do is refused in one line that names the fix; what is merely odd comes out whole."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Result, Rheocast
from tests.support import clips

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

OPTIONS = ("--prompt", "a pencil drawing", "--size", "96x64")


def refused(result: Result, *words: str) -> None:
    assert result.code == 2, (result.code, result.out, result.err)
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, f"one line was expected:\n{result.err}"
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return clips.make_clip(tmp_path / "in.mp4", frames=5, width=96, height=64)


def test_missing_file(rheocast: Rheocast) -> None:
    refused(rheocast("run", "nothing.mp4", "out.mp4", *OPTIONS), "nothing.mp4")


def test_directory(rheocast: Rheocast, tmp_path: Path) -> None:
    refused(rheocast("run", tmp_path, "out.mp4", *OPTIONS), "folder")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("text.mp4", lambda path: path.write_text("not a video at all\n" * 40)),
        ("empty.mp4", lambda path: path.touch()),
        ("cut.mp4", lambda path: clips.make_without_index(path)),
        ("sound.m4a", lambda path: clips.make_audio_only(path)),
    ],
)
def test_what_is_not_a_video(rheocast: Rheocast, tmp_path: Path, name: str, make: Callable[[Path], object]) -> None:
    make(tmp_path / name)
    refused(rheocast("run", name, "out.mp4", *OPTIONS), name)
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("steps", ["0", "9"])
def test_steps_out_of_range(rheocast: Rheocast, clip: Path, steps: str) -> None:
    refused(rheocast("run", clip, "out.mp4", *OPTIONS, "--steps", steps), "steps")


@pytest.mark.parametrize("size", ["0x-3", "333x187", "big"])
def test_size_that_cannot_be(rheocast: Rheocast, clip: Path, size: str) -> None:
    refused(rheocast("run", clip, "out.mp4", "--prompt", "x", f"--size={size}"), "--size")


def test_empty_prompt(rheocast: Rheocast, clip: Path) -> None:
    refused(rheocast("run", clip, "out.mp4", "--prompt", "  "), "prompt")


def test_unwritable_output(rheocast: Rheocast, clip: Path) -> None:
    refused(rheocast("run", clip, "no/such/folder/out.mp4", *OPTIONS), "mkdir -p")
    refused(rheocast("run", clip, "/proc/out.mp4", *OPTIONS), "cannot be written")


def test_output_over_input(rheocast: Rheocast, clip: Path) -> None:
    before = clip.read_bytes()
    refused(rheocast("run", clip, clip, *OPTIONS), "overwrite")
    assert clip.read_bytes() == before


def test_unknown_model(rheocast: Rheocast, clip: Path) -> None:
    refused(rheocast("run", clip, "out.mp4", *OPTIONS, "--model", "sora"), "rheo-tiny")


@pytest.mark.parametrize("variable", ["RHEOCAST_NATS_URL", "RHEOCAST_REDIS_URL"])
def test_unreachable_server(rheocast: Rheocast, clip: Path, variable: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    scheme = "nats" if "NATS" in variable else "redis"
    refused(rheocast("run", clip, "out.mp4", *OPTIONS, env={variable: f"{scheme}://127.0.0.1:{port}"}), variable)


def test_port_taken(rheocast: Rheocast) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refused(rheocast("up", "--port", str(taken.getsockname()[1])), "taken", "--port")


def test_missing_prompt_and_unknown_option(rheocast: Rheocast, clip: Path) -> None:
    refused(rheocast("run", clip, "out.mp4"), "--prompt")
    refused(rheocast("run", clip, "out.mp4", *OPTIONS, "--fast"), "--fast")


def test_doctor_finds_this_machine_well(rheocast: Rheocast) -> None:
    result = rheocast("doctor", "--json")
    assert result.summary["ok"], result.out
    assert {finding["what"] for finding in result.summary["findings"]} >= {
        "torch",
        "nats-server",
        "redis-server",
        "device",
    }
    plain = rheocast("doctor")
    assert plain.code == 0
    assert "All is well." in plain.out
