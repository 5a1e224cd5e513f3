"""Score what finetune_demo.sh sampled: how many of the new and of the old digits are recognised, by method.

    python scripts/finetune_report.py --output-dir finetune_out

Each method has a folder of runs and an .npz of samples of its name in the folder; what is missing is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.report import aligned
from data.digits import load_digits
from evaluator.metrics import frechet_distance_from_features
from evaluator.small import SmallScorer
from evaluator.small.network import compute_features
from runtime.command_line import parse_config
from runtime.errors import UserError, run
from runtime.files import atomic_path, check_writable
from runtime.groups import read_groups
from runtime.settings import setting

METHODS = {"base": "before", "full": "all weights", "labels": "label table", "lora": "LoRA"}
OLD, NEW = range(7), range(7, 10)


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Settings of finetune_report.py."""

    output_dir: Path = setting(Path("finetune_out"), "folder of finetune_demo.sh")


class Part(NamedTuple):
    """Scores of the samples of some classes.

    Attributes:
        accuracy: Share that an independent classifier takes for the requested class.
        distance: Frechet distance to the training images of these classes.
    """

    accuracy: float
    distance: float


def score_part(
    scorer: SmallScorer, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], classes: range
) -> Part | None:
    """Score the images of some classes; None without any."""
    chosen, real = np.isin(labels, classes), np.isin(scorer.train[1], classes)
    if chosen.sum() < 2:
        return None
    distance = frechet_distance_from_features(scorer.train_features[real], compute_features(images[chosen])[0])
    return Part(scorer.accuracy(images[chosen], labels[chosen]), distance)


def count_trained(folder: Path) -> int:
    """Number of weights that the newest run in a folder trained, by the state of its optimizer.

    Raises:
        UserError: If there is no checkpoint.
    """
    paths = sorted(folder.glob("*/checkpoints/*.safetensors"))
    if not paths:
        raise UserError(f"--output-dir {folder.parent}: no checkpoint in {folder}; run finetune_demo.sh again")
    groups, _ = read_groups(paths[-1], lambda present: ["optimizer"], "--output-dir")
    return sum(tensor.numel() for name, tensor in groups["optimizer"].items() if name.endswith("/exp_avg"))


def make_rows(folder: Path) -> list[list[str]]:
    """Rows of the table, one a method with samples, and one of real test images.

    Raises:
        UserError: If there are none.
    """
    scorer, rows = SmallScorer(load_digits("train"), load_digits("test")), list[list[str]]()
    for name, title in METHODS.items():
        path = folder / f"{name}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as file:
                images, labels = file["arr_0"], file["arr_1"]
            parts = (score_part(scorer, images, labels, classes) for classes in (NEW, OLD))
            rows.append([title, f"{count_trained(folder / name):,}", *shown(parts)])
    if not rows:
        raise UserError(f"--output-dir {folder}: holds no samples; run scripts/finetune_demo.sh")
    real = (score_part(scorer, *scorer.test, classes) for classes in (NEW, OLD))
    return [*rows, ["real test images", "", *shown(real)]]


def shown(parts: Iterable[Part | None]) -> list[str]:
    """Cells of the table: accuracy and distance of each part."""
    return [
        cell
        for part in parts
        for cell in (("", "") if part is None else (f"{part.accuracy:.3f}", f"{part.distance:.1f}"))
    ]


def main(argv: Sequence[str]) -> None:
    """Parse the flags, score, print and write the table."""
    folder = parse_config(ReportSettings, argv, program="finetune_report.py", doc=__doc__).output_dir
    check_writable(folder / "finetune.md", "--output-dir")
    heads = ["trained", "weights", "7 to 9 recognised", "distance", "0 to 6 recognised", "distance"]
    table = aligned(heads, make_rows(folder))
    with atomic_path(folder / "finetune.md") as temporary:
        temporary.write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    sys.exit(run(main, "finetune_report.py"))
