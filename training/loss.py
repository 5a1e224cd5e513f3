"""The loss of a run, with its network, process and alignment."""

from __future__ import annotations

import torch

from data import Dataset
from data.vision_encoder import VisionEncoder
from diffusion.alignment import Alignment
from diffusion.loss import DiffusionLoss, LossSettings
from models import Network, create_model, family_of
from runtime.errors import UserError, error_prefix
from runtime.given import Given
from runtime.launch import world_size
from runtime.seeds import derive_seed
from runtime.settings import Owners, Values
from training.config import TrainSettings
from training.losses import LOSSES


def check_loss(given: Given[TrainSettings], name: str, settings: LossSettings) -> None:
    """Check that the settings of the loss fit the run.

    Raises:
        UserError: Naming the flags, if they do not.
    """
    run, ranks = given.general.run, world_size()
    with error_prefix(given.prefix("loss", name)):
        settings.check(
            rows=given.general.optimization.global_batch_size // ranks,
            ranks=ranks,
            from_weights=run.init_from is not None or run.resume is not None,
        )


def open_vision_encoder(config: TrainSettings, dataset: Dataset, device: torch.device) -> VisionEncoder | None:
    """Target of feature alignment: an encoder of tokens; None without alignment.

    Raises:
        UserError: If there are no raw RGB images to align with, or if the encoder cannot be had.
    """
    settings = config.alignment
    if settings.align is None:
        return None
    if config.data.dataset == "latents":
        raise UserError(
            f"--align {settings.align}: needs raw images, which stored latents are not; use an image folder"
        )
    if dataset.image_shape[-3] != 3:
        raise UserError(f"--align {settings.align}: needs RGB images, and these are grey")
    with error_prefix(f"--align {settings.align}"):
        return VisionEncoder(settings.align, dataset.image_shape[-1], settings.align_ckpt, device)


def build_loss(
    config: TrainSettings,
    owners: Owners,
    fields: Values,
    shape: tuple[int, ...],
    vision: VisionEncoder | None,
) -> DiffusionLoss:
    """The loss with its network, process and alignment; fresh weights are the same on every rank.

    Raises:
        UserError: If the network does not take such latents or such an alignment.
    """
    (_, process), (name, settings) = owners["process"], owners["loss"]
    torch.manual_seed(derive_seed("weights", config.optimization.global_seed))
    axes = getattr(family_of(config.model).config, "axes", None)
    if axes is not None and len(axes) != len(shape):
        takes, given = ("clips", "images") if len(axes) == 4 else ("images", "clips")
        raise UserError(
            f"--model {config.model}: takes {takes}, and these data are {given}; choose another model or --dataset"
        )
    with error_prefix(f"--joint-images of --model {config.model}"):
        shape = settings.network_shape(shape)
    with error_prefix(f"--image-size {config.data.image_size or 'of the data'}"):
        network = create_model(config.model, **fields, sample_shape=shape)
    alignment = None if vision is None else build_alignment(config, network, vision)
    with error_prefix(f"--model {config.model}"):
        return LOSSES[name].loss(
            network,
            process.make(network.out_channels != shape[-3]),
            seed=config.optimization.global_seed,
            dropout_prob=config.data.caption_dropout_prob or None,
            autocast=torch.bfloat16 if config.compute.precision == "bf16" else None,
            alignment=alignment,
            settings=settings,
        )


def build_alignment(config: TrainSettings, network: Network, vision: VisionEncoder) -> Alignment:
    """The alignment of a network's features, with a fresh projector.

    Raises:
        UserError: For a block that the network lacks, or a value that has no meaning.
    """
    settings = config.alignment
    if not 1 <= settings.align_block <= len(network.blocks):
        raise UserError(f"--align-block {settings.align_block}: {config.model} has blocks 1 to {len(network.blocks)}")
    with error_prefix(f"--align {settings.align}"):
        return Alignment(
            vision,
            network.config.hidden_size,
            block=settings.align_block,
            weight=settings.align_weight,
            hidden=settings.align_width,
        )
