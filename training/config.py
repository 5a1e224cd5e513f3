"""Settings of a training run: the flags of train.py by group, and the owners of all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from data import COLUMNS, EMBEDDED, ClipSettings
from data.columns import ColumnSettings
from data.encoders import FP32
from diffusion import PROCESSES
from models import FAMILIES, family_name, family_of
from runtime import migrate
from runtime.command_line import parse
from runtime.devices import check_mps
from runtime.given import Given
from runtime.launch import world_size
from runtime.releases import ALIASES
from runtime.settings import Kind, Values, flag_name, setting
from training.lora_settings import LoraSettings
from training.losses import LOSSES, loss_of
from training.optimization import OPTIMIZERS
from training.settings import (
    AlignmentSettings,
    ComputeSettings,
    DataSettings,
    OptimizationSettings,
    RunSettings,
    ValidationSettings,
)
from training.tracking import TrackingSettings

PROGRAM = "train.py"


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of a training run; the model's family, the process, the loss and the optimizer have their own."""

    model: str = setting("DiT-XL/2", "name in the registry (models.list_models())")
    process: str | None = setting(None, "noise process", shown="the one that the model's family is published with")
    optimizer: str = setting("adamw", "optimizer")
    data: DataSettings = field(default_factory=DataSettings)
    clips: ClipSettings = field(default_factory=ClipSettings)
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    run: RunSettings = field(default_factory=RunSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)

    def __post_init__(self) -> None:
        """Validate what concerns several groups."""
        data, validation = self.data, self.validation
        digits = data.dataset in EMBEDDED
        for own in fields(self.clips):
            value = getattr(self.clips, own.name)
            if value != own.default and data.dataset != "videofolder":
                raise ValueError(f"{flag_name(own.name)} {value}: has no effect without --dataset videofolder")
        self.columns.check_used(data.dataset in COLUMNS, f"--dataset {' or '.join(COLUMNS)}")
        self.lora.check(self.optimization.train_only == "lora")
        check_mps(self.compute.device, {"--vae-precision bf16": data.vae_precision != FP32})
        parallel = self.compute.parallel
        if parallel != "ddp" and world_size() == 1 and not self.run.dry_run:
            raise ValueError(
                f"--parallel {parallel}: there is one process, and nothing to divide; start several with torchrun, or "
                "leave it out"
            )
        only = self.optimization.train_only
        if parallel != "ddp" and only in ("labels", "lora"):
            raise ValueError(
                f"--parallel {parallel}: does not go with --train-only {only}, which masks rows of a whole table; "
                "leave it out: there is little optimizer state to divide"
            )
        if self.run.trust_stamps and data.dataset != "latents":
            raise ValueError("--trust-stamps: has no effect without --dataset latents")
        if validation.eval_reference is not None and (digits or data.channels == 1):
            raise ValueError(f"--eval-reference {validation.eval_reference}: is for RGB images")
        if validation.eval_data_path is not None and digits:
            raise ValueError(f"--eval-data-path {validation.eval_data_path}: the digits have a test split of their own")
        scored = data.dataset in ("digits", "moving-digits")
        if validation.eval_every is not None and scored and 0 < validation.eval_samples < 4:
            raise ValueError(f"--eval-samples {validation.eval_samples}: the scores need at least 4 (0: no image)")


def named_settings(model: str) -> Mapping[str, object]:
    """Settings that a model's name stands for."""
    return family_of(model).configs[model]


KINDS = (
    Kind("model", {name: family.config for name, family in FAMILIES.items()}, family_name, named=named_settings),
    Kind("process", PROCESSES, follows=("model", lambda family: FAMILIES[family].process)),
    Kind("loss", {name: row.settings for name, row in LOSSES.items()}, follows=("model", loss_of)),
    Kind("optimizer", OPTIMIZERS),
)


def parse_settings(argv: Sequence[str], doc: str | None = None) -> Given[TrainSettings]:
    """Read the flags of train.py.

    Args:
        argv: Arguments after the program's name.
        doc: Docstring of the program, for `--help`.

    Raises:
        UserError: For anything wrong with them.
    """
    return parse(TrainSettings, argv, program=PROGRAM, doc=doc, kinds=KINDS, aliases=ALIASES, migrate=upgrade)


def upgrade(values: Values) -> Values:
    """Migrate the settings of a run that an earlier version wrote."""
    return migrate.run_config(values, TrainSettings, KINDS, PROGRAM)
