"""Which images a checkpoint draws: flags, samplers, and what decides where no flag does.

A flag decides; where none is given, the checkpoint does (ours know their model, process and autoencoder; released ones
have a preset in runtime/releases.py); where it does not know, the official default.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast, get_args

import torch

from data.autoencoder import OFFICIAL_CHANNELS, OFFICIAL_FACTOR, OFFICIAL_VAES
from diffusion import PROCESSES, PUBLISHED_PROCESS, FlowMatching
from diffusion.flow_samplers import Kind
from diffusion.processes import flow_steps
from diffusion.sampling import Sampler
from models import FAMILIES, TimeConvention, family_of
from models.acceleration import can_compile
from models.loading import settings_of
from runtime import distributed
from runtime.checkpoint import Checkpoint
from runtime.config import flag_name, setting
from runtime.download import obtain
from runtime.errors import UserError, blame
from runtime.releases import Preset, Release, close_names, find_release, release_of_model

PRECISIONS = ("fp32", "tf32", "bf16")
SDE_KINDS = tuple(kind for kind in get_args(Kind) if kind != "ode")
SHARING = ("uniform", "cheapest")
# How the official code samples from files without a preset of their own: DiT's guides the first 3 of 4 latent channels.
FOREIGN = {
    "gaussian": Preset("ddpm", "250", 1.5, channels=3),
    "flow": Preset("euler", "250", 1.5, channels=None),
}
OURS = FOREIGN["gaussian"]._replace(channels=None)
TIMESTEPS = 1000  # of a Gaussian process


class SamplerRow(NamedTuple):
    """A sampler by its name on the command line.

    Attributes:
        process: the process it belongs to, as checkpoints call it.
        steps: what it takes where nobody says.
        make: from a process, the settings, whether clean images are clipped, and the network's time convention.
    """

    process: str
    steps: str
    make: Callable[[Any, SamplingConfig, bool, TimeConvention], Sampler]


def _make_euler(process: FlowMatching, config: SamplingConfig, clip: bool, convention: TimeConvention) -> Sampler:
    kind = cast(Kind, config.sde or "ode")
    return process.euler(*_grid(config), kind=kind, convention=convention)


def _make_heun(process: FlowMatching, config: SamplingConfig, clip: bool, convention: TimeConvention) -> Sampler:
    return process.heun(*_grid(config), exact=config.heun_exact, convention=convention)


def _make_adams(process: FlowMatching, config: SamplingConfig, clip: bool, convention: TimeConvention) -> Sampler:
    steps, shift, last_step = _grid(config)
    return process.adams(steps, config.adams_order, shift, last_step, convention=convention)


def _grid(config: SamplingConfig) -> tuple[int, float, float | None]:
    """Number of steps, shift and last step of a flow's sampler."""
    return flow_steps(config.num_sampling_steps or "250"), config.time_shift or 1.0, config.last_step


def _check_length(steps: str) -> None:
    if steps.isdecimal() and int(steps) > TIMESTEPS:
        raise ValueError(f"at most {TIMESTEPS}; of a flow more, with --sampler euler, heun or adams")


# A new sampler is one row.
SAMPLERS = {
    "ddpm": SamplerRow("gaussian", "250", lambda process, config, clip, time: process.ancestral(clip, convention=time)),
    "ddim": SamplerRow(
        "gaussian", "ddim50", lambda process, config, clip, time: process.ddim(config.eta, clip, convention=time)
    ),
    "dpm++": SamplerRow(
        "gaussian", "20", lambda process, config, clip, time: process.dpm_solver(clip, convention=time)
    ),
    "euler": SamplerRow("flow", "250", _make_euler),
    "heun": SamplerRow("flow", "50", _make_heun),
    "adams": SamplerRow("flow", "50", _make_adams),
}
# Settings of some samplers alone: flag -> samplers.
ONLY_FOR = {
    "eta": ("ddim",),
    "time_shift": ("euler", "heun", "adams"),
    "last_step": ("euler", "heun", "adams"),
    "sde": ("euler",),
    "heun_exact": ("heun",),
    "adams_order": ("adams",),
}


