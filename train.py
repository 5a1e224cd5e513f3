"""Trains a network of the family: alone, or on many processes under torchrun.

    torchrun --nproc-per-node 8 train.py --data-path /imagenet/train --model DiT-XL/2
    python train.py --dataset digits --model DiT-digits/2 --max-steps 100

Flags and defaults are the official ones; a run's folder holds log.txt, metrics.jsonl, config.json and checkpoints.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from data import DATASETS, ImageDataset, open_dataset, open_digits, open_encoder
from diffusion import PROCESSES, Objective, create_diffusion
from diffusion.flow_matching import LossWeight, TimeDistribution
from diffusion.schedules import BETA_SCHEDULES
from dry_run import print_dry_run
from models import FAMILIES, TrainingRecipe, create_model, family_of, model_config
from models.transfer import adapt_weights
from objective_setup import check_alignment, open_alignment, process_name, process_settings, resolved_process
from runtime import distributed
from runtime.checkpoint import Checkpoint, load_weights, read_checkpoint
from runtime.config import flag_name, parse_config, setting, to_dict
from runtime.distributed import World
from runtime.errors import UserError, blame, run
from runtime.files import check_folder
from runtime.resume import Resumable, cut_metrics, differences, find_resumable, read_resumable
from runtime.run_log import RunLog, create_run_folder
from runtime.seeds import derive_seed
from trainer import Setup, Trainer

PRECISIONS = ("fp32", "tf32", "bf16")
NON_FINITE = ("fatal", "skip")
GRAD_NORM_MODES = ("clip", "skip")
# Settings of some network's config, and of some family's recipe; None, as everywhere, is the model's own.
NETWORK_SETTINGS = (
    "num_classes class_dropout_prob learn_sigma encoder_depth router_layout width_router_bias token_router_bias".split()
)
RECIPE_SETTINGS = sorted({f.name for row in FAMILIES.values() for f in dataclasses.fields(row.network.recipe_class)})
# Settings that say how a run is carried out, not what it computes: they may change when it is resumed.
FREE_ON_RESUME = frozenset(
    "results_dir resume init_from data_path strict epochs max_steps grad_accum grad_checkpointing compile non_finite "
    "num_workers log_every ckpt_every keep_last eval_every eval_data_path eval_images eval_samples eval_steps "
    "eval_cfg_scale tensorboard profile dry_run align_ckpt dist_timeout device".split()
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    data_path: Path | None = setting(None, "root of an image folder, one folder per class; or a folder of latents")
    dataset: str = setting("imagefolder", "latents come from extract_latents.py; the digits are embedded", DATASETS)
    strict: bool = setting(False, "an unreadable image ends the run, instead of being named and replaced")
    results_dir: Path = setting(Path("results"), "where runs are put, each in a numbered folder")
    resume: str | None = setting(None, "go on with a run: a checkpoint, or auto for the newest run of these settings")
    init_from: Path | None = setting(None, "start from the weights in a file: ours, or an official .pt")
    # network
    model: str = setting("DiT-XL/2", "name in the registry (models.list_models())")
    image_size: int | None = setting(None, "side of the images in pixels; 256, or 8 for the digits")
    in_channels: int | None = setting(None, "channels without an autoencoder: 3 for RGB, 1 for grey; the model's own")
    num_classes: int | None = setting(None, "number of classes, which the data must have; the model's own (1000)")
    class_dropout_prob: float | None = setting(None, "share of labels dropped for guidance; the model's own (0.1)")
    learn_sigma: bool | None = setting(None, "predict the variance too; the model's own (yes), no for a flow")
    encoder_depth: int | None = setting(None, "blocks of a divided network's encoder, of all its blocks; its own")
    vae: str | None = setting(
        None, "autoencoder: ema, mse, a local folder, or none for pixels (ema; digits: none; latents: their own)"
    )
    router_layout: str | None = setting(None, "DyDiT: first_always_on or all_heads; as in --init-from, or the first")
    width_router_bias: float | None = setting(None, "DyDiT: initial bias of width routers (15)")
    token_router_bias: float | None = setting(None, "DyDiT: initial bias of token routers (35)")
    # what the model's family trains for
    flops_target: float | None = setting(None, "DyDiT: share of the blocks' multiply-adds to come down to (0.5)")
    flops_warmup_steps: int | None = setting(None, "DyDiT: steps over which that target falls from 1 (1000)")
    flops_weight: float | None = setting(None, "DyDiT: weight of the squared distance from the target (2)")
    complete_loss_steps: int | None = setting(None, "DyDiT: steps that also train the network unrouted; all")
    gate_noise_steps: int | None = setting(None, "DyDiT: steps with noise in the routers' decisions; all")
    stratified_t: bool | None = setting(None, "DyDiT: times of a batch cover the four quarters evenly (no)")
    rank_by_magnitude: bool | None = setting(
        None, "DyDiT: sort the heads and MLP channels of --init-from, largest first (no)"
    )
    # process
    process: str | None = setting(None, "how images are noised; what the family is published with", tuple(PROCESSES))
    noise_schedule: str = setting("linear", "betas", BETA_SCHEDULES)
    predict_xstart: bool = setting(False, "predict the clean image instead of the noise")
    flow_times: str | None = setting(None, "distribution of a flow's times (logit_normal)", get_args(TimeDistribution))
    flow_shift: float | None = setting(None, "shift of a flow's times, above 1 towards noise (1)")
    flow_weight: str | None = setting(None, "weight of a flow's loss at its times (constant)", get_args(LossWeight))
    flow_direction: float | None = setting(None, "weight of 1 - cosine between a flow's velocities (0)")
    # alignment with a vision encoder
    align: str | None = setting(None, "align features with this encoder's: dinov2_vitb14, ..., or a ViT of timm; none")
    align_ckpt: Path | None = setting(None, "the encoder's weights in a local file; else the hub or its cache")
    align_block: int = setting(8, "number of the block whose features are aligned, from 1")
    align_weight: float = setting(0.5, "weight of the alignment loss")
    align_width: int | None = setting(None, "width inside the projector; the network's")
    # optimisation
    epochs: int = setting(1400, "passes over the data")
    max_steps: int | None = setting(None, "stop after this many steps, whatever the epochs")
    global_batch_size: int = setting(256, "images per step over all processes")
    grad_accum: int = setting(1, "micro-batches per step and process; the step's result is the same")
    grad_clip: float | None = setting(None, "largest norm of the gradient; none")
    grad_norm_mode: str = setting("clip", "what happens to a larger one: clip it, or skip the update", GRAD_NORM_MODES)
    grad_checkpointing: bool = setting(False, "recompute activations in the backward pass: less memory, a third slower")
    precision: str = setting("tf32", "of matrix products: fp32, tf32 (CUDA; as official), bf16 autocast", PRECISIONS)
    compile: bool = setting(False, "compile every block (on a CPU this needs a C++ compiler)")
    non_finite: str = setting("fatal", "after a step whose gradient is not finite (it is never applied)", NON_FINITE)
    global_seed: int = setting(0, "seed of weights, order, noise and dropped labels")
    lr: float = setting(1e-4, "peak learning rate of AdamW")
    lr_schedule: str = setting("constant", "learning rate after warm-up", ("constant", "cosine"))
    lr_warmup_steps: int = setting(0, "steps of linear warm-up")
    lr_final_ratio: float = setting(0.0, "where cosine ends, as a share of the peak")
    adam_betas: tuple[float, float] = setting((0.9, 0.999), "AdamW's betas")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    ema_decay: float = setting(0.9999, "decay of the averaged weights")
    ema_ramp: bool = setting(False, "average over little at first: decay min(ema_decay, (1 + n) / (10 + n))")
    flip: bool | None = setting(None, "mirror images at random; yes, but not for the digits")
    # running
    num_workers: int = setting(4, "loader processes per rank")
    log_every: int = setting(100, "steps between log lines")
    ckpt_every: int = setting(50_000, "steps between checkpoints; the last step always makes one")
    keep_last: int | None = setting(None, "keep this many newest checkpoints of the run; all")
    eval_every: int | None = setting(None, "steps between validations, and one at the end; never")
    eval_data_path: Path | None = setting(None, "held-out data, as --data-path; the digits have their own")
    eval_images: int = setting(1024, "held-out images of a validation's loss, the first ones")
    eval_samples: int = setting(16, "images drawn at a validation, by DDIM from the averaged weights; 0 for none")
    eval_steps: int = setting(50, "steps of that sampling")
    eval_cfg_scale: float = setting(1.5, "guidance scale of that sampling; 1 is none")
    tensorboard: bool = setting(False, "write the metrics for TensorBoard too (needs the package tensorboard)")
    profile: bool = setting(False, "trace some early steps of the main process into the run's folder")
    dry_run: bool = setting(False, "say what would be trained, its cost and its memory; train and write nothing")
    dist_timeout: float = setting(1800.0, "seconds to wait for another process before the run ends")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        counts = "epochs max_steps global_batch_size grad_accum log_every ckpt_every keep_last image_size".split()
        for name in (*counts, "eval_every", "eval_images", "eval_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag_name(name)} {value}: must be at least 1")
        for name in ("lr_warmup_steps", "num_workers", "weight_decay", "eval_samples"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must not be negative")
        for name in ("ema_decay", "lr_final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must lie in [0, 1]")
        if self.class_dropout_prob is not None and not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"--class-dropout-prob {self.class_dropout_prob}: must lie in [0, 1)")
        for name in ("lr", "grad_clip", "dist_timeout"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{flag_name(name)} {value}: must be positive and finite")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"--adam-betas {' '.join(map(str, self.adam_betas))}: both must lie in [0, 1)")
        if self.in_channels not in (None, 1, 3) or (self.dataset == "digits" and self.in_channels == 3):
            raise ValueError(f"--in-channels {self.in_channels}: 3 for RGB or 1 for grey (the digits are grey)")
        if not 1 <= self.eval_cfg_scale < math.inf:
            raise ValueError(
                f"--eval-cfg-scale {self.eval_cfg_scale}: must be at least 1 (1 is no guidance), and finite"
            )
        self._check_validation()
        check_alignment(self)
        if self.lr_final_ratio and self.lr_schedule == "constant":
            raise ValueError(f"--lr-final-ratio {self.lr_final_ratio}: has no effect without --lr-schedule cosine")
        if self.data_path is not None and self.dataset == "digits":
            raise ValueError(f"--data-path {self.data_path}: has no effect with --dataset digits")
        if self.resume not in (None, "auto") and self.init_from is not None:
            raise ValueError(f"--init-from {self.init_from}: has no effect with --resume {self.resume}")
        if self.rank_by_magnitude and self.init_from is None and self.resume is None:
            raise ValueError("--rank-by-magnitude: has no effect without --init-from")
        if self.grad_norm_mode == "skip" and self.grad_clip is None:
            raise ValueError("--grad-norm-mode skip: needs --grad-clip, the norm from which updates are skipped")
        if self.compile and self.device != "cuda" and not torch.cuda.is_available() and not _has_compiler():
            raise ValueError("--compile: on a CPU it needs a C++ compiler (g++ or clang++), and none is found")
        shares = distributed.world_size() * self.grad_accum
        if self.global_batch_size % shares:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size}: not divisible by the {distributed.world_size()} "
                f"processes times {self.grad_accum} micro-batches; choose a multiple of {shares}"
            )

    def _check_validation(self) -> None:
        """Refuses validation settings that would do nothing."""
        if self.eval_data_path is not None:
            if self.eval_every is None:
                raise ValueError(f"--eval-data-path {self.eval_data_path}: has no effect without --eval-every")
            if self.dataset == "digits":
                raise ValueError(f"--eval-data-path {self.eval_data_path}: the digits have a test split of their own")
        elif self.eval_every is not None and self.dataset != "digits" and not self.eval_samples:
            raise ValueError(f"--eval-every {self.eval_every}: nothing to do; give --eval-data-path or --eval-samples")
        if self.eval_every is not None:
            with blame(f"--eval-steps {self.eval_steps}"):
                create_diffusion(str(self.eval_steps))
            if self.dataset == "digits" and 0 < self.eval_samples < 4:
                raise ValueError(f"--eval-samples {self.eval_samples}: the scores need at least 4 (0 for none)")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("--tensorboard: the package is not installed; pip install tensorboard")


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


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
    return Setup(resolved, dataset, held_out, autoencoder, latent_shape, objective, total, settings)


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
    """What the flags say about the network's config; the model's own values where they are silent."""
    named = model_config(config.model)
    settings = {}
    if process_name(config) == "flow" and hasattr(named, "learn_sigma"):
        if config.learn_sigma:
            raise UserError("--learn-sigma: a flow has no variance; use --process gaussian")
        named = dataclasses.replace(named, learn_sigma=False)
    for field in NETWORK_SETTINGS:
        if getattr(config, field) is not None:
            settings[field] = getattr(config, field)
        elif hasattr(named, field):  # not every family predicts a variance
            settings[field] = getattr(named, field)
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


def find_run(setup: Setup) -> Resumable | None:
    """The run that --resume means.

    Raises:
        UserError: if a checkpoint was named that is unusable, or was made with other settings.
    """
    config = setup.config
    settings = to_dict(config)
    if config.resume is None:
        return None
    # A cosine spans all steps: with another number of them, the steps already taken would have been others.
    free = FREE_ON_RESUME if config.lr_schedule == "constant" else FREE_ON_RESUME - {"epochs", "max_steps"}
    if config.init_from is not None:
        free -= {"init_from"}  # with --resume auto: the run that began there, or a new one
    if config.resume == "auto":
        return find_resumable(config.results_dir, settings, free, partial(print, file=sys.stderr))
    resumable = read_resumable(Path(config.resume))
    changed = differences(resumable.meta["train"], settings, free)
    if changed:
        raise UserError(f"--resume {config.resume}: the run has other settings: {'; '.join(changed[:3])}")
    return resumable


def open_run(setup: Setup, world: World, resumable: Resumable | None) -> Path | None:
    """The run's folder, on the main process: the one to go on in, or a new one with its config."""
    if not world.is_main:
        return None
    if resumable is not None:
        cut_metrics(resumable.folder, resumable.meta["step"])
        RunLog(resumable.folder).line(f"Resumed {resumable.folder} at step {resumable.meta['step']}")
        return resumable.folder
    folder = create_run_folder(setup.config.results_dir, setup.config.model.replace("/", "-"))
    (folder / "checkpoints").mkdir()
    (folder / "config.json").write_text(json.dumps(to_dict(setup.config), indent=2) + "\n")
    RunLog(folder).line(f"Experiment directory created at {folder}")
    return folder


def main(argv: Sequence[str]) -> None:
    """Parses flags, sets up, trains."""
    config = parse_config(TrainConfig, argv, program="train.py", description=__doc__.split("\n")[0])
    if not config.dry_run:
        check_folder(config.results_dir, "--results-dir")
    with distributed.world(config.device, config.dist_timeout) as world:
        distributed.allow_tf32(config.precision != "fp32")
        start = read_checkpoint(config.init_from, flag="--init-from") if config.init_from else None
        setup = set_up(config, world.device, start)
        notes = initialise(setup, start) if start else []
        del start  # a second copy of all weights
        if config.dry_run:
            print_dry_run(setup, world)
            return
        resumable = find_run(setup)
        distributed.barrier()  # every rank has looked before the main one makes a new folder
        folder = open_run(setup, world, resumable)
        for note in notes if resumable is None else ():
            RunLog(folder).line(f"--init-from: {note}")
        Trainer(setup, world, folder, resumable).run()


if __name__ == "__main__":
    sys.exit(run(main, "train.py"))
