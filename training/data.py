"""The data of a run: those it is trained on, and those that are held out."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from data import (
    EMBEDDED,
    CaptionedDigits,
    Dataset,
    Encoder,
    MovingDigits,
    encoder_for,
    open_dataset,
    open_digits,
)
from data.encoders import FP32, PRECISIONS
from data.renumbered import renumber
from runtime.errors import UserError, error_prefix
from training.config import TrainSettings


def open_training_data(config: TrainSettings, joint_images: int = 0) -> Dataset:
    """The data set that the settings name, with so many single frames behind every clip.

    Raises:
        UserError: If it cannot be opened.
    """
    data, embedded = config.data, config.data.dataset in EMBEDDED
    if data.channels not in (None, 1, 3) or (embedded and data.channels == 3):
        raise UserError(f"--in-channels {data.channels}: 3 for RGB or 1 for grey (the digits are grey)")
    with error_prefix(f"--dataset {data.dataset}" if embedded else "--data-path"):
        return open_dataset(
            data.dataset,
            data.data_path,
            data.image_size,
            data.channels or {"idx": 0, **dict.fromkeys(EMBEDDED, 1)}.get(data.dataset, 3),  # 0: as they are
            flip=data.flip,
            seed=config.optimization.global_seed,
            strict=data.strict,
            trust_stamps=config.run.trust_stamps,
            frames=data.num_frames,
            joint_images=joint_images,
            joint_list=data.joint_image_list,
            clips=config.clips,
            columns=config.columns,
        )


def open_and_listen(config: TrainSettings, joint_images: int) -> tuple[Dataset, list[str]]:
    """The data set, and the warnings about it, for the log, which is not there yet."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        dataset = open_training_data(config, joint_images)
    return dataset, [str(warning.message) for warning in caught]


def open_encoder(config: TrainSettings, dataset: Dataset, device: torch.device) -> tuple[str, Encoder, tuple[int, ...]]:
    """Open the encoder between data and network: its name, itself, and the shape of its latents.

    Raises:
        UserError: If it cannot be had, or does not go with the data.
    """
    name, precision = config.data.vae or dataset.vae, config.data.vae_precision
    if precision != FP32 and (name == "none" or hasattr(dataset, "encoder")):
        reason = "these data are not encoded" if name == "none" else "these latents were encoded by extract_latents.py"
        raise UserError(f"--vae-precision {precision}: has no effect, because {reason}; leave it out")
    with error_prefix(f"--vae {name}"):
        encoder = encoder_for(dataset, name, device, PRECISIONS[precision])
        return name, encoder, encoder.latent_shape(dataset.image_shape)


def open_held_out(config: TrainSettings, dataset: Dataset, latents: tuple[int, ...]) -> Dataset | None:
    """The images of the validation loss, which are never mirrored, or clips, without images behind them.

    Args:
        config: Settings of the run.
        dataset: Training data.
        latents: Shape of the network's samples.

    Returns:
        The data; None if there are none.

    Raises:
        UserError: If they cannot be opened or are of other classes than the training data.
    """
    path, data = config.validation.eval_data_path, config.data
    if data.dataset == "digits":
        return open_digits("test", seed=config.optimization.global_seed)
    if data.dataset in ("moving-digits", "captioned-digits"):
        embedded = MovingDigits if data.dataset == "moving-digits" else CaptionedDigits
        return embedded("test", frames=latents[0], side=dataset.image_shape[-1])
    if path is None:
        return None
    channels, height, width = dataset.image_shape[-3:]
    with error_prefix("--eval-data-path"):
        held_out = open_dataset(
            data.dataset,
            path,
            (height, width),
            channels,
            flip=False,
            strict=data.strict,
            trust_stamps=config.run.trust_stamps,
            frames=data.num_frames,
            clips=config.clips,
            columns=replace(config.columns, split=config.validation.eval_split),
            held_out=True,
        )
    if config.run.keep_classes and {*held_out.classes} <= {*dataset.classes}:
        held_out = renumber(held_out, dataset.classes)
    if list(held_out.classes) != list(dataset.classes):
        raise UserError(
            f"--eval-data-path {path}: its {len(held_out.classes)} classes are not the {len(dataset.classes)} of "
            "--data-path, by name"
        )
    if hasattr(dataset, "encoder") and hasattr(held_out, "encoder"):  # of latents
        with error_prefix(f"--eval-data-path {path}: not latents of the same autoencoder as those in --data-path"):
            held_out.encoder().check_same(dataset.encoder().describe())
    return held_out
