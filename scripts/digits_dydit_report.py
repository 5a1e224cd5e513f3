"""Prints what digits_dydit.sh made of a DiT: ratios, executed work and quality, a row a target.

python scripts/digits_dydit_report.py --folder digits_dydit_out --targets 0.7 0.5
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import aligned
from data.digits import load_digits
from evaluator.digits import score_digits
from runtime.config import parse_config, setting
from runtime.errors import UserError, run

CLOSE = 0.02  # of a ratio to its target


@dataclass(frozen=True)
class DyDiTReportConfig:
    """Settings of digits_dydit_report.py."""

    folder: Path = setting(Path("digits_dydit_out"), "what digits_dydit.sh wrote: DiT/, and a folder a target")
    targets: tuple[float, ...] = setting((0.7, 0.5), "shares of the blocks' work that were trained for")
    check: bool = setting(False, "exit with status 1 if a ratio in training is off by more than 0.02")


class Result(NamedTuple):
    """One row.

    Attributes:
        name: of the model.
        target: share of the blocks' work that it was trained for; None for the DiT.
        trained: mean share over the last logged steps of training, with noise in the gates.
        sampled: share while sampling, without.
        work: multiply-adds of one image, all its steps.
        accuracy: share of the samples that the independent classifier recognises.
        frechet_distance: to the training split.
        recall: of the training split.
    """

    name: str
    target: float | None
    trained: float | None
    sampled: float
    work: float
    accuracy: float
    frechet_distance: float
    recall: float


def read_result(folder: Path, target: float | None) -> Result:
    """One model's samples, cost and training log.

    Raises:
        UserError: if something is not there.
    """
    place = folder / ("DiT" if target is None else str(target))
    try:
        cost: dict[str, Any] = json.loads((place / "cost.json").read_text())
        with np.load(place / "samples.npz", allow_pickle=False) as file:
            images, labels = file["arr_0"], file["arr_1"]
        logs = [] if target is None else [path.read_text() for path in place.glob("runs/*/metrics.jsonl")]
    except OSError as error:
        raise UserError(f"--folder {folder}: {error.filename or place} is missing; run digits_dydit.sh") from error
    lines = [json.loads(line) for log in logs for line in log.splitlines()]
    scores = score_digits(images, labels, train=load_digits("train"), test=load_digits("test"))
    assert scores.accuracy is not None  # they have labels
    trained = lines[-1]["flops_ratio"] if lines else None
    measured = (scores.accuracy, scores.frechet_distance, scores.recall)
    return Result(cost["model"], target, trained, cost["block_ratio"], cost["multiply_adds_per_image"], *measured)


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table, work beside the first row's."""
    titles = ["model", "target", "ratio in training", "ratio in sampling", "G multiply-adds an image", "of the DiT's"]
    titles += ["recognised", "Frechet distance", "recall"]
    rows = [
        [
            result.name,
            "" if result.target is None else f"{result.target}",
            "" if result.trained is None else f"{result.trained:.3f}",
            f"{result.sampled:.3f}",
            f"{result.work / 1e9:.3f}",
            f"{result.work / results[0].work:.3f}",
            f"{result.accuracy:.3f}",
            f"{result.frechet_distance:.2f}",
            f"{result.recall:.3f}",
        ]
        for result in results
    ]
    return aligned(titles, rows, left=1)


def main(argv: Sequence[str]) -> None:
    """Parses flags, reads, scores, prints."""
    config = parse_config(DyDiTReportConfig, argv, program="digits_dydit_report.py", description=__doc__.split("\n")[0])
    results = [read_result(config.folder, target) for target in (None, *config.targets)]
    print(table(results))
    missed = [r for r in results if r.target is not None and not abs((r.trained or 0) - r.target) <= CLOSE]
    for result in missed:
        print(f"ratio {result.trained} in training is not within {CLOSE} of {result.target}", file=sys.stderr)
    if config.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run(main, "digits_dydit_report.py"))
