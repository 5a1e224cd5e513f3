"""From flags to everything that is fixed before the first step: data, encoder, network, process, loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed._composable import checkpoint as checkpoint_module

from data import Dataset, encoder_for, open_dataset, open_digits
from data.encoders import Encoder
from data.vision_encoder import VisionEncoder
from diffusion import PROCESSES
from diffusion.alignment import Alignment
from diffusion.loss import DiffusionLoss, row_noise
from models import Network, create_model, family_name, family_of, model_config
from models.transfer import adapt_weights
from runtime import distributed
from runtime.checkpoint import Checkpoint, load_weights
from runtime.errors import UserError, error_prefix
from runtime.seeds import derive_seed
from runtime.settings import Given, Values, document, flag_name
from training.config import DataSettings, TrainSettings
from training.losses import LOSSES, loss_of
from training.optimization import OptimizerSettings
from training.scores import Scorer, open_scorer


class Owners(NamedTuple):
    """Names of the owners of settings that a run uses."""

    model: str
    process: str
    loss: str
    optimizer: str


@dataclass
class Setup:
    """Everything that is fixed before the first step.

    Attributes:
        config: general settings, with everything resolved that they leave open.
        dataset: training data.
        held_out: data of the validation loss; None without one.
        encoder: between the data and the network's latents.
        loss: holds the network and the process.
        process: settings of the process.
        optimizer: settings of the optimizer.
        total_steps: number of steps of the run.
        scorer: of samples made by a validation; None without one.
    """

    config: TrainSettings
    owners: Owners
    dataset: Dataset
    held_out: Dataset | None
    encoder: Encoder
    loss: DiffusionLoss
    process: Any
    optimizer: OptimizerSettings
    total_steps: int
    scorer: Scorer | None = None

    @property
    def network(self) -> Network:
        """The network being trained."""
        return self.loss.network

    def document(self) -> Values:
        """All settings as nested JSON: config.json, and part of every checkpoint."""
        names, config = self.owners, self.config
        sections = document(
            config,
            model=(config.model, self.network.config),
            process=(names.process, self.process),
            loss=(names.loss, self.loss.settings),
            optimizer=(names.optimizer, self.optimizer),
        )
        return {"format": 2, "script": "train.py", **sections}

    def warnings(self) -> list[str]:
        """Lines about settings that a user may regret, for the log and the dry run."""
        total, optimization = self.total_steps, self.config.optimization
        lines = self.loss.warnings(total)
        untrained = optimization.ema_decay**total
        if untrained > 0.05 and not optimization.ema_ramp:
            lines.append(
                f"at --ema-decay {optimization.ema_decay} the average still holds {untrained:.0%} of the untrained "
                "weights at the end; add --ema-ramp, or sample with --weights model"
            )
        return lines


def set_up(
    given: Given[TrainSettings],
    device: torch.device,
    start: Checkpoint | None = None,
    fake: FakeTensorMode | None = None,
) -> Setup:
    """Open the data, build network and process, and check that they fit; nothing is written yet.

    Args:
        given: settings of the run.
        device: where it computes.
        start: weights to start from, which may decide something about the network.
        fake: mode of tensors without values, which the network then has (for a dry run).

    Raises:
        UserError: for anything about settings and data that does not fit.
    """
    config = given.general
    with error_prefix(f"--model {config.model}"):
        family = family_of(config.model)
        process = config.process or family.process
        name = family_name(config.model)
    owners = Owners(name, process, loss_of(name), config.optimizer)
    given.check_owners(**owners._asdict())
    fields = network_fields(given, owners, start)
    optimizer = given.build("optimizer", owners.optimizer)
    process_settings = given.build("process", owners.process)
    loss_settings = given.build("loss", owners.loss)
    with error_prefix(given.prefix("loss", owners.loss)):
        loss_settings.check(
            rows=config.optimization.global_batch_size // distributed.world_size(),
            ranks=distributed.world_size(),
            from_weights=config.run.init_from is not None or config.run.resume is not None,
        )

    dataset = open_training_data(config.data, config.optimization.global_seed)
    check_classes(config, fields, dataset)
    held_out = open_held_out(config, dataset)
    vae = config.data.vae or dataset.vae
    with error_prefix(f"--vae {vae}"):
        encoder = encoder_for(dataset, vae, device)
        shape = encoder.latent_shape(dataset.image_shape)
    if fake is None:  # made on the CPU: fresh weights are the same on every device
        network = build_network(config, fields, shape).to(device)
    else:
        with fake, device:
            network = build_network(config, fields, shape)
    made = process_settings.make(network.out_channels != network.sample_shape[-3])
    loss = LOSSES[owners.loss].loss(
        network,
        made,
        seed=config.optimization.global_seed,
        autocast=torch.bfloat16 if config.compute.precision == "bf16" else None,
        alignment=open_alignment(config, dataset, network, device),
        settings=loss_settings,
    )
    total = max(1, config.optimization.epochs * len(dataset) // config.optimization.global_batch_size)
    total = min(total, config.optimization.max_steps or total)
    resolved = replace(
        config,
        process=owners.process,
        data=replace(config.data, vae=vae, image_size=dataset.image_shape[-1], channels=dataset.image_shape[-3]),
    )
    scorer = open_scorer(config, dataset.image_shape[-2:], device)
    return Setup(resolved, owners, dataset, held_out, encoder, loss, process_settings, optimizer, total, scorer)


def network_fields(given: Given[TrainSettings], owners: Owners, start: Checkpoint | None) -> Values:
    """Fields of the network's config that flags, the process or the weights to start from decide.

    Raises:
        UserError: for values that the family refuses, or that contradict the weights.
    """
    model, init_from = given.general.model, given.general.run.init_from
    family, fields = family_of(model), given.fields("model", owners.model)
    if not PROCESSES[owners.process].has_variance and "learn_sigma" in family.config.__dataclass_fields__:
        if fields.get("learn_sigma"):
            raise UserError(f"--learn-sigma: has no effect with --process {owners.process}; use --process gaussian")
        fields["learn_sigma"] = False
    with error_prefix(given.prefix("model", owners.model) or f"--model {model}"):
        config = model_config(model, **fields)
    if start is None or family.settings_from is None:
        return fields
    with error_prefix(f"--init-from {init_from} as {model}"):
        from_weights = family.settings_from(start.weights, config)
    for name, value in from_weights.items():
        if fields.get(name, value) != value:
            raise UserError(f"{flag_name(name)} {fields[name]}: --init-from {init_from} has {value}")
    return fields | from_weights


def open_training_data(settings: DataSettings, seed: int) -> Dataset:
    """The training data.

    Raises:
        UserError: if it cannot be opened.
    """
    channels = settings.channels or (1 if settings.dataset == "digits" else 3)
    with error_prefix("--dataset digits" if settings.dataset == "digits" else "--data-path"):
        return open_dataset(
            settings.dataset,
            settings.data_path,
            settings.image_size,
            channels,
            flip=settings.flip,
            seed=seed,
            strict=settings.strict,
        )


def check_classes(config: TrainSettings, fields: Values, dataset: Dataset) -> None:
    """Check that the network has as many classes as the data.

    Raises:
        UserError: with the flag to give.
    """
    expected = getattr(model_config(config.model, **fields), "num_classes", None)
    count = len(dataset.classes)
    if expected in (None, count):
        return
    if "num_classes" in fields:
        raise UserError(f"--num-classes {expected}: the data has {count} classes; use --num-classes {count}")
    hint = "--model DiT-digits/2, or " if config.data.dataset == "digits" else ""
    raise UserError(
        f"--model {config.model}: made for {expected} classes, but the data has {count}; "
        f"give {hint}--num-classes {count}"
    )


def build_network(config: TrainSettings, fields: Values, shape: tuple[int, ...]) -> Network:
    """The network with fresh weights, the same on every rank.

    Raises:
        UserError: if it does not take such latents.
    """
    torch.manual_seed(derive_seed("weights", config.optimization.global_seed))
    with error_prefix(f"--image-size {config.data.image_size or 'of the data'}"):
        return create_model(config.model, **fields, sample_shape=shape)


def recompute_activations(network: Network) -> None:
    """Recompute the activations of every block in the backward pass instead of keeping them."""
    for block in network.blocks:
        checkpoint_module(block)


def open_held_out(config: TrainSettings, dataset: Dataset) -> Dataset | None:
    """The images of the validation loss, which are never mirrored.

    Raises:
        UserError: if they cannot be opened, or are of other classes than the training data.
    """
    path, data = config.validation.eval_data_path, config.data
    if config.validation.eval_every is None:
        return None
    if data.dataset == "digits":
        return open_digits("test", seed=config.optimization.global_seed)
    if path is None:
        return None
    channels, *size = dataset.image_shape[-3:]
    with error_prefix("--eval-data-path"):
        held_out = open_dataset(data.dataset, path, size[-1], channels, flip=False, strict=data.strict)
    if list(held_out.classes) != list(dataset.classes):
        raise UserError(
            f"--eval-data-path {path}: its {len(held_out.classes)} classes are not the {len(dataset.classes)} of "
            "--data-path, by name"
        )
    if held_out.vae != dataset.vae:
        raise UserError(
            f"--eval-data-path {path}: latents of the autoencoder {held_out.vae}, but --data-path has those of "
            f"{dataset.vae}"
        )
    return held_out


def open_alignment(config: TrainSettings, dataset: Dataset, network: Network, device: torch.device) -> Alignment | None:
    """The vision encoder and a fresh projector, if features are to be aligned.

    Raises:
        UserError: if there are no raw RGB images to align with, or for anything about the flags that does not fit.
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
    if not 1 <= settings.align_block <= len(network.blocks):
        raise UserError(f"--align-block {settings.align_block}: {config.model} has blocks 1 to {len(network.blocks)}")
    with error_prefix(f"--align {settings.align}"):
        encoder = VisionEncoder(settings.align, dataset.image_shape[-1], settings.align_ckpt, device)
        return Alignment(
            encoder,
            network.config.hidden_size,
            block=settings.align_block,
            weight=settings.align_weight,
            hidden=settings.align_width,
        ).to(device)


def initialise(setup: Setup, start: Checkpoint) -> list[str]:
    """Start from the weights of --init-from; returns what had to be changed to fit.

    Raises:
        UserError: if its network is another.
    """
    model, init_from = setup.config.model, setup.config.run.init_from
    old_classes = None if start.meta is None else start.meta["data"].get("classes")
    family = family_of(model)
    weights, notes = adapt_weights(
        setup.network,
        start.weights,
        added_parts=family.added_parts,
        old_classes=old_classes,
        new_classes=setup.dataset.classes,
    )
    load_weights(setup.network, weights, f"--init-from {init_from} as {model}")
    with error_prefix(f"--init-from {init_from}"):
        return notes + setup.loss.start(start.weights)


def encode(setup: Setup, images: Tensor, step: int, rows: range, seed: int | None = None) -> Tensor:
    """Latents of some rows of a batch as the data set gives it; of stochastic encoders a sample for (step, row)."""
    noise = None
    if setup.encoder.stochastic:
        seed = setup.config.optimization.global_seed if seed is None else seed
        noise = row_noise("encoder", seed, step, rows, setup.network.sample_shape, images.device)
    return setup.encoder.to_latents(setup.encoder.encode_pixels(images), noise)
