"""From flags to everything that is fixed before the first step: data, encoder, network, process, loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from data import Dataset
from data.dataset import text_of
from data.encoders import Encoder
from data.vision_encoder import VisionEncoder
from diffusion import PREVIEW_SAMPLER, make_sampler
from diffusion.loss import DiffusionLoss, row_noise
from diffusion.sampling import Sampler
from models import Network
from models.sources import Located
from runtime.averages import average_warning
from runtime.checkpoint import Checkpoint
from runtime.devices import slow_bf16
from runtime.documents import document, sections_of
from runtime.errors import UserError, error_prefix
from runtime.given import Given
from runtime.licences import Origin, origin_of
from runtime.settings import Owners, Values, choose_owners
from training.config import KINDS, PROGRAM, TrainSettings
from training.data import open_and_listen, open_encoder, open_held_out
from training.fine_tuning import choose_trained
from training.loss import build_loss, check_loss, open_vision_encoder
from training.network import (
    check_channels,
    check_classes,
    digest_notes,
    file_digests,
    keep_classes,
    load_start,
    locate_start,
    network_fields,
    outline,
    read_start,
    start_warnings,
    take_data_settings,
    text_fields,
)
from training.optimization import OptimizerSettings
from training.parallel import Parallel, make_parallel
from training.scores import Scorer, open_scorer


class ValidationData(NamedTuple):
    """Data and tools of validations.

    Attributes:
        every: Steps from one validation to the next.
        held_out: Data of the loss; None without one.
        sampler: Sampler of images; None without any.
        scorer: Score of these images; None without one.
    """

    every: int
    held_out: Dataset | None
    sampler: Sampler | None
    scorer: Scorer | None


@dataclass
class Setup:
    """Everything that is fixed before the first step.

    Attributes:
        config: General settings, nothing left open.
        owners: Kind of owner -> chosen name and its settings.
        dataset: Training data.
        source: Name of the data in the log.
        encoder: Encoder between the data and the network's latents.
        loss: Loss, which holds the network and the process.
        parallel: Strategy of several processes.
        total_steps: Number of steps of the run.
        notes: Lines about files of weights: content and digests.
        start_notes: Lines about the weights to start from, and changes that made them fit.
        setup_warnings: Lines about data and weights that were noticed while they were opened.
        digests: SHA-256 of these files, by the names in `training.network.DIGESTS`; none in a dry run.
        origin: Published weights that the run starts from, directly or not; None for none.
        validation: Data and tools of validations; None without any.
    """

    config: TrainSettings
    owners: Owners
    dataset: Dataset
    source: str
    encoder: Encoder
    loss: DiffusionLoss
    parallel: Parallel
    total_steps: int
    notes: list[str]
    start_notes: list[str]
    setup_warnings: list[str]
    digests: dict[str, str]
    origin: Origin | None = None
    validation: ValidationData | None = None

    @property
    def network(self) -> Network:
        """The network being trained."""
        return self.loss.network

    @property
    def optimizer(self) -> OptimizerSettings:
        """Settings of the optimizer, which make it."""
        settings: OptimizerSettings = self.owners["optimizer"][1]
        return settings

    def null_rows(self, count: int, device: torch.device) -> dict[str, Tensor] | None:
        """Conditioning of unconditional rows where it comes from the data (text); None where the network has it."""
        row: Mapping[str, Tensor] | None = getattr(self.dataset, "null_conditioning", None)
        return None if row is None else {k: v.to(device).expand(count, *v.shape) for k, v in row.items()}

    def document(self) -> Values:
        """All settings as nested JSON: config.json, and part of every checkpoint."""
        return {"format": 2, "script": PROGRAM, **document(self.config, **self.owners)}

    def warnings(self) -> list[str]:
        """Lines about data and settings that a user may regret, for the log and the dry run."""
        lines, optimization = [*self.setup_warnings, *self.loss.warnings(self.total_steps)], self.config.optimization
        precisions = {"--precision": self.config.compute.precision, "--vae-precision": self.config.data.vae_precision}
        lower = [flag for flag, precision in precisions.items() if precision == "bf16"]
        lines += filter(None, (slow_bf16(next(self.network.parameters()).device, flag) for flag in lower))
        if text_of(self.dataset) and self.network.conditioning and not self.loss.dropout_prob:
            lines.append("--caption-dropout-prob 0: guidance needs unconditional rows, and none are trained")
        average = average_warning(
            optimization.ema_decay,
            self.total_steps - self.total_steps % optimization.ema_every,
            ramp=optimization.ema_ramp,
            from_weights=self.config.run.init_from is not None,
            when="at the end",
        )
        if average is not None and not optimization.ema_ramp:
            lines.append(f"{average}; add --ema-ramp, or sample with --weights model")
        return lines


class Choices(NamedTuple):
    """Decisions by flags and by the weights to start from, before any data are opened.

    Attributes:
        config: General settings.
        owners: Process, loss and optimizer: chosen name and settings.
        fields: Fields of the network's config.
        first: Place of the weights to start from; None without.
        start: These weights, or their outline on processes that do not need them.
        notes: Lines about what was taken from them.
    """

    config: TrainSettings
    owners: Owners
    fields: Values
    first: Located | None
    start: Checkpoint | None
    notes: list[str]


def choose(given: Given[TrainSettings], parallel: Parallel, *, has_data: bool) -> Choices:
    """Choose the owners of settings, and read the weights to start from.

    Args:
        given: Settings of the run.
        parallel: Strategy of several processes.
        has_data: The data are given, and not opened as the settings say.

    Raises:
        UserError: For settings that do not fit each other or these weights.
    """
    config, names, notes = given.general, choose_owners(KINDS, vars(given.general)), list[str]()
    given.check_owners(**names)
    first = locate_start(config)
    start = None if first is None else parallel.read(lambda: read_start(first.path), outline)
    if start is not None and start.meta is not None and not has_data and config.data.dataset == "imagefolder":
        config, notes = take_data_settings(config, start.meta)
    fields = network_fields(given, names, start)
    owners = {kind: (names[kind], given.build(kind, names[kind])) for kind in ("process", "loss", "optimizer")}
    check_loss(given, *owners["loss"])
    return Choices(config, owners, fields, first, start, notes)


def set_up(
    given: Given[TrainSettings],
    device: torch.device,
    *,
    dataset: Dataset | None = None,
    held_out: Dataset | None = None,
    fake: FakeTensorMode | None = None,
) -> Setup:
    """Open the data, build network, process and loss, and check that they fit; nothing is written yet.

    Args:
        given: Settings of the run.
        device: Device of the run.
        dataset: Training data; None opens those that the settings name. An attribute `null_conditioning`, a dict of
            tensors without rows, is the conditioning of unconditional rows where the network has none (text).
        held_out: Data of the validation loss, of the same classes; None opens those that the settings name.
        fake: Mode of tensors without values, which the network then has (for a dry run).

    Raises:
        UserError: For settings or data that do not fit.
    """
    compute = given.general.compute  # in a dry run one process works alone
    parallel = make_parallel(compute.parallel if fake is None else "ddp", compute.holders, device)
    config, owners, fields, first, start, start_notes = choose(given, parallel, has_data=dataset is not None)
    meta = None if start is None else start.meta
    dataset, source, lines = open_images(config, owners, start, dataset)
    fields |= text_fields(config, fields, dataset)
    check_classes(config, fields, dataset)
    vae, encoder, shape = open_encoder(config, dataset, device)
    if meta is not None:
        check_channels(config, meta, vae, shape[-3])
        lines += start_warnings(config, meta, sections_of(owners)["process"], encoder)
    vision = open_vision_encoder(config, dataset, device)
    make = partial(build_loss, config, owners, fields, shape, vision)
    loss = parallel.build(make) if fake is None else build_without_values(make, device, fake)
    if start is not None:
        start_notes += parallel.read(partial(load_start, config, loss, start, dataset), list)
    choose_trained(config, loss.network, fake)
    digests = file_digests(config, first) if fake is None else {}
    data = replace(config.data, vae=vae, image_size=dataset.image_shape[-1], channels=dataset.image_shape[-3])
    setup = Setup(
        config=replace(config, process=owners["process"][0], data=data),
        owners={**owners, "model": (config.model, loss.network.config)},
        dataset=dataset,
        source=source,
        encoder=encoder,
        loss=loss,
        parallel=parallel,
        total_steps=run_length(config, dataset),
        notes=list_weights(vision, digests) if fake is None else [],
        start_notes=[f"--init-from: {note}" for note in start_notes],
        setup_warnings=lines,
        digests=digests,
        origin=None if first is None else origin_of(first.path, meta, first.repository),
    )
    if config.validation.eval_every is not None:
        setup.validation = open_validation(setup, config.validation.eval_every, held_out, device)
    return setup


def open_images(
    config: TrainSettings, owners: Owners, start: Checkpoint | None, dataset: Dataset | None
) -> tuple[Dataset, str, list[str]]:
    """Open the training data, unless they are given; their classes become those of the weights to start from.

    Returns:
        The data, their name in the log, and lines about them.
    """
    if dataset is None:
        source = str(config.data.data_path or config.data.dataset)
        dataset, lines = open_and_listen(config, owners["loss"][1].images_behind)
    else:
        source, lines = type(dataset).__name__, []
    return keep_classes(config, start, dataset), source, lines


def run_length(config: TrainSettings, dataset: Dataset) -> int:
    """Number of steps of a run; a UserError if it ends before weights are averaged for the first time."""
    total, every = config.optimization.total_steps(len(dataset)), config.optimization.ema_every
    if every > total:
        raise UserError(f"--ema-every {every}: the run ends before, after {total} steps; give at most {total}")
    return total


def list_weights(vision: VisionEncoder | None, digests: Mapping[str, str]) -> list[str]:
    """Lines about the files of weights that a run uses."""
    notes = () if vision is None else vision.notes
    return [*(f"--align-ckpt: {note}" for note in notes), *digest_notes(digests)]


def build_without_values(
    make: Callable[[], DiffusionLoss], device: torch.device, fake: FakeTensorMode
) -> DiffusionLoss:
    """Build the loss of a dry run."""
    with fake, device:
        return make()


def encode(setup: Setup, images: Tensor, step: int, rows: range, seed: int | None = None) -> Tensor:
    """Latents of some rows of a batch as the data set gives it; of stochastic encoders a sample for (step, row)."""
    noise = None
    if setup.encoder.stochastic:
        seed = setup.config.optimization.global_seed if seed is None else seed
        noise = row_noise("encoder", seed, step, rows, setup.loss.data_shape, images.device)
    return setup.encoder.to_latents(setup.encoder.encode_pixels(images), noise)


def open_validation(setup: Setup, every: int, held_out: Dataset | None, device: torch.device) -> ValidationData:
    """Open the data and tools of a run's validations.

    Args:
        setup: Setup of the run.
        every: Steps from one validation to the next.
        held_out: Data of the loss; None opens those that the settings name.
        device: Device of the scores.

    Raises:
        UserError: For data of other classes, a number of steps that the sampler refuses, an unusable reference, or if
            a validation has nothing to do.
    """
    settings, process = setup.config.validation, setup.loss.process
    if held_out is None:
        held_out = open_held_out(setup.config, setup.dataset, setup.network.sample_shape)
    if not settings.eval_samples:
        if held_out is None:
            raise UserError(f"--eval-every {every}: nothing to do; give --eval-data-path or --eval-samples")
        return ValidationData(every, held_out, None, None)
    with error_prefix(f"--eval-steps {settings.eval_steps}"):
        pixels, steps = setup.encoder.name == "none", str(settings.eval_steps)
        sampler = make_sampler(PREVIEW_SAMPLER[process.name], process, steps, pixels=pixels)
    scorer = open_scorer(setup.config, setup.encoder.image_shape(setup.network.sample_shape), device)
    if scorer is None and setup.config.data.dataset == "moving-digits":
        setup.setup_warnings.append("moving digits of another size than 8 frames of 16 x 16 pixels have no scores")
    return ValidationData(every, held_out, sampler, scorer)