@dataclass(frozen=True)
class SamplingConfig:
    """Settings that say which images a checkpoint draws; shared by sample.py and sample_ddp.py."""

    ckpt: Path | None = setting(None, "checkpoint: ours, an official file, or the name of a released one")
    weights: str = setting("ema", "which weights of a training checkpoint", ("ema", "model"))
    model: str | None = setting(
        None, "name in the registry, told by the weights; without --ckpt: its released checkpoint"
    )
    image_size: int | None = setting(None, "side in pixels, told by the weights; without --ckpt: 256")
    num_classes: int | None = setting(None, "number of classes; told by the weights")
    vae: str | None = setting(None, "autoencoder: ema, mse, a local folder, or none; our checkpoints know it")
    pretrained_dir: Path = setting(Path("pretrained_models"), "where released checkpoints are downloaded to")
    sampler: str | None = setting(
        None,
        "ancestral, DDIM, DPM-Solver++(2M); of flows Euler, Heun, Adams-Bashforth; a release's own",
        tuple(SAMPLERS),
    )
    num_sampling_steps: str | None = setting(
        None, "step spec, such as 250, 10,15,20 or ddim50; by the sampler 250, ddim50, 20, or a release's own"
    )
    eta: float = setting(0.0, "noise of DDIM: 0 none, 1 as much as DDPM")
    time_shift: float | None = setting(None, "of a flow: above 1 for more steps near the noise (1, or a release's own)")
    last_step: float | None = setting(None, "of a flow: length of the last step (as all others, or a release's own)")
    sde: str | None = setting(None, "euler: a stochastic process instead of the ODE", SDE_KINDS)
    heun_exact: bool = setting(False, "heun: evaluate twice a step")
    adams_order: int = setting(2, "adams: velocities that a step looks back on, 1 to 4")
    cache_depth: int | None = setting(None, "blocks at an end that run when state is reused; a Skip-DiT has its own")
    cache_interval: int | None = setting(None, "Skip-Cache: compute kept state every N evaluations, and in the tail")
    refresh_rate: int | None = setting(None, "encoder sharing: compute kept state once in R evaluations")
    sharing: str = setting(
        "uniform", "every R-th, or the cheapest of as many by similarity, measured once, kept in --sharing-dir", SHARING
    )
    sharing_dir: Path = setting(Path("sharing"), "where measured similarities are kept, with their settings")
    clip_denoised: bool | None = setting(
        None, "clamp predicted clean images to [-1, 1]; yes for pixels, no for latents"
    )
    cfg_scale: float | None = setting(None, "guidance scale; 1 is none (1.5, or a release's own)")
    guidance_channels: int | None = setting(None, "guide this many leading channels; 3 for official files, else all")
    guidance_interval: tuple[float, float] | None = setting(
        None, "guide only strictly between these timesteps (0 clean, 1000 noise); everywhere, or a release's own"
    )
    precision: str = setting("tf32", "of the network: fp32, tf32 (CUDA; as official), bf16 autocast", PRECISIONS)
    tf32: bool = setting(True, "TF32 for whatever is in float32, with --precision tf32 or bf16 (CUDA)")
    compile: bool = setting(False, "compile every block (on a CPU this needs a C++ compiler)")
    cuda_graphs: bool = setting(False, "record evaluations as CUDA graphs: faster small batches, slower first one")
    vae_precision: str = setting("fp32", "of the autoencoder; bf16 decodes about three times as fast", ("fp32", "bf16"))
    vae_batch_size: int = setting(16, "images decoded at a time")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        if self.ckpt is None and self.model is None and self.image_size is None:
            raise ValueError(
                "--ckpt: required; give a checkpoint of train.py, an official file, or a released one by its name; "
                "or --model for a model's released checkpoint"
            )
        if self.cfg_scale is not None and not 1 <= self.cfg_scale < float("inf"):
            raise ValueError(f"--cfg-scale {self.cfg_scale}: must be at least 1 (1 is no guidance), and finite")
        self._check_sampler()
        self._check_reuse()
        for name in ("guidance_channels", "vae_batch_size", "image_size", "num_classes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < high <= 1000:
                raise ValueError(f"--guidance-interval {low} {high}: must be two timesteps, 0 <= LOW < HIGH <= 1000")
            if self.cfg_scale == 1:
                raise ValueError(f"--guidance-interval {low} {high}: has no effect with --cfg-scale 1")
        on_gpu = self.device != "cpu" and torch.cuda.is_available()
        if self.cuda_graphs and not on_gpu:
            raise ValueError("--cuda-graphs: needs a CUDA device")
        if self.compile and not can_compile("cuda" if on_gpu else "cpu"):
            raise ValueError("--compile: on a CPU it needs a C++ compiler (g++ or clang++), and none is found")

    def _check_sampler(self) -> None:
        """Refuses settings of another sampler, and values that make none; with the sampler unknown, what can be."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, samplers in ONLY_FOR.items():
            value = getattr(self, name)
            unsaid = self.sampler is None and len(samplers) > 1  # the checkpoint will say it
            if value != defaults[name] and self.sampler not in samplers and not unsaid:
                wanted = " or ".join(samplers)
                raise ValueError(f"{flag_name(name)} {value}: has an effect with --sampler {wanted} only")
        if not 1 <= self.adams_order <= 4:
            raise ValueError(f"--adams-order {self.adams_order}: must lie in 1..4")
        if self.time_shift is not None and not 0 < self.time_shift < float("inf"):
            raise ValueError(f"--time-shift {self.time_shift}: must be positive and finite")
        if self.last_step is not None and not 0 < self.last_step < 1:
            raise ValueError(f"--last-step {self.last_step}: must lie strictly between 0 and 1")
        if self.num_sampling_steps is not None:
            process = SAMPLERS[self.sampler].process if self.sampler else next(iter(PROCESSES))
            with blame(f"--num-sampling-steps {self.num_sampling_steps}"):
                if process == "gaussian":
                    _check_length(self.num_sampling_steps)
                PROCESSES[process].for_steps(self.num_sampling_steps, {}, True)

    def _check_reuse(self) -> None:
        """Refuses settings of state reuse that cannot be meant, or do nothing."""
        for name in ("cache_depth", "cache_interval", "refresh_rate"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        if self.cache_depth is not None and self.cache_interval is None and self.refresh_rate is None:
            raise ValueError(
                f"--cache-depth {self.cache_depth}: has no effect without --cache-interval or --refresh-rate"
            )
        if self.cache_interval is not None and self.refresh_rate is not None:
            raise ValueError(f"--refresh-rate {self.refresh_rate}: has no effect with --cache-interval")
        if self.sharing != "uniform" and self.refresh_rate is None:
            raise ValueError(f"--sharing {self.sharing}: has no effect without --refresh-rate")


C = TypeVar("C", bound=SamplingConfig)


class Facts(NamedTuple):
    """What is known about a checkpoint once it is read.

    Attributes:
        model: name in the registry.
        config: fields of the model's config that differ from those of its name.
        process: name of the process, and its settings.
        vae: autoencoder, by the value of `--vae`.
        image_shape: (C, H, W).
        preset: how to sample where no flag says it.
    """

    model: str
    config: dict[str, Any]
    process: tuple[str, dict[str, Any]]
    vae: str
    image_shape: tuple[int, int, int]
    preset: Preset


def locate(config: SamplingConfig) -> tuple[Path, Release | None]:
    """The checkpoint's file, downloaded if it is a released one that is not here; and which release it is.

    Raises:
        UserError: if it cannot be had, or nothing here could sample from it.
    """
    if config.ckpt is not None and config.ckpt.exists():
        return config.ckpt, find_release(config.ckpt.name)
    if config.ckpt is not None:
        release = find_release(str(config.ckpt))
        if release is None:
            close = close_names(str(config.ckpt), FAMILIES)
            if close:
                raise UserError(f"--ckpt {config.ckpt}: no such file; released, and close to it: {', '.join(close)}")
            return config.ckpt, None  # reading it will say that it is not there
    else:
        model = config.model or "DiT-XL/2"
        with blame(f"--model {model}"):
            family_of(model)
        release = release_of_model(model, config.image_size, FAMILIES)
    _check_family(release)
    path = distributed.by_main(lambda: obtain(release, config.pretrained_dir))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        obtain(release, config.pretrained_dir)  # on a node that does not see the first one's disk
    distributed.barrier()
    return path, release


def _check_family(release: Release) -> None:
    if release.family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(
            f"--ckpt {release.name}: is of the family {release.family}, which is not here yet; here: {known}"
        )


def find_facts(config: SamplingConfig, checkpoint: Checkpoint, release: Release | None, vae: str | None) -> Facts:
    """Model, process, autoencoder, image shape and preset, from flags and checkpoint.

    Raises:
        UserError: if they contradict each other, or the process is unknown.
    """
    if checkpoint.meta is not None:
        return _facts_of_ours(config, checkpoint.meta)
    if release is not None:
        _check_family(release)
        _agree(config, {"model": release.model, "image_size": release.image_size})
    if config.model is not None:
        with blame(f"--model {config.model}"):
            family_of(config.model)
    given, ckpt = (config.model, config.ckpt) if release is None else (release.model, release.name)
    model, told = settings_of(checkpoint, f"--ckpt {ckpt}", given)
    process = PUBLISHED_PROCESS[family_of(model).network.time_convention]
    preset = FOREIGN[process] if release is None else release.preset
    chosen = config.vae or vae or preset.vae
    fields = {**(release.config if release is not None else {}), **told}
    side, channels = fields.pop("input_size", None), fields.pop("in_channels", None)
    _check_channels(config, chosen, channels)
    size = config.image_size or (side * (1 if chosen == "none" else OFFICIAL_FACTOR) if side else 256)
    fields["num_classes"] = config.num_classes or fields.get("num_classes", 1000)
    shape = (channels or 3 if chosen == "none" else 3, size, size)
    return Facts(model, fields, (process, {}), chosen, shape, preset)


def _facts_of_ours(config: SamplingConfig, meta: Mapping[str, Any]) -> Facts:
    fields, process = dict(meta["model"]), dict(meta["process"])
    channels, height, width = meta["data"]["image_shape"]
    model, name = fields.pop("name"), process.pop("name")
    process.pop("learn_sigma", None)  # the network's output says it
    if name not in PROCESSES:
        raise UserError(f"--ckpt {config.ckpt}: trained under {name!r}, a process unknown here")
    _agree(config, {"model": model, "num_classes": fields["num_classes"], "image_size": width})
    vae = config.vae or meta["data"]["vae"]
    _check_channels(config, vae, fields.get("in_channels"))
    sampler, row = next((sampler, row) for sampler, row in SAMPLERS.items() if row.process == name)
    preset = OURS._replace(sampler=sampler, steps=row.steps)
    return Facts(model, fields, (name, process), vae, (channels, height, width), preset)


def _check_channels(config: SamplingConfig, vae: str, channels: int | None) -> None:
    """Refuses a released autoencoder for a network of other channels, before anything is downloaded for it."""
    if vae in OFFICIAL_VAES and channels not in (None, OFFICIAL_CHANNELS):
        source = f"--vae {vae}" if config.vae else f"--ckpt {config.ckpt}"
        raise UserError(
            f"{source}: the network's channels are {channels}, those of {OFFICIAL_VAES[vae]} {OFFICIAL_CHANNELS}; "
            "for a network on pixels give --vae none, else the folder of its autoencoder"
        )


def _agree(config: SamplingConfig, known: Mapping[str, Any]) -> None:
    """Refuses flags that say otherwise than the checkpoint."""
    for field, value in known.items():
        if getattr(config, field) not in (None, value):
            raise UserError(
                f"{flag_name(field)} {getattr(config, field)}: --ckpt {config.ckpt} was trained with {value}"
            )


def resolve(config: C, facts: Facts) -> C:
    """The settings with nothing left to the checkpoint.

    A preset's interval belongs to its scale: with another scale it is not taken over.

    Raises:
        UserError: if the sampler is not one of the checkpoint's process, or does not go with other flags.
    """
    preset = facts.preset
    sampler = config.sampler or preset.sampler
    row = SAMPLERS[sampler]
    if row.process != facts.process[0]:
        fitting = ", ".join(name for name, other in SAMPLERS.items() if other.process == facts.process[0])
        raise UserError(f"--sampler {sampler}: --ckpt was trained under {facts.process[0]!r}; choose from {fitting}")
    if config.heun_exact and config.cache_interval is not None:
        raise UserError(
            f"--cache-interval {config.cache_interval}: this needs one evaluation a step; leave out --heun-exact"
        )
    scale_of_preset = config.cfg_scale is None
    options = preset.options if sampler == preset.sampler else {}
    try:
        return dataclasses.replace(
            config,
            model=facts.model,
            image_size=facts.image_shape[-1],
            num_classes=facts.config["num_classes"],
            vae=facts.vae,
            sampler=sampler,
            num_sampling_steps=config.num_sampling_steps or (preset.steps if sampler == preset.sampler else row.steps),
            time_shift=options.get("shift") if config.time_shift is None else config.time_shift,
            last_step=options.get("last_step") if config.last_step is None else config.last_step,
            clip_denoised=facts.vae == "none" if config.clip_denoised is None else config.clip_denoised,
            cfg_scale=preset.cfg_scale if scale_of_preset else config.cfg_scale,
            guidance_channels=config.guidance_channels or preset.channels,
            guidance_interval=config.guidance_interval or (preset.interval if scale_of_preset else None),
        )
    except ValueError as error:  # flags that do not go with what the checkpoint decides
        raise UserError(str(error)) from error


def check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Refuses labels that the network has no row for.

    Raises:
        UserError: naming the first.
    """
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"--class-labels {label}: the model has classes 0 to {num_classes - 1}")
