"""The one training command: what runs when, and that no part is left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import psutil
import pytest

from training.__main__ import main, run_beside, stages


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_the_dit_begins_when_the_encoder_stands_and_both_are_waited_for(tmp_path: Path):
    ready, seen = tmp_path / "vae", tmp_path / "seen"
    first = script(
        f"import time, pathlib; time.sleep(0.3); pathlib.Path({str(ready)!r}).touch(); time.sleep(0.5);"
        f"pathlib.Path({str(tmp_path / 'first')!r}).touch()"
    )
    second = script(
        f"import pathlib; pathlib.Path({str(seen)!r}).write_text(str(pathlib.Path({str(ready)!r}).exists()))"
    )
    assert run_beside(first, [ready], second) == 0
    assert seen.read_text() == "True"
    assert (tmp_path / "first").exists()


def test_a_part_that_fails_ends_the_other(tmp_path: Path):
    began, before = time.monotonic(), set(psutil.Process().children())
    assert run_beside(script("raise SystemExit(3)"), [tmp_path / "never"], script("pass")) == 3
    ready = tmp_path / "ready"
    ready.touch()
    assert run_beside(script("import time; time.sleep(60)"), [ready], script("raise SystemExit(4)")) == 4
    assert time.monotonic() - began < 20
    new = set(psutil.Process().children()) - before
    assert not [child for child in new if child.status() != psutil.STATUS_ZOMBIE]


def test_the_command_takes_its_part_along_when_it_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    began, handler = tmp_path / "began", signal.getsignal(signal.SIGTERM)
    part = script(f"import time, pathlib; pathlib.Path({str(began)!r}).touch(); time.sleep(60)")
    monkeypatch.setattr("training.__main__.stages", lambda _: ([part], [], []))
    monkeypatch.setattr("sys.argv", ["training", "--run", str(tmp_path)])

    def end_us() -> None:
        while not began.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = set(psutil.Process().children())
    ender = threading.Thread(target=end_us)
    ender.start()
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, handler)
        ender.join()
    assert ended.value.code == 128 + signal.SIGTERM
    assert not [child for child in set(psutil.Process().children()) - before if child.status() != psutil.STATUS_ZOMBIE]


def test_a_second_run_trains_the_text_encoder_only_when_asked(tmp_path: Path):
    args = Namespace(run=tmp_path, clips=8, workers=2, minutes=1.0, begin_with=None, anew_text=False)
    first, autoencoder, dit = stages(args)
    assert ["training.pool" in part for part in first] == [True, False]
    assert "training.train_text" in first[1]
    assert "training.train_autoencoder" in autoencoder
    assert "--begin-with" not in dit
    (tmp_path / "text.safetensors").touch()
    assert len(stages(args)[0]) == 1
    args.anew_text, args.begin_with = True, tmp_path
    first, _, dit = stages(args)
    assert len(first) == 2
    assert dit[-2:] == ["--begin-with", str(tmp_path)]
