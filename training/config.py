"""The settings of a training run: train.py's flags, their defaults, and what is refused before any work."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from data import DATASETS
from diffusion import PROCESSES, create_diffusion
from diffusion.flow_matching import LossWeight, TimeDistribution
from diffusion.schedules import BETA_SCHEDULES
from models import FAMILIES
from models.acceleration import can_compile
from runtime import distributed
from runtime.config import flag_name, setting
from runtime.errors import blame
from training.objective import check_alignment

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
    "num_workers log_every ckpt_every keep_last eval_every eval_data_path eval_reference eval_images eval_samples "
    "eval_steps eval_cfg_scale tensorboard profile dry_run align_ckpt dist_timeout device".split()
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
    eval_reference: Path | None = setting(
        None, "ADM's reference .npz with mu and sigma: FID and Inception Score of the images drawn"
    )
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
        on_gpu = self.device != "cpu" and torch.cuda.is_available()
        if self.compile and not can_compile("cuda" if on_gpu else "cpu"):
            raise ValueError("--compile: on a CPU it needs a C++ compiler (g++ or clang++), and none is found")
        shares = distributed.world_size() * self.grad_accum
        if self.global_batch_size % shares:
            raise ValueError(
                f"--global-batch-size {self.global_batch_size}: not divisible by the {distributed.world_size()} "
                f"processes times {self.grad_accum} micro-batches; choose a multiple of {shares}"
            )

    def _check_validation(self) -> None:
        """Refuses validation settings that would do nothing."""
        if self.eval_reference is not None:
            if self.eval_every is None:
                raise ValueError(f"--eval-reference {self.eval_reference}: has no effect without --eval-every")
            if self.dataset == "digits" or self.in_channels == 1:
                raise ValueError(f"--eval-reference {self.eval_reference}: is for RGB images")
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
            if self.eval_reference is not None and self.eval_samples < 2:
                raise ValueError(f"--eval-samples {self.eval_samples}: FID needs at least 2, better thousands")
            if self.dataset == "digits" and 0 < self.eval_samples < 4:
                raise ValueError(f"--eval-samples {self.eval_samples}: the scores need at least 4 (0 for none)")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("--tensorboard: the package is not installed; pip install tensorboard")
