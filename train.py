"""Trains a network of the family: alone, or on many processes under torchrun.

    torchrun --nproc-per-node 8 train.py --data-path /imagenet/train --model DiT-XL/2
    python train.py --dataset digits --model DiT-digits/2 --max-steps 100

Flags and defaults are the official ones; a run's folder holds log.txt, metrics.jsonl, config.json and checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import DATASETS, GlobalBatches, ImageDataset, open_dataset
from data.autoencoder import Autoencoder, open_autoencoder
from data.pixels import from_uint8
from diffusion import Batch, Objective, create_diffusion
from diffusion.schedules import BETA_SCHEDULES
from models import Network, create_model, model_config
from runtime import distributed
from runtime.checkpoint import save_checkpoint
from runtime.config import parse_config, setting, to_dict
from runtime.distributed import World
from runtime.ema import EMA
from runtime.errors import UserError, blame, run
from runtime.files import check_folder
from runtime.run_log import RunLog, create_run_folder
from runtime.seeds import derive_seed


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    data_path: Path | None = setting(None, "root of an image folder: one folder per class")
    dataset: str = setting("imagefolder", "what to train on; the digits are embedded", DATASETS)
    results_dir: Path = setting(Path("results"), "where runs are put, each in a numbered folder")
    # network
    model: str = setting("DiT-XL/2", "name in the registry (models.list_models())")
    image_size: int | None = setting(None, "side of the images in pixels; 256, or 8 for the digits")
    in_channels: int | None = setting(None, "channels without an autoencoder: 3 for RGB, 1 for grey; the model's own")
    num_classes: int | None = setting(None, "number of classes, which the data must have; the model's own (1000)")
    class_dropout_prob: float | None = setting(None, "share of labels dropped for guidance; the model's own (0.1)")
    learn_sigma: bool | None = setting(None, "predict the variance too; the model's own (yes)")
    vae: str | None = setting(None, "autoencoder: ema, mse, a local folder, or none for pixels (ema; digits: none)")
    # process
    noise_schedule: str = setting("linear", "betas", BETA_SCHEDULES)
    predict_xstart: bool = setting(False, "predict the clean image instead of the noise")
    # optimisation
    epochs: int = setting(1400, "passes over the data")
    max_steps: int | None = setting(None, "stop after this many steps, whatever the epochs")
    global_batch_size: int = setting(256, "images per step over all processes")
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
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))
    tf32: bool = setting(True, "TF32 matrix products on CUDA, as the official script")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        for name in ("epochs", "max_steps", "global_batch_size", "log_every", "ckpt_every", "image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        for name in ("lr_warmup_steps", "num_workers", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must not be negative")
        for name in ("ema_decay", "lr_final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must lie in [0, 1]")
        if self.class_dropout_prob is not None and not 0 <= self.class_dropout_prob < 1:
            raise ValueError(f"--class-dropout-prob {self.class_dropout_prob}: must lie in [0, 1)")
        if self.lr <= 0:
            raise ValueError(f"--lr {self.lr}: must be positive")
        if self.lr_final_ratio and self.lr_schedule == "constant":
            raise ValueError(f"--lr-final-ratio {self.lr_final_ratio}: has no effect without --lr-schedule cosine")
        if self.data_path is not None and self.dataset == "digits":
            raise ValueError(f"--data-path {self.data_path}: has no effect with --dataset digits")
        if self.global_batch_size % distributed.world_size():
            raise ValueError(
                f"--global-batch-size {self.global_batch_size}: not divisible by the {distributed.world_size()} "
                "processes; choose a multiple"
            )


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate of step `step` (from 0) of `total`: linear warm-up, then constant or cosine."""
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.lr_warmup_steps) / max(1, total - config.lr_warmup_steps)
    return config.lr * (config.lr_final_ratio + (1 - config.lr_final_ratio) * (1 + math.cos(math.pi * done)) / 2)


