"""Images and latents on disk -> batches; pixels -> files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import data.autoencoders  # noqa: F401  (registers the encoders of diffusers)
from data.captioned_digits import CaptionedDigits, open_captioned_digits
from data.clip_folder import open_clip_folder
from data.clip_settings import ClipSettings
from data.columns import ColumnSettings
from data.dataset import Dataset, DatasetSettings, Example, GlobalBatches, Key, conditioning, sides
from data.digits import load_digits, open_digits, open_training_digits
from data.encoders import Encoder, open_encoder
from data.huggingface import open_huggingface
from data.idx import open_idx
from data.image_folder import open_image_folder
from data.joint_latents import open_latents
from data.moving_digits import MovingDigits, open_moving_digits
from data.webdataset import open_webdataset

__all__ = [
    "CLIPS",
    "COLUMNS",
    "DATASETS",
    "EMBEDDED",
    "CaptionedDigits",
    "Dataset",
    "Encoder",
    "Example",
    "GlobalBatches",
    "Key",
    "MovingDigits",
    "conditioning",
    "encoder_for",
    "load_digits",
    "open_dataset",
    "open_digits",
    "open_encoder",
]

DATASETS: dict[str, Callable[[DatasetSettings], Dataset]] = {  # by the value of `--dataset`
    "imagefolder": open_image_folder,
    "digits": open_training_digits,
    "latents": open_latents,
    "idx": open_idx,
    "moving-digits": open_moving_digits,
    "captioned-digits": open_captioned_digits,
    "videofolder": open_clip_folder,
    "huggingface": open_huggingface,
    "webdataset": open_webdataset,
}
COLUMNS = ("huggingface", "webdataset")  # those with columns of images and labels
CLIPS = ("moving-digits", "captioned-digits", "videofolder", "latents")  # those that may have clips
EMBEDDED = ("digits", "moving-digits", "captioned-digits")  # those that need no files; their images are grey


def open_dataset(
    name: str,
    path: Path | None,
    image_size: int | tuple[int, int] | None,
    channels: int,
    *,
    flip: bool | None = None,
    seed: int = 0,
    strict: bool = False,
    trust_stamps: bool = False,
    frames: int | None = None,
    joint_images: int = 0,
    joint_list: Path | None = None,
    clips: ClipSettings = ClipSettings(),  # noqa: B008  # it is frozen
    columns: ColumnSettings = ColumnSettings(),  # noqa: B008
    held_out: bool = False,
    captioned: bool = False,
) -> Dataset:
    """Open a training set by the value of `--dataset`, one of `DATASETS`; the rest becomes its `DatasetSettings`.

    The image size is a side of squares, or (H, W); None is 256, or the size of the digits (8) or the latents.

    Raises:
        ValueError: Naming what is missing or does not fit.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    check_clip_flags(name, frames, joint_images, joint_list)
    settings = DatasetSettings(
        path=path,
        size=None if image_size is None else sides(image_size),
        channels=channels,
        flip=flip,
        seed=seed,
        strict=strict,
        trust_stamps=trust_stamps,
        frames=frames,
        joint_images=joint_images,
        joint_list=joint_list,
        clips=clips,
        columns=columns,
        held_out=held_out,
        captioned=captioned,
    )
    return DATASETS[name](settings)


def check_clip_flags(name: str, frames: int | None, joint_images: int, joint_list: Path | None) -> None:
    """Raise a ValueError for settings of clips where a data set has none."""
    if name not in CLIPS:
        for given, flag in ((frames, "--num-frames"), (joint_images, "--joint-images")):
            if given:
                raise ValueError(
                    f"{flag} {given}: the data set {name} has images, not clips (those: {', '.join(CLIPS)})"
                )
    if joint_list is not None and not (name == "videofolder" and joint_images):
        raise ValueError(f"--joint-image-list {joint_list}: needs --dataset videofolder and --joint-images")


def encoder_for(
    dataset: Dataset, vae: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Encoder:
    """Encoder of the items of a data set by a value of `--vae`, in a precision; latents need no encoding.

    Raises:
        ValueError: If the encoder cannot be loaded, or does not fit the data.
    """
    if hasattr(dataset, "encoder"):  # of latents
        encoder: Encoder = dataset.encoder(vae, device)
        return encoder
    return open_encoder(vae, dataset.image_shape, device, dtype)
