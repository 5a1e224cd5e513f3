"""Samples of a job: how many, with which labels, noise and prompts, and which of them a shard makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.errors import error_prefix
from runtime.seeds import derive_seed
from runtime.settings import flag_name, setting
from runtime.shards import Shard
from sampling.config import check_labels, check_unlabelled
from sampling.prompts import Prompts

COUNTS = {"image": 50_000, "clip": 2_048}  # samples as FID-50K takes them, and Fréchet video distances


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Which images, and where they go."""

    sample_dir: Path = setting(
        Path("samples"), "folder of the .npz, under a name made of the settings", free=True, remote=True
    )
    output: Path | None = setting(
        None, "exact path of the .npz", shown="a name in --sample-dir", free=True, remote=True
    )
    overwrite: bool = setting(False, "replace existing files and unfinished jobs with other settings", free=True)
    num_fid_samples: int | None = setting(
        None,
        "number of images or clips; prompts are taken in turn",
        shown="50,000 or 2,048; one of each prompt, or the number that --class-seeds makes",
    )
    per_proc_batch_size: int | None = setting(
        32, "images a process computes at a time, which decides their last bits; auto: by the network's cost alone"
    )
    global_seed: int = setting(0, "seed of noise and labels")
    balanced_labels: bool = setting(False, "every class equally often, instead of random labels")
    class_labels: tuple[int, ...] | None = setting(None, "sample these classes only", shown="all")
    class_seeds: tuple[int, ...] | None = setting(
        None, "one image of each class for each of these numbers, which give the noise; instead of --num-fid-samples"
    )
    shard: str | None = setting(
        None,
        "make this part only, such as 1/3; scripts/merge.py puts parts together",
        shown="all",
        free=True,
    )
    save_png: bool = setting(
        False, "write the images as PNG too, in a folder of the .npz's name; of a clip its frames side by side"
    )

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("num_fid_samples", "per_proc_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag_name(name)} {value}: must be at least 1")
        if self.output is not None and self.output.suffix != ".npz":
            raise ValueError(f"--output {self.output}: must end in .npz")
        if self.shard is not None:
            Shard.parse(self.shard)
        if self.class_seeds is not None:
            if not all(0 <= number < 2**32 for number in self.class_seeds):
                raise ValueError(f"--class-seeds {' '.join(map(str, self.class_seeds))}: must lie in [0, 2^32)")
            self.check_number(len(self.class_labels or ()))
            if self.balanced_labels:
                raise ValueError("--balanced-labels: has no effect with --class-seeds")

    def check_number(self, classes: int) -> None:
        """Check that a number of images is the one that the seeds make; 0 classes: of a number that is not known yet.

        Raises:
            ValueError: If it is not.
        """
        images, seeds = self.num_fid_samples, len(self.class_seeds or ())
        if images is not None and seeds and (images != seeds * classes if classes else images % seeds):
            raise ValueError(
                f"--num-fid-samples {images}: --class-seeds makes one image of each class for each number; "
                "leave one out"
            )


class Plan(NamedTuple):
    """The samples of a job, the same on every process.

    Attributes:
        labels: (N,) int64; None for a network that takes none.
        noise: N numbers; samples with the same one have the same noise.
        prompts: Prompts that the samples take in turn; None for a network that takes no text.
    """

    labels: Tensor | None
    noise: Sequence[int]
    prompts: Prompts | None = None

    def conditioning(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Conditional and unconditional rows of these samples; None for those of the network itself."""
        if self.prompts is not None:
            return self.prompts.conditioning(rows)
        return {} if self.labels is None else {"y": self.labels[rows]}, None


def plan_job(
    config: JobSettings, num_classes: int, count: int = COUNTS["image"], prompts: Prompts | None = None
) -> Plan:
    """Choose labels and noise of all samples.

    Args:
        config: The settings.
        num_classes: Classes of the model; 0 for one without labels.
        count: Number of samples where the settings name none; with prompts it is theirs.
        prompts: Prompts of a network that takes text.

    Raises:
        UserError: For a class that the model does not have, or a number of samples that is not the seeds'.
    """
    every = range(config.num_fid_samples or (count if prompts is None else prompts.size))
    if num_classes == 0:
        chosen = {
            "--class-labels": config.class_labels,
            "--class-seeds": config.class_seeds,
            "--balanced-labels": config.balanced_labels or None,
        }
        check_unlabelled(chosen)
        return Plan(None, every, prompts)
    check_labels(config.class_labels or (), num_classes)
    classes = torch.tensor(config.class_labels or range(num_classes))
    if config.class_seeds is not None:
        with error_prefix(""):
            config.check_number(len(classes))
        return Plan(classes.repeat_interleave(len(config.class_seeds)), list(config.class_seeds) * len(classes))
    if config.balanced_labels:
        return Plan(classes[torch.tensor(every) % len(classes)], every)
    generator = torch.Generator().manual_seed(derive_seed("labels", config.global_seed))
    return Plan(classes[torch.randint(len(classes), (len(every),), generator=generator)], every)


def rows_of_shard(shard: Shard | None, total: int, size: int) -> range:
    """Numbers of a shard's samples: whole chunks of `size`.

    Raises:
        UserError: If there are more shards than chunks.
    """
    if shard is None:
        return range(total)
    chunks = shard.range(-(-total // size), f"chunks of {size:,} (--per-proc-batch-size)")
    return range(chunks.start * size, min(chunks.stop * size, total))
