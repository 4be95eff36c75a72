"""The autoencoder is a choice beside the model: the full one, the tiny one, or the full encoder with the tiny decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor

from shared.engine.model.autoencoder import Autoencoder
from shared.engine.model.loading import WeightsError, check_vae, load_tiny_vae, load_vae, random_vae_weights
from shared.engine.model.mixed_vae import MixedVae
from shared.engine.model.wan_vae import WanVae
from shared.engine.plan.spec import PRESETS, SpecError, spec_of
from tests.support import wan_files
from tests.support.engine import clip
from tests.support.wan_files import tiny_wan

CPU = torch.device("cpu")
CLOSE = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("vae")
    wan_files.write_wan_base(folder)
    wan_files.write_taehv(tiny_wan(), folder / "taew2_1.pth")
    return folder


def _autoencoder(kind: str, folder: Path) -> Autoencoder:
    spec = tiny_wan(kind)
    return Autoencoder(load_vae(spec, folder), spec, CPU, torch.float32)


def test_presets_are_what_was_published() -> None:
    small, fast = spec_of("wan2.1-1.3b"), spec_of("wan2.1-1.3b-fast")
    assert (small.ring, small.sinks, small.sink_threshold, small.vae) == (6, 3, 0.2, "wan")
    assert (fast.ring, fast.sinks, fast.sink_threshold, fast.vae) == (5, 2, None, "wan+taehv")
    assert spec_of("wan2.1-14b-fast").layers == spec_of("wan2.1-14b").layers == 40
    assert small.steps == (700, 500, 400, 200)
    assert small.steps_from_text == (1000, 750, 500, 250)
    assert spec_of("rheo-tiny").steps_from_text == spec_of("rheo-tiny").steps
    assert not any(name.startswith("wan-") for name in PRESETS)


def test_the_choice_changes_what_latents_go_through() -> None:
    full = spec_of("wan2.1-1.3b")
    tiny, mixed = full.with_vae("taehv"), full.with_vae("wan+taehv")
    assert full.with_vae("auto") is full
    decoded_as_they_are = ((), (), (), ())
    assert (tiny.latent_scale, tiny.latent_shift, mixed.latent_scale, mixed.latent_shift) == decoded_as_they_are
    assert (tiny.encoder_scale, tiny.encoder_shift) == (full.latent_scale, full.latent_shift)
    assert (full.encoder_scale, mixed.encoder_scale) == ((), ()), "the full encoder's mean is used raw"
    assert tiny.with_vae("wan") == full
    with pytest.raises(SpecError, match="none of auto, wan, taehv"):
        full.with_vae("best")
    with pytest.raises(SpecError, match="an autoencoder of its own"):
        spec_of("rheo-tiny").with_vae("wan")


def test_the_original_names_of_two_residual_blocks_are_understood(folder: Path) -> None:
    theirs = wan_files.wan_vae()
    original = {wan_files.original_vae_name(name): t for name, t in theirs.state_dict().items()}
    assert "decoder.upsamples.3.resample.1.weight" in original
    assert "decoder.upsamples.7.time_conv.weight" in original
    assert "encoder.downsamples.2.resample.1.weight" in original
    assert original["encoder.downsamples.0.residual.2.weight"].shape == (8, 8, 3, 3, 3)
    # diffusers' ready-made converter knows exactly this layout: it must see the names as we do.
    converted: dict[str, Tensor] = convert_wan_vae_to_diffusers(dict(original))
    assert set(converted) == set(theirs.state_dict())
    ours = load_vae(tiny_wan(), folder)
    assert isinstance(ours, WanVae)
    assert all(torch.equal(t, converted[name]) for name, t in ours.model.state_dict().items())
    video = torch.rand(5, 3, 32, 48)
    mean: Any = theirs.encode((video * 2 - 1).transpose(0, 1)[None]).latent_dist.mode()
    assert torch.allclose(ours.encode(ours.new_memory(), video), mean[0].transpose(0, 1), atol=CLOSE)


def test_with_the_full_one_the_mean_is_raw_and_the_decoder_is_given_denormalised_latents(folder: Path) -> None:
    spec, pixels = tiny_wan(), clip(1, 5, 48, 32)
    vae, ours = load_vae(spec, folder), _autoencoder("wan", folder)
    raw = vae.encode(vae.new_memory(), pixels.permute(0, 3, 1, 2).float() / 255)
    assert torch.allclose(ours.encode(ours.encoder_state(), pixels), raw, atol=CLOSE)
    latents = torch.randn(2, 16, 4, 6)
    scale, shift = (torch.tensor(v)[:, None, None] for v in (spec.latent_scale, spec.latent_shift))
    shown = vae.decode(vae.new_memory(), latents * scale + shift)
    assert (ours.decode(ours.decoder_state(), latents).permute(0, 3, 1, 2) - shown * 255).abs().max() <= 0.51


def test_with_the_tiny_one_latents_are_brought_to_the_full_encoders_scale(folder: Path) -> None:
    spec, pixels = tiny_wan("taehv"), clip(1, 5, 48, 32)
    tiny, ours = load_tiny_vae(spec, folder), _autoencoder("taehv", folder)
    plain = tiny.encode(tiny.new_memory(), pixels.permute(0, 3, 1, 2))
    scale, shift = (torch.tensor(v)[:, None, None] for v in (spec.encoder_scale, spec.encoder_shift))
    assert torch.allclose(ours.encode(ours.encoder_state(), pixels), plain * scale + shift, atol=1e-4)
    latents = torch.randn(2, 16, 4, 6)
    shown = tiny.decode(tiny.new_memory(), latents)
    assert (ours.decode(ours.decoder_state(), latents).permute(0, 3, 1, 2) - shown * 255).abs().max() <= 0.51


def test_mixed_it_encodes_with_the_one_and_decodes_with_the_other_streamed(folder: Path) -> None:
    mixed, full, tiny = (_autoencoder(kind, folder) for kind in ("wan+taehv", "wan", "taehv"))
    pixels, latents = clip(2, 9, 48, 32), torch.randn(3, 16, 4, 6)
    states = [(a.encoder_state(), a.decoder_state()) for a in (mixed, full, tiny)]
    for frames, made in ((pixels[:5], latents[:2]), (pixels[5:], latents[2:])):
        assert torch.equal(mixed.encode(states[0][0], frames), full.encode(states[1][0], frames))
        assert torch.equal(mixed.decode(states[0][1], made), tiny.decode(states[2][1], made))
    copied = states[0][0].clone()
    assert copied.nbytes() == states[0][0].nbytes() > 0
    assert torch.equal(mixed.encode(copied, pixels[5:]), mixed.encode(states[0][0], pixels[5:]))
    assert isinstance(load_vae(tiny_wan("wan+taehv"), folder), MixedVae)


def test_tiny_widths_are_read_from_the_file_and_complaints_name_it(folder: Path, tmp_path: Path) -> None:
    assert tiny_wan("taehv").vae_widths == (256, 128, 64, 64), "the file is narrower than the spec says"
    assert load_tiny_vae(tiny_wan("taehv"), folder).encoder[0].weight.shape[0] == 8
    for kind in ("wan", "taehv", "wan+taehv"):
        assert check_vae(tiny_wan(kind), folder) == []
    state = random_vae_weights(spec_of("nano"))
    del state["encoder.4.conv.2.bias"]
    torch.save(state, tmp_path / "taew2_1.pth")
    assert check_vae(tiny_wan("taehv"), tmp_path) == [
        f"encoder.4.conv.2.bias: tensor missing in {tmp_path / 'taew2_1.pth'}"
    ]
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(WeightsError, match=r"Wan2\.1_VAE\.pth; these are no weights of the Wan autoencoder"):
        load_vae(tiny_wan(), tmp_path)
