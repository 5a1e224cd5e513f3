"""Settings of sampling: flags by group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch

from diffusion import PROCESSES, SAMPLERS
from diffusion.guidance import Guidance, ScaleSchedule
from models import FAMILIES, family_name
from models.acceleration import can_compile
from models.frame_positions import FramePositions
from runtime import migrate
from runtime.command_line import parse
from runtime.devices import DeviceName, check_mps
from runtime.distributed import PRECISIONS
from runtime.errors import UserError
from runtime.given import Given
from runtime.releases import ALIASES
from runtime.settings import Kind, flag_name, setting, typed_flag
from sampling.prompts import TextSettings


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Which weights."""

    ckpt: Path | None = setting(
        None,
        "checkpoint: a file, a folder, the name of a released one, or owner/name[@revision] on the hub",
        free=True,
        remote=True,
    )
    weights: str = setting("ema", "weights of a training checkpoint: ema, model, or one of several averages by name")
    image_size: int | None = setting(None, "side of the images in pixels", shown="the weights'; 256 without --ckpt")
    num_classes: int | None = setting(None, "number of classes", shown="the weights'")
    num_frames: int | None = setting(None, "frames of a clip", shown="the weights'")
    frame_positions: FramePositions | None = setting(
        None,
        "for weights of another number of frames: interpolate, in the same time, or extend, at the same interval",
        shown="an error",
    )
    process: str | None = setting(
        None,
        "noise process",
        tuple(PROCESSES),
        shown="the checkpoint's; of other code's files a guess, printed",
    )
    network_times: Literal["index", "unit"] | None = setting(
        None, "times of such a network: index, 0 clean to 999 noise, or unit, 0 noise to 1 data", shown="a guess"
    )
    pretrained_dir: Path = setting(Path("pretrained_models"), "folder of downloaded releases", free=True)

    def __post_init__(self) -> None:
        """Validate the fields."""
        _at_least_1(self, "image_size", "num_frames")
        if self.num_classes is not None and self.num_classes < 0:
            raise ValueError(f"--num-classes {self.num_classes}: must be at least 1, or 0 for an unconditional network")
        if self.frame_positions is not None and self.num_frames is None:
            raise ValueError(f"--frame-positions {self.frame_positions}: has no effect without --num-frames")


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """From latents to images."""

    vae: str | None = setting(
        None, "autoencoder: ema, mse, a local folder, or none for pixels", shown="the checkpoint's"
    )
    vae_precision: Literal["fp32", "bf16"] = setting(
        "fp32", "of the autoencoder; bf16 decodes about three times as fast, and rounds latents"
    )
    vae_batch_size: int = setting(16, "images decoded at a time")

    def __post_init__(self) -> None:
        """Validate the fields."""
        _at_least_1(self, "vae_batch_size")


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """Guidance by a second prediction.

    Attributes:
        default_scale: Scale where no flag gives one; None for the checkpoint's.
    """

    default_scale: ClassVar[float | None] = None

    guidance: Guidance = setting(
        "cfg",
        "second prediction: of the unconditional rows; of a weaker network; or of the unconditional rows at their best "
        "multiple, with no velocity in the first 4 percent of the evaluations (flows)",
    )
    guide_ckpt: Path | None = setting(
        None, "weaker network of autoguidance: an earlier checkpoint, or one of a smaller size", remote=True
    )
    guidance_schedule: ScaleSchedule = setting(
        "constant", "scale over time; the others rise from 1 at the noise, with the same mean"
    )

    cfg_scale: float | None = setting(
        None, "guidance scale; 1: no guidance", shown="1.5, or a release's own; 1 without labels"
    )
    guidance_channels: int | None = setting(
        None, "guide this many leading channels", shown="3 for official Gaussian files, else all"
    )
    guidance_interval: tuple[float, float] | None = setting(
        None,
        "guide only strictly between these timesteps (0 clean, 1000 noise; -1 1001 is everywhere)",
        shown="everywhere, or a release's own",
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        _at_least_1(self, "guidance_channels")
        if self.cfg_scale is not None and not 1 <= self.cfg_scale <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"--cfg-scale {self.cfg_scale}: must be at least 1 (1 is no guidance), and finite in float32"
            )
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not -math.inf < low < high < math.inf:
                raise ValueError(f"--guidance-interval {low} {high}: must be two timesteps, LOW < HIGH")
            if low >= 1000 or high <= 0:
                raise ValueError(f"--guidance-interval {low} {high}: holds no timestep of 0 (clean) to 1000 (noise)")
            if self.cfg_scale == 1:
                raise ValueError(f"--guidance-interval {low} {high}: has no effect with --cfg-scale 1")
        if self.cfg_scale == 1 and (flags := self.without_effect):
            raise ValueError(f"{flags}: has no effect with --cfg-scale 1")
        if (self.guide_ckpt is None) != (self.guidance != "autoguidance"):
            needs = "has no effect without --guidance autoguidance"
            raise ValueError(
                f"--guide-ckpt {self.guide_ckpt}: {needs}"
                if self.guide_ckpt
                else "--guidance autoguidance: needs a weaker network, --guide-ckpt"
            )

    @property
    def without_effect(self) -> str:
        """Flags that say how to guide, if any differs from its default."""
        chosen = {"--guidance": self.guidance, "--guidance-schedule": self.guidance_schedule}
        return " ".join(f"{flag} {value}" for flag, value in chosen.items() if value not in ("cfg", "constant"))


