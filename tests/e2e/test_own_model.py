"""``rheocast run`` with a published model's files at a tiny size, over every service; and with files that will not do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import Rheocast
from tests.support import clips, wan_files
from tests.support.wan_files import tiny_wan

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_models_folder_serves(rheocast: Rheocast, tmp_path: Path) -> None:
    source = clips.make_clip(tmp_path / "in.mp4", frames=9, width=64, height=48)
    folder = tmp_path / "models" / "tiny-wan"
    wan_files.write_model(tiny_wan(), folder)
    options = ("--prompt", "a neon cat", "--model", "tiny-wan", "--json")
    result = rheocast("run", source, "out.mp4", *options)  # ./models is found by itself
    assert result.code == 0, result.err
    assert (result.summary["model"], result.summary["frames_out"]) == ("tiny-wan", 9)

    # What will not do is refused in one line; before anything is started where that can be seen by the names of files.
    (folder / "Wan2.1_VAE.pth").unlink()
    missing = rheocast("run", source, "none.mp4", *options, "--models-dir", tmp_path / "models")
    assert missing.code == 2
    assert "no vae weights in" in missing.err
    assert len(missing.err.strip().splitlines()) == 1
    torch.save({"a": torch.zeros(1)}, folder / "Wan2.1_VAE.pth")
    wrong = rheocast("run", source, "none.mp4", *options)
    assert wrong.code == 1
    assert "are no weights of the Wan autoencoder" in wrong.err, "told at once: starting it again would not help"
    assert not (tmp_path / "none.mp4").exists()
