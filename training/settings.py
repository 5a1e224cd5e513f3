"""Settings of a training run by group; each group checks itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from data import DATASETS, EMBEDDED
from data.encoders import FP32
from models.acceleration import can_compile
from models.frame_positions import FramePositions
from runtime.devices import DeviceName, check_mps
from runtime.distributed import PRECISIONS
from runtime.launch import machine_size, world_size
from runtime.settings import flag_name, setting
from runtime.stores import Address, parse_path

FLOAT32_MIN, FLOAT32_MAX = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Training data."""

    data_path: Path | None = setting(
        None,
        "root of images or videos, one folder a class; a latent store; tables, shards or idx files",
        free=True,
        remote=True,
    )
    dataset: str = setting(
        "imagefolder",
        "kind of data; extract_latents.py writes latents, (moving) digits are embedded",
        tuple(DATASETS),
    )
    image_size: int | None = setting(None, "side of the images in pixels", shown="256; the data's own, if it has one")
    num_frames: int | None = setting(None, "frames of a clip", shown="the data's own")
    joint_image_list: Path | None = setting(
        None, "text file of images, a path a line, for --joint-images in the place of frames of the videos"
    )
    channels: int | None = setting(
        None,
        "channels without an autoencoder: 3 for RGB, 1 for grey",
        flag="--in-channels",
        shown="3; 1 for (moving) digits; those of idx files",
    )
    vae: str | None = setting(
        None,
        "autoencoder: ema, mse, a local folder, or none for pixels",
        shown="ema; latents: theirs; (moving) digits and idx: none",
    )
    vae_precision: Literal["fp32", "bf16"] = setting(
        FP32, "of the autoencoder; bf16 decodes about three times as fast, and rounds latents"
    )
    flip: bool | None = setting(None, "mirror images at random", shown="yes, but not for digits and idx")
    caption_dropout_prob: float = setting(0.0, "share of captions replaced by the empty one, for guidance")
    strict: bool = setting(False, "end the run at an unreadable image instead of replacing and naming it", free=True)
    num_workers: int = setting(4, "loader processes a rank", free=True)

    def __post_init__(self) -> None:
        """Validate the fields."""
        _at_least(self, 1, "image_size", "num_frames")
        _at_least(self, 0, "num_workers")
        if not 0 <= self.caption_dropout_prob < 1:
            raise ValueError(f"--caption-dropout-prob {self.caption_dropout_prob}: must lie in [0, 1)")
        if self.data_path is not None and self.dataset in EMBEDDED:
            raise ValueError(f"--data-path {self.data_path}: has no effect with --dataset {self.dataset}")


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """Steps, learning rate and average."""

    epochs: int = setting(1400, "epochs to train", free=True)
    max_steps: int | None = setting(None, "end after this many steps, if that is earlier", free=True)
    global_batch_size: int = setting(256, "images a step, over all processes")
    grad_accum: int = setting(1, "micro-batches that a process cuts its part of a step into", free=True)
    lr: float = setting(1e-4, "peak learning rate")
    lr_schedule: Literal["constant", "cosine", "linear"] = setting(
        "constant", "learning rate after warm-up; linear falls to 0 at the last step, and warms up from 0"
    )
    lr_warmup_steps: int = setting(0, "steps of linear warm-up")
    lr_final_ratio: float = setting(0.0, "end of the cosine, as a share of the peak")
    grad_clip: float | None = setting(None, "largest norm of the gradient")
    grad_clip_start: int = setting(0, "step from which on --grad-clip holds")
    grad_norm_mode: Literal["clip", "skip"] = setting("clip", "for a larger norm: clip it, or skip the update")
    skip_updates_above: float | None = setting(
        None, "drop updates with a larger norm, or one that is not a number; average and learning rate stay, too"
    )
    train_only: Literal["added", "labels", "lora"] | None = setting(
        None,
        "train only the parts that the family adds to the one of --init-from, such as skip units; the label table; or "
        "low-rank updates of linear layers (LoRA) and the label table",
        shown="all",
    )
    non_finite: Literal["fatal", "skip"] = setting(
        "fatal", "after a step with a gradient that is not finite (it is never applied)", free=True
    )
    ema_decay: float = setting(0.9999, "decay of the averaged weights (EMA)")
    ema_ramp: bool = setting(False, "average over few steps at first: decay min(ema_decay, (1 + n) / (10 + n))")
    ema_every: int = setting(1, "steps between updates of the average, each with the decays of all these steps")
    global_seed: int = setting(0, "seed of weights, order, noise and dropped labels")

    def __post_init__(self) -> None:
        """Validate the fields."""
        _at_least(self, 1, "epochs", "max_steps", "global_batch_size", "grad_accum", "ema_every")
        _at_least(self, 0, "lr_warmup_steps", "grad_clip_start")
        _positive(self, "lr", "grad_clip", "skip_updates_above")
        for name in ("ema_decay", "lr_final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must lie in [0, 1]")
        if self.lr_final_ratio and self.lr_schedule != "cosine":
            raise ValueError(f"--lr-final-ratio {self.lr_final_ratio}: has no effect without --lr-schedule cosine")
        if self.grad_clip_start and self.grad_clip is None:
            raise ValueError(f"--grad-clip-start {self.grad_clip_start}: has no effect without --grad-clip")
        if self.grad_norm_mode == "skip" and self.grad_clip is None:
            raise ValueError("--grad-norm-mode skip: needs --grad-clip, the norm from which updates are skipped")
        if self.grad_norm_mode == "skip" and self.skip_updates_above is not None:
            raise ValueError("--grad-norm-mode skip: skips updates, too; give it or --skip-updates-above")
        shares = world_size() * self.grad_accum
        if self.global_batch_size % shares:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size}: not divisible by the {world_size()} "
                f"processes times {self.grad_accum} micro-batches; choose a multiple of {shares}"
            )

    def total_steps(self, images: int) -> int:
        """Number of steps of a run on a data set of so many images."""
        steps = max(1, self.epochs * images // self.global_batch_size)
        return min(steps, self.max_steps or steps)

    def learning_rate(self, step: int, total: int) -> float:
        """Learning rate of step `step` (from 0) of `total`: linear warm-up, then constant, cosine or linear."""
        linear = self.lr_schedule == "linear"
        if step < self.lr_warmup_steps:
            return self.lr * (step + (not linear)) / self.lr_warmup_steps
        if self.lr_schedule == "constant":
            return self.lr
        done = (step - self.lr_warmup_steps) / max(1, total - self.lr_warmup_steps)
        if linear:
            return self.lr * (1 - done)
        return self.lr * (self.lr_final_ratio + (1 - self.lr_final_ratio) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Precision, compilation, memory and device."""

    precision: str = setting("tf32", "of matrix products: fp32, tf32 (CUDA; as official), bf16 autocast", PRECISIONS)
    compile: bool = setting(False, "compile every block (on a CPU this needs a C++ compiler)", free=True)
    grad_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, a third slower", free=True
    )
    parallel: Literal["ddp", "fsdp", "hsdp"] = setting(
        "ddp",
        "each of several processes holds all weights; fsdp: its part of them; hsdp: its part in a group of processes",
        free=True,
    )
    shard_ranks: int | None = setting(
        None, "processes of such a group, with --parallel hsdp", shown="those of one machine", free=True
    )
    device: DeviceName | None = setting(None, "where to compute", shown="cuda if there is one", free=True)
    dist_timeout: float = setting(1800.0, "seconds to wait for another process before the run ends", free=True)

    def __post_init__(self) -> None:
        """Validate the fields."""
        _positive(self, "dist_timeout")
        _at_least(self, 2, "shard_ranks")
        if self.shard_ranks is not None and self.parallel != "hsdp":
            raise ValueError(f"--shard-ranks {self.shard_ranks}: has no effect without --parallel hsdp")
        if world_size() > 1 and world_size() % self.holders:
            raise ValueError(
                f"--shard-ranks {self.holders}: does not divide the {world_size()} processes; choose a divisor"
            )
        check_mps(self.device, {"--precision bf16": self.precision == "bf16", "--compile": self.compile})
        on_gpu = self.device not in ("cpu", "mps") and torch.cuda.is_available()
        if self.compile and not can_compile("cuda" if on_gpu else "cpu"):
            raise ValueError("--compile: on a CPU it needs a C++ compiler (g++ or clang++), and none is found")

    @property
    def holders(self) -> int:
        """Number of processes that hold the weights together; 1 where each holds all of them."""
        if self.parallel == "ddp":
            return 1
        return world_size() if self.parallel == "fsdp" else self.shard_ranks or machine_size()


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Start and output of a run."""

    results_dir: Path = setting(
        Path("results"), "folder of all runs, each in a numbered folder; or its address", free=True, remote=True
    )
    resume: str | None = setting(
        None, "resume a run: a checkpoint, or auto for the newest run of these settings", free=True
    )
    override: tuple[str, ...] = setting((), "resume with other values of these flags, such as lr precision", free=True)
    init_from: Path | None = setting(
        None,
        "start from weights: a file of ours, an official .pt, a folder, or owner/name on the hub",
        free=True,
        remote=True,
    )
    keep_classes: bool = setting(
        False, "keep the classes of --init-from, and number those of the data that are new after them", free=True
    )
    frame_positions: FramePositions | None = setting(
        None,
        "for weights of another number of frames: interpolate, in the same time, or extend, at the same interval",
        shown="an error",
        free=True,
    )
    log_every: int = setting(100, "steps between log lines", free=True)
    ckpt_every: int = setting(50_000, "steps between checkpoints; the last step always makes one", free=True)
    keep_last: int | None = setting(None, "number of newest checkpoints to keep", shown="all", free=True)
    checkpoint_format: Literal["one-file", "sharded"] = setting(
        "one-file", "one file by rank 0, or a folder of a file from each process", free=True
    )
    trust_stamps: bool = setting(
        False, "use shards of latents that are not newer than their index without comparing checksums", free=True
    )
    profile: bool = setting(False, "trace some early steps of rank 0 into the run's folder", free=True)
    dry_run: bool = setting(False, "print settings, cost and memory; train and write nothing", free=True)

    def __post_init__(self) -> None:
        """Validate the fields."""
        _at_least(self, 1, "log_every", "ckpt_every", "keep_last")
        _check_resume(self.resume, self.results_dir)
        if self.override and self.resume is None:
            raise ValueError(f"--override {' '.join(self.override)}: has no effect without --resume")
        if self.frame_positions is not None and self.init_from is None:
            raise ValueError(f"--frame-positions {self.frame_positions}: has no effect without --init-from")
        if self.keep_classes and self.init_from is None:
            raise ValueError("--keep-classes: has no effect without --init-from")


def _check_resume(resume: str | None, results: Path) -> None:
    """Check that a checkpoint to resume is where runs of --results-dir are written, if one of both is on a store."""
    if resume in (None, "auto"):
        return
    path = parse_path(resume)
    if not isinstance(path, Address) and isinstance(results, Address):
        raise ValueError(f"--resume {resume}: is not in --results-dir {results}; give a checkpoint there, or auto")
    if isinstance(path, Address) and (len(path.parents) < 3 or path.parents[2] != results):
        raise ValueError(f"--resume {resume}: is not a checkpoint of a run in --results-dir {results}; give its folder")


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Measurements during training."""

    eval_every: int | None = setting(None, "steps between validations, and one at the end", shown="never", free=True)
    eval_data_path: Path | None = setting(
        None, "held-out data, as --data-path; the digits have their own", free=True, remote=True
    )
    eval_split: str | None = setting(None, "its split, of a table", shown="validation, or the only one", free=True)
    eval_images: int = setting(1024, "held-out images of a validation's loss, the first ones", free=True)
    eval_samples: int = setting(16, "images sampled at a validation from the averaged weights; 0: no image", free=True)
    eval_steps: int = setting(50, "steps of that sampling", free=True)
    eval_cfg_scale: float = setting(1.5, "guidance scale of that sampling; 1: no guidance", free=True)
    eval_reference: Path | None = setting(
        None, "ADM's reference .npz with mu and sigma: FID and Inception Score of the samples", free=True, remote=True
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        _at_least(self, 1, "eval_every", "eval_images", "eval_steps")
        _at_least(self, 0, "eval_samples")
        if not 1 <= self.eval_cfg_scale <= FLOAT32_MAX:
            raise ValueError(
                f"--eval-cfg-scale {self.eval_cfg_scale}: must be at least 1 (1 is no guidance), and finite in float32"
            )
        if self.eval_every is None:
            for name in ("eval_reference", "eval_data_path", "eval_split"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{flag_name(name)} {getattr(self, name)}: has no effect without --eval-every")
        elif self.eval_reference is not None and self.eval_samples < 2:
            raise ValueError(f"--eval-samples {self.eval_samples}: FID needs at least 2, better thousands")


@dataclass(frozen=True, kw_only=True)
class AlignmentSettings:
    """Alignment of features with a vision encoder's (REPA)."""

    align: str | None = setting(None, "vision encoder: dinov2_vitb14, ..., or a ViT of timm")
    align_ckpt: Path | None = setting(None, "its weights in a local file", shown="the hub or its cache", free=True)
    align_block: int = setting(8, "number of the block with the aligned features, from 1")
    align_weight: float = setting(0.5, "weight of the alignment loss")
    align_width: int | None = setting(None, "width inside the projector", shown="the network's")

    def __post_init__(self) -> None:
        """Validate the fields."""
        for own in fields(self):
            name = own.name
            if self.align is None and getattr(self, name) != own.default:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: has no effect without --align")


def _at_least(settings: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ValueError(
                f"{flag_name(name)} {value}: must {f'be at least {least}' if least else 'not be negative'}"
            )


def _positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not FLOAT32_MIN <= value <= FLOAT32_MAX:
            raise ValueError(f"{flag_name(name)} {value}: must be positive, and neither 0 nor infinite in float32")
