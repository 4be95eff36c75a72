"""The pool of clips: a pure function of its arguments, however often its drawing is stopped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from training import pool
from training.pool import build_pool
from training.procedural import make_clip
from training.runs import ClipPool

SHAPE = {"frames": 5, "height": 32, "width": 48, "seed": 7}


def test_a_pool_that_was_stopped_goes_on_to_the_same_clips(tmp_path: Path) -> None:
    path = build_pool(tmp_path, 3, **SHAPE, workers=1)
    whole = np.load(path)
    assert np.array_equal(whole[2], make_clip(9, 5, 32, 48))
    note = tmp_path / "pool.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"done": 1}))
    clips = np.lib.format.open_memmap(path, mode="r+")
    clips[1:] = 0
    clips.flush()
    with pytest.raises(ValueError, match="1 of 3 clips are drawn"):
        ClipPool(path, np.random.default_rng(0), held_out=1)
    assert np.array_equal(np.load(build_pool(tmp_path, 3, **SHAPE, workers=1)), whole)
    assert ClipPool(path, np.random.default_rng(0), held_out=1).draw(2, 5, 32, 48).shape == (2, 5, 3, 32, 48)


def test_another_pool_that_was_stopped_at_once_is_not_taken_for_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_pool(tmp_path, 3, **SHAPE, workers=1)
    whole = np.load(path)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as while_drawing:
        while_drawing.setattr(pool, "ProcessPoolExecutor", stopped)
        with pytest.raises(KeyboardInterrupt):
            build_pool(tmp_path, 2, **SHAPE, workers=1)
    with pytest.raises(ValueError, match="0 of 2 clips"):
        ClipPool(path, np.random.default_rng(0), held_out=1)
    assert np.array_equal(np.load(build_pool(tmp_path, 3, **SHAPE, workers=1)), whole)