@dataclass(frozen=True, kw_only=True)
class CachingSettings:
    """State that evaluations reuse."""

    cache_interval: int | None = setting(None, "Skip-Cache: compute kept state every N evaluations, and at the end")
    cache_bounds: tuple[float, float] | None = setting(
        None,
        "timesteps between which the interval holds: from HIGH on and below LOW every evaluation computes it",
        shown="those that the family was published with",
    )
    sharing_interval: int | None = setting(
        None, "encoder sharing: compute kept state once in R evaluations", was={"--refresh-rate": None}
    )
    sharing: Literal["uniform", "cheapest"] = setting(
        "uniform", "compute it every R-th time, or at the cheapest ones by similarity, measured once"
    )
    sharing_dir: Path = setting(Path("sharing"), "folder of measured similarities, with their settings", free=True)
    cache_forecast: int | None = setting(
        None, "extrapolate kept state in time by a polynomial of this order", shown="plain reuse of the last state"
    )
    forecast: str | None = setting(
        None, "N,O: call the network every N steps, and forecast its output between them by a polynomial of order O"
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        _at_least_1(self, "cache_interval", "sharing_interval")
        reuses = self.cache_interval is not None or self.sharing_interval is not None
        if self.cache_bounds is not None:
            high, low = self.cache_bounds
            if self.cache_interval is None:
                raise ValueError(f"--cache-bounds {high:g} {low:g}: has no effect without --cache-interval")
            if not 0 <= low <= high <= 1000:
                raise ValueError(f"--cache-bounds {high:g} {low:g}: must be timesteps, 1000 >= HIGH >= LOW >= 0")
        if self.cache_forecast is not None and (self.cache_forecast < 0 or not reuses):
            needs = "must be at least 0" if reuses else "has no effect without --cache-interval or --sharing-interval"
            raise ValueError(f"--cache-forecast {self.cache_forecast}: {needs}")
        if self.forecast is not None and reuses:
            raise ValueError(f"--forecast {self.forecast}: does not go with --cache-interval or --sharing-interval")
        _ = self.forecast_numbers  # checked before work starts
        if self.cache_interval is not None and self.sharing_interval is not None:
            raise ValueError(f"--sharing-interval {self.sharing_interval}: has no effect with --cache-interval")
        if self.sharing != "uniform" and self.sharing_interval is None:
            raise ValueError(f"--sharing {self.sharing}: has no effect without --sharing-interval")

    @property
    def forecast_numbers(self) -> tuple[int, int] | None:
        """Interval N and order O of `forecast`; a ValueError for any other text."""
        if self.forecast is None:
            return None
        interval, _, order = self.forecast.partition(",")
        if not (interval.isdecimal() and order.isdecimal() and int(interval) > 1):
            raise ValueError(
                f"--forecast {self.forecast}: must be N,O: an interval of at least 2, and an order, such as 3,2"
            )
        return int(interval), int(order)


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """Where and how an evaluation is computed."""

    precision: str = setting("tf32", "of matrix products: fp32, tf32 (CUDA; as official), bf16 autocast", PRECISIONS)
    tf32: bool = setting(True, "TF32 for what is in float32, with --precision tf32 or bf16 (CUDA)")
    compile: bool = setting(False, "compile every block (on a CPU this needs a C++ compiler)")
    cuda_graphs: bool = setting(False, "record evaluations as CUDA graphs: faster small batches, slower first one")
    device: DeviceName | None = setting(None, "where to compute", shown="cuda if there is one", free=True)

    def __post_init__(self) -> None:
        """Validate the fields."""
        check_mps(
            self.device,
            {
                "--precision bf16": self.precision == "bf16",
                "--compile": self.compile,
                "--cuda-graphs": self.cuda_graphs,
            },
        )
        on_gpu = self.device not in ("cpu", "mps") and torch.cuda.is_available()
        if self.cuda_graphs and not on_gpu:
            raise ValueError("--cuda-graphs: needs a CUDA device")
        if self.compile and not can_compile("cuda" if on_gpu else "cpu"):
            raise ValueError("--compile: on a CPU it needs a C++ compiler (g++ or clang++), and none is found")

    @property
    def allows_tf32(self) -> bool:
        """True if products in float32 may be rounded to TF32."""
        return self.tf32 and self.precision != "fp32"


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Settings shared by sample.py and sample_ddp.py; the sampler and the model's family have their own."""

    model: str | None = setting(
        None, "name in the registry; without --ckpt: its released checkpoint", shown="recognised by the weights"
    )
    sampler: str | None = setting(None, "sampler", tuple(SAMPLERS), shown="the process's first, or a release's own")
    num_sampling_steps: str | None = setting(
        None, "number of steps, or step spec such as 10,15,20 or ddim50", shown="the sampler's, or a release's own"
    )
    solver_table: str | None = setting(
        None, "sample by a table of search_solver.py, or a published one: DiT-XL/2, SiT-XL/2", shown="none"
    )
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    text: TextSettings = field(default_factory=TextSettings)
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    caching: CachingSettings = field(default_factory=CachingSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    def __post_init__(self) -> None:
        """Validate what concerns several groups."""
        if self.solver_table is not None and self.sampler is not None:
            raise ValueError(f"--solver-table {self.solver_table}: takes the place of --sampler {self.sampler}")
        if self.checkpoint.ckpt is None and self.model is None and self.checkpoint.image_size is None:
            raise ValueError(
                "--ckpt: required; give a checkpoint of train.py, an official file, or a released one by its name; "
                "or --model for a model's released checkpoint"
            )
        check_mps(self.compute.device, {"--vae-precision bf16": self.encoder.vae_precision == "bf16"})


KINDS = (
    Kind("model", {name: family.config for name, family in FAMILIES.items()}, family_name, sampling=True),
    Kind("sampler", {name: row.settings for name, row in SAMPLERS.items()}),
)

C = TypeVar("C", bound=SamplingSettings)


def parse_settings(cls: type[C], argv: Sequence[str], program: str, doc: str | None) -> Given[C]:
    """Read the settings of a script that samples.

    Raises:
        UserError: For anything wrong with flags, file or values.
    """
    upgrade = partial(migrate.run_config, cls=cls, kinds=KINDS, program=program)
    given = parse(cls, argv, program=program, doc=doc, kinds=KINDS, aliases=ALIASES, migrate=upgrade)
    caching = given.general.caching
    if caching.cache_interval is None and caching.sharing_interval is None:
        for depth in {given.fields("model", family).get("cache_depth") for family in FAMILIES} - {None}:
            raise UserError(f"--cache-depth {depth}: has no effect without --cache-interval or --sharing-interval")
    return given


def check_labels(labels: Sequence[int], num_classes: int, flag: str = "--class-labels") -> None:
    """Check that the network has a row for each label.

    Raises:
        UserError: Naming the first that it has not.
    """
    for label in labels:
        if not 0 <= label < num_classes:
            raise UserError(f"{flag} {label}: the model has classes 0 to {num_classes - 1}")


def check_unlabelled(chosen: Mapping[str, object]) -> None:
    """Check that nothing was chosen, by flag, that only networks with labels take.

    Raises:
        UserError: Naming the first flag with a value that is not None.
    """
    for flag, value in chosen.items():
        if value is not None:
            raise UserError(f"{typed_flag(flag, value)}: has no effect: the network of --ckpt takes no labels")


def _at_least_1(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag_name(name)} {value}: must be at least 1")
