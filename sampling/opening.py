"""From settings to a network and its encoder."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from data.autoencoders import OFFICIAL_CHANNELS, OFFICIAL_VAES
from data.encoders import PRECISIONS, UNVERIFIED, Encoder, open_encoder
from models import FAMILIES, Network, family_name, model_config
from models.loading import CheckpointInfo, build_network, resolve_checkpoint
from runtime.errors import UserError, error_prefix
from runtime.given import Given
from runtime.releases import release_of_model
from sampling.config import SamplingSettings
from sampling.resolution import resolve
from sampling.run import WeakerNetwork


def open_checkpoint(
    given: Given[SamplingSettings], device: torch.device, default_vae: str | None = None
) -> tuple[Network, CheckpointInfo, Encoder]:
    """Open the checkpoint that settings name; mistakes are found before anything is downloaded, as far as possible.

    Args:
        given: The settings.
        device: Where to compute.
        default_vae: Autoencoder for files of other code that are no release; None for that of published figures.

    Raises:
        UserError: For anything about the file or the settings that does not fit.
    """
    config, chosen = given.general, given.general.checkpoint
    if config.model is not None:
        with error_prefix(f"--model {config.model}"):
            family_name(config.model)
    if config.sampler is not None:
        given.check_owners(sampler=config.sampler)
        given.build("sampler", config.sampler)
    source = chosen.ckpt
    if source is None:
        source = Path(release_of_model(config.model or "DiT-XL/2", chosen.image_size, FAMILIES).name)
    info, weights = resolve_checkpoint(
        source,
        weights=chosen.weights,
        model=config.model,
        download_dir=chosen.pretrained_dir,
        process=chosen.process,
        network_times=chosen.network_times,
    )
    family = family_name(info.model)
    given.check_owners(model=family)
    resolve(given, info)
    fields = given.fields("model", family)
    if chosen.num_classes is not None:
        fields["num_classes"] = chosen.num_classes
    with error_prefix(given.prefix("model", family) or f"--ckpt {info.source}"):
        shape = model_config(info.model, **{**info.config, **fields}).sample_shape
    if chosen.num_frames is not None:
        info, shape = with_frames(info, shape, chosen.num_frames)
        fields["sample_shape"] = shape
    if info.meta is None and info.release is None and default_vae is not None:
        info = replace(info, encoder=default_vae)
    info, encoder = open_its_encoder(info, config, shape[-3], device)
    if info.image_shape is None and chosen.image_size is not None:  # not every file tells the size
        image = (*encoder.image_shape(shape)[:-2], chosen.image_size, chosen.image_size)
        fields["sample_shape"] = encoder.latent_shape(image)
    network = build_network(info, weights, device=device, frame_positions=chosen.frame_positions, **fields)
    check_shapes(network, info, encoder)
    if info.notes and os.environ.get("RANK", "0") == "0":
        print(f"--ckpt {source}: {'; '.join(info.notes)}")
    return network, info, encoder


def with_frames(info: CheckpointInfo, shape: tuple[int, ...], frames: int) -> tuple[CheckpointInfo, tuple[int, ...]]:
    """Give a checkpoint's samples another number of frames.

    Returns:
        The description with the shape of such clips, and the shape (F, C, H, W) of their latents.

    Raises:
        UserError: If the network makes images.
    """
    if len(shape) == 3:
        raise UserError(f"--num-frames {frames}: is a setting of clips; the network of {info.source} makes images")
    known = info.image_shape
    clip = known if known is None or len(known) == 3 else (frames, *known[1:])
    return replace(info, image_shape=clip), (frames, *shape[1:])


def open_guide(
    config: SamplingSettings, network: Network, info: CheckpointInfo, device: torch.device
) -> WeakerNetwork | None:
    """Open the weaker network of autoguidance, if there is one.

    Raises:
        UserError: If it is of another process, shape or number of classes.
    """
    path = config.guidance.guide_ckpt
    if path is None:
        return None
    flag, chosen = f"--guide-ckpt {path}", config.checkpoint
    guide_info, weights = resolve_checkpoint(
        path, weights=chosen.weights, download_dir=chosen.pretrained_dir, flag="--guide-ckpt"
    )
    fields = {}
    if chosen.num_frames is not None:
        own = model_config(guide_info.model, **guide_info.config).sample_shape
        fields["sample_shape"] = with_frames(guide_info, own, chosen.num_frames)[1]
    guide = build_network(
        guide_info, weights, device=device, flag="--guide-ckpt", frame_positions=chosen.frame_positions, **fields
    )
    facts = [
        ("process", guide_info.process, info.process),
        ("settings of the process", dict(guide_info.process_settings), dict(info.process_settings)),
        ("shape of latents", guide.sample_shape, network.sample_shape),
        ("number of classes", *(getattr(each.config, "num_classes", 0) for each in (guide, network))),
        ("classes", *(each.classes for each in (guide_info, info))),
    ]
    for name, own, wanted in facts:
        if own != wanted and None not in (own, wanted):
            raise UserError(f"{flag}: its {name} is {own}, that of --ckpt {wanted}")
    return WeakerNetwork(guide, guide_info)


def open_its_encoder(
    info: CheckpointInfo, config: SamplingSettings, channels: int, device: torch.device
) -> tuple[CheckpointInfo, Encoder]:
    """Open the encoder that a flag or the checkpoint names.

    Returns:
        The description of the checkpoint, which names this encoder; and the encoder.

    Raises:
        UserError: If it cannot be opened, or does not fit the network's channels or the size of the images.
    """
    name, size, known = config.encoder.vae or info.encoder, config.checkpoint.image_size, info.image_shape
    if known is not None and size not in (None, known[-1]):
        raise UserError(f"--image-size {size}: --ckpt {info.source} was trained with {known[-1]}")
    if name in OFFICIAL_VAES and channels != OFFICIAL_CHANNELS:
        source = f"--vae {name}" if config.encoder.vae else f"--ckpt {info.source}"
        raise UserError(
            f"{source}: the network's channels are {channels}, those of {OFFICIAL_VAES[name]} {OFFICIAL_CHANNELS}; "
            "for a network on pixels give --vae none, else the folder of its autoencoder"
        )
    dtype = PRECISIONS[config.encoder.vae_precision]
    with error_prefix(f"--vae {name}"):
        encoder = open_encoder(name, known or (() if size is None else (size, size)), device, dtype)
    compare_encoder(encoder, info, chosen=config.encoder.vae is not None)
    return replace(info, encoder=name), encoder


def compare_encoder(encoder: Encoder, info: CheckpointInfo, *, chosen: bool) -> None:
    """Compare an encoder with the one that a checkpoint was trained with, if it records that.

    Args:
        encoder: The encoder.
        info: Description of the checkpoint.
        chosen: A flag names the encoder, which may then be another one; that is a warning.

    Raises:
        UserError: If nothing but the checkpoint names it, and it has changed since.
    """
    recorded = (info.meta or {}).get("autoencoder", {})
    if encoder.is_unverified(recorded) and os.environ.get("RANK", "0") == "0":
        print(f"--vae {encoder.name}: {UNVERIFIED}")
    try:
        encoder.check_same(recorded)
    except ValueError as error:
        problem = f"--ckpt {info.source}: was trained with another autoencoder ({error})"
        if not chosen:
            flag = f"--vae {encoder.name}"
            raise UserError(f"{problem}; give its own by --vae, or {flag} to decode with this one") from error
        warnings.warn(problem, stacklevel=2)
        return
    decoder = recorded.get("decoder_sha256")
    if decoder and not chosen and encoder.describe().get("decoder_sha256") != decoder:
        warnings.warn(f"--vae {encoder.name}: its decoder has changed since {info.source} was trained", stacklevel=2)


def check_shapes(network: Network, info: CheckpointInfo, encoder: Encoder) -> None:
    """Check that the encoder's latents are those that the network was trained on.

    Raises:
        UserError: If they are not.
    """
    images = encoder.image_shape(network.sample_shape)
    with error_prefix(f"--vae {info.encoder}"):
        latents = encoder.latent_shape(images)
        if latents != network.sample_shape:
            raise ValueError(f"its latents are {latents}, the network's {network.sample_shape}")
        known = info.image_shape or images
        if known != images[-len(known) :]:  # a release tells no number of frames
            raise ValueError(f"decodes to images {images}; the network was trained on {known}")
