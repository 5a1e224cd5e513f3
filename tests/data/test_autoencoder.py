import warnings

import pytest
import torch

from data.autoencoder import Pixels, open_autoencoder
from tests.golden_data import relative_error
from tests.networks import small_autoencoder


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    return folder, small_autoencoder(folder)


def test_latents_are_a_scaled_sample_of_the_posterior(vae_folder):
    folder, vae = vae_folder
    autoencoder = open_autoencoder(str(folder), 16)
    pixels, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    assert autoencoder.latent_shape((3, 16, 16)) == (4, 8, 8)
    latents = autoencoder.encode(pixels, noise)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        assert torch.allclose(latents, (posterior.mean + posterior.std * noise) * 0.25)
        assert torch.allclose(autoencoder.decode(latents), vae.decode(latents / 0.25).sample)


def test_in_bf16_it_decodes_to_the_same_pixels_within_its_precision(vae_folder):
    plain, half = (open_autoencoder(str(vae_folder[0]), 16, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    latents = torch.randn(3, 4, 8, 8)
    wanted, found = plain.decode(latents), half.decode(latents)
    assert found.dtype == torch.float32 and half._vae.dtype == torch.bfloat16
    assert 0 < relative_error(found, wanted) < 0.05
    moments = half.moments(torch.randn(2, 3, 16, 16))
    assert moments.dtype == torch.float32
    weight = half._vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_image_size_must_fit_the_factor(vae_folder):
    with pytest.raises(ValueError, match="image size 15 is not a multiple of the autoencoder's factor 2"):
        open_autoencoder(str(vae_folder[0]), 15).latent_shape((3, 15, 15))
    with pytest.raises(ValueError, match="image size 250 is not a multiple of the autoencoder's factor 8"):
        open_autoencoder("ema", 250)  # known before anything is loaded


def test_a_missing_autoencoder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder; give ema, mse, none"):
        open_autoencoder(str(tmp_path / "nothing"), 16)
    with pytest.raises(ValueError, match="cannot load the autoencoder .* without network"):
        open_autoencoder(str(tmp_path), 16)


def test_its_loader_does_not_talk(monkeypatch, recwarn):
    def failing(*args, **kwargs):
        warnings.warn("The `local_dir_use_symlinks` argument is deprecated", stacklevel=2)
        raise OSError("no connection")

    monkeypatch.setattr("diffusers.AutoencoderKL.from_pretrained", failing)
    with pytest.raises(ValueError, match=r"cannot load the autoencoder .*\(no connection\)"):
        open_autoencoder("ema", 256)
    assert not recwarn.list


def test_pixels_pass_through():
    pixels, x = open_autoencoder("none", 5), torch.randn(1, 1, 5, 5)
    assert isinstance(pixels, Pixels) and pixels.latent_shape((1, 5, 5)) == (1, 5, 5)
    assert pixels.encode(x, torch.zeros(())) is x and pixels.decode(x) is x