@dataclass
class Setup:
    """Everything that is fixed before the first step."""

    config: TrainConfig  # with all "the model's own" resolved
    dataset: ImageDataset
    autoencoder: Autoencoder
    latent_shape: tuple[int, int, int]
    objective: Objective
    total_steps: int
    process_settings: dict[str, Any]

    @property
    def network(self) -> Network:
        """The network being trained."""
        return self.objective.network


def set_up(config: TrainConfig, device: torch.device) -> Setup:
    """Opens the data, builds network and process, and checks that they fit; nothing is written yet."""
    with blame("--model"):
        wanted = network_settings(config)
    channels = config.in_channels or (1 if config.dataset == "digits" else 3)
    with blame("--dataset digits" if config.dataset == "digits" else f"--data-path {config.data_path}"):
        dataset = open_dataset(
            config.dataset, config.data_path, config.image_size, channels, flip=config.flip, seed=config.global_seed
        )
    if len(dataset.classes) != wanted["num_classes"]:
        raise UserError(
            f"--num-classes {wanted['num_classes']}: the data has {len(dataset.classes)} classes; "
            f"use --num-classes {len(dataset.classes)}"
        )
    vae = config.vae or ("none" if config.dataset == "digits" else "ema")
    with blame(f"--vae {vae}"):
        autoencoder = open_autoencoder(vae, dataset.image_shape[-1], device)
        latent_shape = autoencoder.latent_shape(dataset.image_shape)
    torch.manual_seed(derive_seed("weights", config.global_seed))
    with blame(f"--image-size {dataset.image_shape[-1]}"):
        network = create_model(config.model, **wanted, input_size=latent_shape[-1], in_channels=latent_shape[0])
    settings: dict[str, Any] = {"noise_schedule": config.noise_schedule, "predict_xstart": config.predict_xstart}
    settings["learn_sigma"] = network.out_channels != network.in_channels
    resolved = dataclasses.replace(
        config,
        vae=vae,
        image_size=dataset.image_shape[-1],
        in_channels=dataset.image_shape[0],
        num_classes=network.num_classes,
        class_dropout_prob=network.class_dropout_prob,
        learn_sigma=settings["learn_sigma"],
    )
    objective = Objective(network.to(device), create_diffusion(**settings), seed=config.global_seed)
    total = max(1, config.epochs * len(dataset) // config.global_batch_size)
    total = min(total, config.max_steps) if config.max_steps else total
    return Setup(resolved, dataset, autoencoder, latent_shape, objective, total, settings)


def network_settings(config: TrainConfig) -> dict[str, Any]:
    """What the flags say about the network's config; the model's own values where they are silent."""
    named = model_config(config.model)
    fields = ("num_classes", "class_dropout_prob", "learn_sigma")
    return {f: getattr(named, f) if getattr(config, f) is None else getattr(config, f) for f in fields}


def checkpoint_meta(setup: Setup, step: int) -> dict[str, Any]:
    """The JSON document of a checkpoint: all that sample.py needs to know."""
    return {
        "format": 1,
        "step": step,
        "model": {"name": setup.config.model, **dataclasses.asdict(setup.network.config)},
        "process": {"name": "gaussian", **setup.process_settings},
        "data": {"vae": setup.config.vae, "image_shape": setup.dataset.image_shape, "classes": setup.dataset.classes},
        "train": to_dict(setup.config),
    }


def save(setup: Setup, ema: EMA[Network], optimizer: torch.optim.Optimizer, step: int, folder: Path) -> Path:
    """Writes a checkpoint with weights, average and optimizer state."""
    path = folder / "checkpoints" / f"{step:07d}.safetensors"
    named = setup.network.named_parameters()
    moments = {f"{name}/{key}": value for name, p in named for key, value in optimizer.state.get(p, {}).items()}
    groups = {"model": setup.network.state_dict(), "ema": ema.network.state_dict(), "optimizer": moments}
    save_checkpoint(path, groups, checkpoint_meta(setup, step))
    return path


class LossMeter:
    """Averages losses between two log lines, on the device: reading them waits for it, so that happens only then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._since = 0, time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Counts one step's per-sample losses."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().mean()
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Means over steps and processes, and steps per second; starts anew."""
        means = distributed.mean_over_ranks(torch.stack(list(self._sums.values())) / self._steps).tolist()
        values = dict(zip(self._sums, means, strict=True))
        now = time.perf_counter()
        values["steps_per_sec"] = self._steps / (now - self._since)
        self._sums, self._steps, self._since = {}, 0, now
        return values


def train(setup: Setup, world: World, folder: Path | None) -> None:
    """The training loop."""
    config, log = setup.config, RunLog(folder)
    log.line(f"Experiment directory created at {folder}")
    log.line(f"{config.model.split('-')[0]} Parameters: {sum(p.numel() for p in setup.network.parameters()):,}")
    log.line(f"Dataset contains {len(setup.dataset):,} images ({config.data_path or config.dataset})")

    objective: nn.Module = setup.objective
    if world.size > 1:
        devices = [world.device.index] if world.device.type == "cuda" else None
        objective = DistributedDataParallel(objective, device_ids=devices, gradient_as_bucket_view=True)
    trained = [p for p in setup.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=config.lr, betas=config.adam_betas, weight_decay=config.weight_decay, fused=True
    )
    ema = EMA(setup.network, config.ema_decay, ramp=config.ema_ramp)
    log.line(f"Training for {config.epochs} epochs, {setup.total_steps:,} steps...")

    meter = LossMeter()
    for step, batch, draws in tqdm(
        batches(setup, world), total=setup.total_steps, disable=None if world.is_main else True, unit="step"
    ):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, setup.total_steps)
        losses = objective(batch, step, draws)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].mean().backward()
        optimizer.step()
        ema.update()
        meter.add(losses)

        done = step + 1
        if done % config.log_every == 0:
            values = meter.read()
            log.line(
                f"(step={done:07d}) Train Loss: {values['loss']:.4f}, Train Steps/Sec: {values['steps_per_sec']:.2f}"
            )
            log.metrics(step=done, lr=learning_rate(config, step, setup.total_steps), **values)
        if folder is not None and (done % config.ckpt_every == 0 or done == setup.total_steps):
            log.line(f"Saved checkpoint to {save(setup, ema, optimizer, done, folder)}")
    log.line("Done!")


