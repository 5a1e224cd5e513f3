"""Images and latents on disk -> batches; pixels -> files."""

from __future__ import annotations

from pathlib import Path

import torch

from data.autoencoder import Autoencoder, open_autoencoder
from data.batches import GlobalBatches
from data.digits import Split, load_digits
from data.image_folder import ArrayImages, ImageFolder
from data.latents import LatentShards

__all__ = ["DATASETS", "GlobalBatches", "ImageDataset", "load_digits", "open_dataset", "open_digits", "open_encoder"]

ImageDataset = ImageFolder | ArrayImages | LatentShards
DATASETS = ("imagefolder", "digits", "latents")


def open_dataset(
    name: str,
    path: Path | None,
    image_size: int | None,
    channels: int,
    *,
    flip: bool | None = None,
    seed: int = 0,
    strict: bool = False,
) -> ImageDataset:
    """Opens a training set by the value of `--dataset`.

    Args:
        name: one of `DATASETS`.
        path: root of an image folder, or folder of latents; the embedded digits need none.
        image_size: side of the square images; None takes 256, or what the digits (8) or the latents have.
        channels: 3 for RGB, 1 for grey; the digits are grey.
        flip: mirror at random; None does so for photographs and not for digits.
        seed: of the flips.
        strict: an image that cannot be read is an error, instead of being replaced and named.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    if name == "digits":
        digits = open_digits("train", flip=bool(flip), seed=seed)
        if image_size not in (None, digits.image_shape[-1]):
            raise ValueError(f"the digits are {digits.image_shape[-1]} pixels wide, not {image_size}")
        return digits
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    if path is None:
        raise ValueError(f"{'an image folder' if name == 'imagefolder' else 'a folder of latents'} needs --data-path")
    if name == "imagefolder":
        flip = flip is not False
        return ImageFolder(path, image_size or 256, channels=channels, flip=flip, seed=seed, strict=strict)
    latents = LatentShards(path, flip=flip, seed=seed)
    wanted = (channels, *[image_size or latents.image_shape[-1]] * 2)
    if latents.image_shape != wanted:
        raise ValueError(f"the latents are of images {latents.image_shape}, not {wanted}; check size and channels")
    return latents


def open_digits(split: Split, *, flip: bool = False, seed: int = 0) -> ArrayImages:
    """A split of the embedded digits, "train" or "test", as a data set."""
    images, labels = load_digits(split)
    return ArrayImages(images, labels, [str(k) for k in range(10)], flip=flip, seed=seed)


def open_encoder(dataset: ImageDataset, vae: str, device: torch.device | str = "cpu") -> Autoencoder:
    """What turns the batches of a data set into latents, and latents into pixels.

    Args:
        dataset: whose items `encode` will take.
        vae: value of `--vae`; `dataset.vae` where the user says nothing.
        device: where it runs.

    Raises:
        ValueError: if it cannot be loaded, or does not fit the data.
    """
    if isinstance(dataset, LatentShards):
        return dataset.autoencoder(vae, device)
    return open_autoencoder(vae, dataset.image_shape[-1], device)
