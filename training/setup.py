"""From flags to what is fixed before the first step: data, network, process, recipe, weights to start from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from data import ImageDataset, open_dataset, open_digits, open_encoder
from data.autoencoder import Autoencoder
from diffusion import PROCESSES, Objective
from models import Network, TrainingRecipe, create_model, family_of, model_config
from models.transfer import adapt_weights
from runtime import distributed
from runtime.checkpoint import Checkpoint, load_weights
from runtime.config import flag_name
from runtime.errors import UserError, blame
from runtime.seeds import derive_seed
from training.config import NETWORK_SETTINGS, RECIPE_SETTINGS, TrainConfig
from training.objective import open_alignment, process_name, process_settings, resolved_process
from training.scores import Scorer, open_scorer


@dataclass
class Setup:
    """Everything that is fixed before the first step."""

    config: TrainConfig  # with all "the model's own" resolved
    dataset: ImageDataset
    held_out: ImageDataset | None  # for the validation loss
    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]
    objective: Objective
    total_steps: int
    process_settings: dict[str, Any]
    scorer: Scorer | None = None  # of images drawn by a validation

    @property
    def network(self) -> Network:
        """The network being trained."""
        return self.objective.network


def set_up(config: TrainConfig, device: torch.device, start: Checkpoint | None = None) -> Setup:
    """Opens the data, builds network and process, and checks that they fit; nothing is written yet.

    Args:
        config: of the run.
        device: where it computes.
        start: weights to start from, which may decide something about the network.
    """
    with blame(f"--model {config.model}"):
        wanted = network_settings(config)
    if start is not None:
        with blame(f"--init-from {config.init_from} as {config.model}"):
            decided = family_of(config.model).network.settings_from(start.weights, model_config(config.model, **wanted))
        for name, found in decided.items():
            if getattr(config, name) not in (None, found):
                raise UserError(
                    f"{flag_name(name)} {getattr(config, name)}: --init-from {config.init_from} has {found}"
                )
        wanted |= decided
    recipe = training_recipe(config)
    channels = (1 if config.dataset == "digits" else 3) if config.in_channels is None else config.in_channels
    with blame("--dataset digits" if config.dataset == "digits" else "--data-path"):
        dataset = open_dataset(
            config.dataset,
            config.data_path,
            config.image_size,
            channels,
            flip=config.flip,
            seed=config.global_seed,
            strict=config.strict,
        )
    found = len(dataset.classes)
    if found != wanted["num_classes"]:
        if config.num_classes is None:
            hint = "--model DiT-digits/2, or " if config.dataset == "digits" else ""
            raise UserError(
                f"--model {config.model}: made for {wanted['num_classes']} classes, but the data has {found}; "
                f"give {hint}--num-classes {found}"
            )
        raise UserError(f"--num-classes {config.num_classes}: the data has {found} classes; use --num-classes {found}")
    held_out = open_held_out(config, dataset)
    vae = config.vae or dataset.vae
    with blame(f"--vae {vae}"):
        autoencoder = open_encoder(dataset, vae, device)
        latent_shape = autoencoder.latent_shape(dataset.image_shape)
    torch.manual_seed(derive_seed("weights", config.global_seed))  # fresh weights are the same on every rank
    with blame(f"--image-size {dataset.image_shape[-1]}"):
        network = create_model(config.model, **wanted, input_size=latent_shape[-1], in_channels=latent_shape[0])
    settings = process_settings(config, network)
    settled: dict[str, Any] = {name: getattr(network.config, name, None) for name in wanted}
    resolved = dataclasses.replace(
        config,
        **settled,
        **resolved_process(config, settings),
        vae=vae,
        image_size=dataset.image_shape[-1],
        in_channels=dataset.image_shape[0],
        **dataclasses.asdict(recipe),
    )
    network.grad_checkpointing = config.grad_checkpointing
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    alignment = open_alignment(config, dataset, network, device)
    process = PROCESSES[process_name(config)].make(**settings)
    objective = Objective(
        network.to(device), process, recipe=recipe, seed=config.global_seed, autocast=autocast, alignment=alignment
    )
    total = max(1, config.epochs * len(dataset) // config.global_batch_size)
    total = min(total, config.max_steps) if config.max_steps else total
    _, height, width = dataset.image_shape
    scorer = open_scorer(config, (height, width), device)
    return Setup(resolved, dataset, held_out, autoencoder, latent_shape, objective, total, settings, scorer)


def open_held_out(config: TrainConfig, dataset: ImageDataset) -> ImageDataset | None:
    """The images of the validation loss, which are never mirrored.

    Raises:
        UserError: if they cannot be opened, or are of other classes than the training data.
    """
    if config.eval_every is None:
        return None
    if config.dataset == "digits":
        return open_digits("test", seed=config.global_seed)
    if config.eval_data_path is None:
        return None
    channels, size, _ = dataset.image_shape
    with blame("--eval-data-path"):
        held_out = open_dataset(config.dataset, config.eval_data_path, size, channels, flip=False, strict=config.strict)
    if list(held_out.classes) != list(dataset.classes):
        raise UserError(
            f"--eval-data-path {config.eval_data_path}: its {len(held_out.classes)} classes are not the "
            f"{len(dataset.classes)} of --data-path, by name"
        )
    if held_out.vae != dataset.vae:
        raise UserError(
            f"--eval-data-path {config.eval_data_path}: latents of the autoencoder {held_out.vae}, but --data-path "
            f"has those of {dataset.vae}"
        )
    return held_out


def network_settings(config: TrainConfig) -> dict[str, Any]:
    """What the flags say about the network's config; the model's own values where they are silent.

    Raises:
        UserError: for a setting that the family does not have.
        ValueError: for values that it refuses.
    """
    named = model_config(config.model)
    settings = {}
    if process_name(config) == "flow" and hasattr(named, "learn_sigma"):
        if config.learn_sigma:
            raise UserError("--learn-sigma: a flow has no variance; use --process gaussian")
        named = dataclasses.replace(named, learn_sigma=False)
    for field in NETWORK_SETTINGS:
        value = getattr(config, field)
        if hasattr(named, field):  # not every family predicts a variance
            settings[field] = getattr(named, field) if value is None else value
        elif value is not None:
            raise UserError(f"{flag_name(field)} {value}: has no effect on {config.model}")
    model_config(config.model, **settings)  # refuses what does not fit
    return settings


def training_recipe(config: TrainConfig) -> TrainingRecipe:
    """The recipe of the model's family, as the flags have it.

    Raises:
        UserError: for a setting that the family does not have, a value that it refuses, or too small a batch for it.
    """
    recipe_class = family_of(config.model).network.recipe_class
    own = {field.name for field in dataclasses.fields(recipe_class)}
    given = {name: getattr(config, name) for name in RECIPE_SETTINGS if getattr(config, name) is not None}
    for name, value in given.items():
        if name not in own:
            raise UserError(f"{flag_name(name)} {value}: has no effect on {config.model}")
    with blame(" ".join(f"{flag_name(name)} {value}" for name, value in given.items())):
        recipe = recipe_class(**given)
    ranks, strata = distributed.world_size(), recipe.time_strata
    if config.global_batch_size // ranks % strata:
        raise UserError(
            f"--stratified-t: {config.global_batch_size // ranks} images per process do not cover {strata} parts of "
            f"the schedule evenly; choose --global-batch-size as a multiple of {ranks * strata}"
        )
    return recipe


def initialise(setup: Setup, checkpoint: Checkpoint) -> list[str]:
    """Starts from the weights of --init-from; returns what had to be changed to fit.

    Raises:
        UserError: if its network is another.
    """
    old_classes = None if checkpoint.meta is None else checkpoint.meta["data"].get("classes")
    weights, notes = adapt_weights(
        setup.network, checkpoint.weights, old_classes=old_classes, new_classes=setup.dataset.classes
    )
    load_weights(setup.network, weights, f"--init-from {setup.config.init_from} as {setup.config.model}")
    with blame(f"--init-from {setup.config.init_from}"):
        return notes + setup.objective.recipe.start(setup.network, checkpoint.weights)