def batches(setup: Setup, world: World) -> Iterator[tuple[int, Batch, Any]]:
    """Each step's number, this rank's rows of its batch, and their draws."""
    config = setup.config
    size = config.global_batch_size
    keys = GlobalBatches(
        len(setup.dataset), size, rank=world.rank, world=world.size, seed=config.global_seed,
        steps=range(setup.total_steps),
    )  # fmt: skip
    loader: DataLoader[Any] = DataLoader(
        setup.dataset,  # type: ignore[arg-type]  # items are asked for by (epoch, index)
        batch_sampler=keys,
        num_workers=config.num_workers,
        pin_memory=world.device.type == "cuda",
        persistent_workers=config.num_workers > 0,
    )
    local = slice(world.rank * size // world.size, (world.rank + 1) * size // world.size)
    for step, (images, y, index) in enumerate(loader):
        draws = setup.objective.draw(step, size, setup.latent_shape, world.device).rows(local.start, local.stop)
        pixels = from_uint8(images.to(world.device, non_blocking=True))
        latents = setup.autoencoder.encode(pixels, draws.encoder_noise)
        yield step, Batch(latents, y.to(world.device, non_blocking=True), index), draws


def main(argv: Sequence[str]) -> None:
    """Parses flags, sets up, trains."""
    config = parse_config(TrainConfig, argv, program="train.py", description=__doc__.split("\n")[0])
    check_folder(config.results_dir, "--results-dir")
    with distributed.world(config.device) as world:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
        setup = set_up(config, world.device)
        folder = None
        if world.is_main:
            folder = create_run_folder(config.results_dir, config.model.replace("/", "-"))
            (folder / "checkpoints").mkdir()
            (folder / "config.json").write_text(json.dumps(to_dict(setup.config), indent=2) + "\n")
        train(setup, world, folder)


if __name__ == "__main__":
    sys.exit(run(main, "train.py"))
