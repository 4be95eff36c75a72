"""Ctrl-C at any moment: a playable file of what was done, exit 130, nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import Rheocast
from tests.support import clips
from tests.support.lab import frames_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

OPTIONS = ("--prompt", "a pencil drawing", "--size", "96x64", "--json")


@pytest.mark.parametrize("seconds", [0.6, 2.0])
def test_ctrl_c_after_some_seconds(rheocast: Rheocast, tmp_path: Path, seconds: float) -> None:
    source = clips.make_clip(tmp_path / "in.mp4", frames=600, width=96, height=64, fps=16)
    process = rheocast.start("run", source, "out.mp4", *OPTIONS, "--realtime")
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    output = tmp_path / "out.mp4"
    if output.exists():
        assert len(frames_of(output)) > 0
    assert not list(tmp_path.glob("*.part*"))


def test_ctrl_c_while_it_works_keeps_what_was_done(rheocast: Rheocast, tmp_path: Path) -> None:
    source = clips.make_clip(tmp_path / "in.mp4", frames=960, width=96, height=64, fps=16)
    output = tmp_path / "out.mp4"
    process = rheocast.start("run", source, output, *OPTIONS, "--realtime")
    until = time.monotonic() + 60
    part = tmp_path / "out.part.mp4"
    while not (part.exists() and part.stat().st_size > 2000) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(2.0)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 130, err
    assert len(frames_of(output)) >= 8
