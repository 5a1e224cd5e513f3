"""Between pixels and the space that the network works in.

Pixels are (N, C, H, W) float32 in [-1, 1] on this side, latents on the other. What a data set hands out (uint8 images,
or stored moments) goes into `encode` as it is.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from data.pixels import from_uint8
from runtime.download import quiet_hub

OFFICIAL_VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
OFFICIAL_FACTOR = 8
OFFICIAL_CHANNELS = 4  # of their latents


class Autoencoder(Protocol):
    """What train and sample need to know about a latent space."""

    @property
    def weight_bytes(self) -> int:
        """Memory that its weights take on the device."""
        ...

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, H, W) of the latents of images (C, H, W)."""
        ...

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """Latents of a batch as the data set hands it out.

        Args:
            images: (N, C, H, W) uint8, or float32 in [-1, 1]; for `StoredLatents` (N, 2 C, h, w) moments.
            noise: standard normal in the shape of the latents.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents."""
        ...


class Pixels:
    """No autoencoder: the network works on pixels."""

    weight_bytes = 0

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The image's own shape."""
        channels, height, width = image_shape
        return channels, height, width

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """The pixels themselves."""
        return _unit_range(images)

    def decode(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents


class KLAutoencoder:
    """A diffusers AutoencoderKL; latents are samples of its posterior times its scaling factor.

    Args:
        source: hub name or local folder.
        device: where it runs.
        dtype: of its weights and computations; float32, or bfloat16, which decodes about three times as fast and as
            close as pixels are fine. Latents and pixels are float32 either way.

    Raises:
        ValueError: if it cannot be loaded.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from diffusers import AutoencoderKL  # heavy, and only latents need it
        from diffusers.utils import logging

        level = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)  # what matters is said below, in one line
        try:
            with quiet_hub():
                vae: Any = AutoencoderKL.from_pretrained(source, low_cpu_mem_usage=False, torch_dtype=dtype)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot load the autoencoder {source!r} from disk, cache or hub; without network download it and give "
                f"its folder, or none for pixels ({str(error).splitlines()[0]})"
            ) from error
        finally:
            logging.set_verbosity(level)
        self._vae = vae.to(device).eval().requires_grad_(False)
        if dtype != torch.float32:  # there convolutions want channels last; float32 keeps the rounding of training
            self._vae.to(memory_format=torch.channels_last)
        self.scale = float(vae.config.scaling_factor)
        self.image_channels = int(vae.config.in_channels)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in vae.parameters())

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(latent channels, H / f, W / f).

        Raises:
            ValueError: if f does not divide the image's sides, or the images have other channels.
        """
        channels, height, width = image_shape
        if channels != self.image_channels:
            raise ValueError(f"the autoencoder takes images of {self.image_channels} channels, not {channels}")
        for side in (height, width):
            _check_factor(side, self.factor)
        return self._vae.config.latent_channels, height // self.factor, width // self.factor

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """A sample of the posterior, made from the given noise."""
        return sample_moments(self.moments(images), noise, self.scale)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Mean and standard deviation of the posterior, not scaled.

        Args:
            pixels: (N, C, H, W) uint8, or float32 in [-1, 1].

        Returns:
            (N, 2 C, h, w) float32: C channels of means, then C of standard deviations.
        """
        posterior = self._vae.encode(self._as_own(_unit_range(pixels))).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    def encoder_sha256(self) -> str:
        """Fingerprint of the weights that encode; autoencoders that differ in the decoder alone share it."""
        digest = hashlib.sha256()
        for name, weight in sorted(self._vae.state_dict().items()):
            if not name.startswith(("decoder.", "post_quant_conv.")):
                digest.update(f"{name} {tuple(weight.shape)} ".encode())
                digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped, float32."""
        return self._vae.decode(self._as_own(latents / self.scale)).sample.float()

    def _as_own(self, x: Tensor) -> Tensor:
        return x.to(self._vae.dtype)


def sample_moments(moments: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Latents from moments: (mean + std * noise) * scale.

    Args:
        moments: (N, 2 C, h, w), means before standard deviations, of any float type.
        noise: (N, C, h, w) float32 standard normal.
        scale: the autoencoder's scaling factor.

    Returns:
        (N, C, h, w) float32.
    """
    mean, std = moments.float().chunk(2, dim=1)
    return (mean + std * noise) * scale


def open_autoencoder(
    name: str, image_size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Opens an autoencoder by the value of `--vae`.

    Args:
        name: "ema", "mse", "none", or a local folder.
        image_size: side of the images it will see.
        device: where it runs.
        dtype: precision of an AutoencoderKL.

    Raises:
        ValueError: if it cannot be loaded, or cannot take such images (known of the official ones before loading).
    """
    if name == "none":
        return Pixels()
    if name in OFFICIAL_VAES:
        _check_factor(image_size, OFFICIAL_FACTOR)
    elif not Path(name).is_dir():
        raise ValueError("no such folder; give ema, mse, none, or the folder of an AutoencoderKL")
    return KLAutoencoder(OFFICIAL_VAES.get(name, name), device, dtype)


def _unit_range(pixels: Tensor) -> Tensor:
    return from_uint8(pixels) if pixels.dtype == torch.uint8 else pixels


def _check_factor(side: int, factor: int) -> None:
    if side % factor:
        raise ValueError(f"image size {side} is not a multiple of the autoencoder's factor {factor}")
