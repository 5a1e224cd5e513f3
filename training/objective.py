"""What train.py's flags say about the objective: the noise process, and the alignment with a vision encoder."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from data import ImageDataset
from data.vision_encoder import VisionEncoder
from diffusion import PUBLISHED_PROCESS, FlowMatching
from diffusion.alignment import Alignment
from models import Network, family_of
from runtime.config import flag_name
from runtime.errors import UserError, blame

if TYPE_CHECKING:
    from training.config import TrainConfig

FLOW_SETTINGS = ("times", "shift", "weight", "direction")


def process_name(config: TrainConfig) -> str:
    """The process that the flags ask for, or else the one that the family is published with."""
    return config.process or PUBLISHED_PROCESS[family_of(config.model).network.time_convention]


def process_settings(config: TrainConfig, network: Network) -> dict[str, Any]:
    """What the process is made from, as checkpoints hold it.

    Raises:
        UserError: naming a flag that belongs to another process, or whose value has no meaning.
    """
    name = process_name(config)
    gaussian = {"noise_schedule": config.noise_schedule, "predict_xstart": config.predict_xstart}
    flow = {f"flow_{field}": getattr(config, f"flow_{field}") for field in FLOW_SETTINGS}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for field, value in (flow if name == "gaussian" else gaussian).items():
        if value != defaults[field]:
            raise UserError(f"{flag_name(field)} {value}: has no effect with --process {name}")
    if name == "gaussian":
        return {**gaussian, "learn_sigma": network.out_channels != network.in_channels}
    given = {field: value for field, value in flow.items() if value is not None}
    with blame(" ".join(f"{flag_name(field)} {value}" for field, value in given.items())):
        made = FlowMatching(**{field.removeprefix("flow_"): value for field, value in given.items()})
    return {field: getattr(made, field) for field in FLOW_SETTINGS}


def resolved_process(config: TrainConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of the config that `process_settings` decided."""
    name = process_name(config)
    flow = {f"flow_{field}": settings[field] for field in FLOW_SETTINGS} if name == "flow" else {}
    return {"process": name, **flow}


def check_alignment(config: TrainConfig) -> None:
    """Refuses settings of an alignment where there is none.

    Raises:
        ValueError: naming the first.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if config.align is None and field.name.startswith("align_") and value != field.default:
            raise ValueError(f"{flag_name(field.name)} {value}: has no effect without --align")


def open_alignment(
    config: TrainConfig, dataset: ImageDataset, network: Network, device: torch.device
) -> Alignment | None:
    """The vision encoder and a fresh projector, if features are to be aligned.

    Raises:
        UserError: if there are no raw RGB images to align with, or for anything about the flags that does not fit.
    """
    if config.align is None:
        return None
    if config.dataset == "latents":
        raise UserError(f"--align {config.align}: needs raw images, which latents on disk are not; use an image folder")
    if dataset.image_shape[0] != 3:
        raise UserError(f"--align {config.align}: needs RGB images, and these are grey")
    if not 1 <= config.align_block <= len(network.blocks):
        raise UserError(f"--align-block {config.align_block}: {config.model} has blocks 1 to {len(network.blocks)}")
    with blame(f"--align {config.align}"):
        encoder = VisionEncoder(config.align, dataset.image_shape[-1], config.align_ckpt, device)
        return Alignment(
            encoder,
            network.config.hidden_size,
            block=config.align_block,
            weight=config.align_weight,
            hidden=config.align_width,
        ).to(device)
