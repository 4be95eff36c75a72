"""What the decoder learns from the DiT's estimates: cuts of which latents and pixels belong together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.engine.model.loading import load_tiny_vae
from shared.engine.plan.spec import ModelSpec
from training.estimates import make
from training.estimates_pool import Estimates
from training.linear_decoder import frames_to_cells
from training.procedural import make_clip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Latents that tell of which frames and cells they are; pixels that tell it too."""
    clips, latents, rows, columns = 6, 8, 4, 6
    frames = 1 + 4 * (latents - 1)
    kept = np.zeros((clips, latents, 3, rows, columns), np.float16)
    pixels = np.zeros((clips, frames, 3, 8 * rows, 8 * columns), np.uint8)
    for clip in range(clips):
        for n in range(latents):
            last = 4 * n  # the newest frame of this latent frame
            for y in range(rows):
                for x in range(columns):
                    kept[clip, n, :, y, x] = (clip, last, y * columns + x)
                    first = max(0, last - 3)
                    cell = pixels[clip, first : last + 1, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                    cell[:, 0], cell[:, 1], cell[:, 2] = clip, last, y * columns + x
    np.save(tmp_path / "latents.npy", kept)
    np.save(tmp_path / "pixels.npy", pixels)
    np.save(tmp_path / "styles.npy", np.zeros(clips, np.int64))
    return tmp_path


def test_a_cut_s_pixels_are_what_its_latents_tell_of(folder: Path) -> None:
    estimates = Estimates(folder, np.random.default_rng(1), held_out=2)
    seen: set[float] = set()
    for _ in range(20):
        z, video = estimates.draw(3, 9, 16, 24)
        assert z.shape == (3, 3, 3, 2, 3)
        assert video.shape == (3, 9, 3, 16, 24)
        whole = torch.cat([video[:, :1].expand(-1, 3, -1, -1, -1), video], 1)
        cells = frames_to_cells(whole).reshape(3, 3, 4, 64, 3, 2, 3) * 255
        for frame in range(4):
            told = cells[:, :, frame, 0]
            assert torch.equal(told.round()[:, 1:], z[:, 1:]), "later latent frames tell of all their four frames"
        assert torch.equal(cells[:, 0, 3, 0].round(), z[:, 0]), "the first one of its newest"
        seen |= set(z[:, :, 0].flatten().tolist())
    assert seen == {0.0, 1.0, 2.0, 3.0}, "the last two are never drawn"
    latents, pixels = estimates.held_out()
    assert (latents.shape[0], pixels.shape[0], float(latents[0, 0, 0, 0, 0])) == (2, 2, 4.0)


def test_what_was_not_finished_or_is_too_little_is_told(folder: Path) -> None:
    with pytest.raises(ValueError, match="make more"):
        Estimates(folder, np.random.default_rng(1), held_out=6)
    (folder / "styles.npy").unlink()
    with pytest.raises(FileNotFoundError):
        Estimates(folder, np.random.default_rng(1), held_out=2)


def test_estimates_are_made_as_they_are_served(tmp_path: Path) -> None:
    np.save(tmp_path / "clips.npy", np.stack([make_clip(seed, 29, 96, 160) for seed in range(10)]))
    model = Path(__file__).parents[2] / "shared" / "models" / "rheo-tiny"
    make(tmp_path / "clips.npy", model, tmp_path / "out", 2, 1)
    latents, pixels = np.load(tmp_path / "out" / "latents.npy"), np.load(tmp_path / "out" / "pixels.npy")
    assert (latents.shape, pixels.shape) == ((2, 8, 48, 12, 20), (2, 29, 3, 96, 160))
    vae = load_tiny_vae(ModelSpec.from_json(model / "spec.json"), model)
    with torch.no_grad():
        shown = vae.decode_clip(torch.from_numpy(latents).float())
    true = torch.from_numpy(pixels).float() / 255
    for made, wanted in zip(shown, true, strict=True):
        error = float((made - wanted).square().mean())
        assert error < 0.01, "20 dB: the decoder gets them as it does in a stream, and they are of these pixels"
        assert error < 0.2 * float((wanted - wanted.mean()).square().mean())
