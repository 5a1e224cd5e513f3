"""Times the evaluator's stages on a CPU, with each one's peak of memory, and extrapolates to 50,000 images.

    python scripts/benchmark_evaluator.py                   # about ten minutes
    python scripts/benchmark_evaluator.py --threads 2 --images 256

Every stage runs in a process of its own; memory is that process's largest resident size, PyTorch and the preparation
included. Times are wall times of single runs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from runtime.config import flag_name, parse_config, setting, to_dict

from benchmarks.evaluation import (
    PUBLISHED,
    TINY,
    EvaluatorSizes,
    Stage,
    digest,
    distance,
    distance_from_features,
    features,
    general_square_root,
    manifolds,
    reading,
    rehearsal,
    run_alone,
    statistics,
)
from benchmarks.report import headline, machine_info, write_report
from evaluator.settings import BATCH_SIZE
from runtime.errors import run
from runtime.files import check_writable

FULL_RANK_ROWS = 5000
SECONDS_PER_IMAGE = 0.115  # on one core
SECONDS_FULL_RANK, SECONDS_SINGULAR = 2.0, 5.0
MEMORY = 3e9


@dataclass(frozen=True)
class BenchmarkEvaluatorConfig:
    """Settings of benchmark_evaluator.py."""

    images: int = setting(1000, "images that the network sees")
    threads: int = setting(1, "CPU threads")
    smoke: bool = setting(False, "everything tiny: shows that the benchmark works, measures nothing")
    output: Path | None = setting(None, "JSON file for the results")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        for name, least in (("threads", 1), ("images", BATCH_SIZE["cpu"])):
            if getattr(self, name) < least:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least {least}")

    @property
    def sizes(self) -> EvaluatorSizes:
        """What is run."""
        return TINY if self.smoke else dataclasses.replace(PUBLISHED, images=self.images, batch=BATCH_SIZE["cpu"])


class Wanted(NamedTuple):
    """A stage to be run: the work, what it is told beside the sizes, and its goal."""

    work: Callable[..., Stage]
    arguments: tuple[Any, ...] = ()
    seconds_goal: float | None = None


class Measured(NamedTuple):
    """A stage that ran, and its goal; None where nobody set one."""

    stage: Stage
    seconds_goal: float | None


def stages(sizes: EvaluatorSizes, threads: int) -> list[Wanted]:
    """What is measured."""
    many = max(FULL_RANK_ROWS * sizes.pool // PUBLISHED.pool, sizes.pool + 2)
    return [
        Wanted(reading),
        Wanted(digest),
        Wanted(features, (), SECONDS_PER_IMAGE * sizes.images / threads),
        Wanted(statistics),
        Wanted(distance, (many, "Frechet distance, full rank"), SECONDS_FULL_RANK),
        Wanted(general_square_root, (many,)),
        Wanted(distance, (sizes.few, "Frechet distance, singular covariances"), SECONDS_SINGULAR),
        Wanted(distance_from_features, (), SECONDS_SINGULAR),
        Wanted(manifolds, ("adm",)),
        Wanted(manifolds, ("float32",)),
        Wanted(rehearsal),
    ]


def measure(sizes: EvaluatorSizes, threads: int) -> list[Measured]:
    """Runs all stages, one after the other."""
    measured = []
    for work, arguments, goal in stages(sizes, threads):
        stage = run_alone(work, threads, sizes, *arguments)
        measured.append(Measured(stage, goal))
        print(f"{stage.name}: {stage.seconds:.2f} s", file=sys.stderr, flush=True)
    return measured


def extrapolate(measured: Sequence[Measured], sizes: EvaluatorSizes) -> float:
    """Seconds of a whole evaluation: the network's time per image, times all images, and the measured rest."""
    by_name = {each.stage.name.split(",")[0]: each.stage for each in measured}
    network, rest = by_name["features"], by_name["everything but the network"]
    return network.seconds / network.images * (sizes.reference + sizes.samples) + rest.seconds


def table(measured: Sequence[Measured]) -> str:
    """The stages as a Markdown table."""
    lines = ["| stage | s | goal | ms per image | peak GB |", "|---|---:|---:|---:|---:|"]
    for stage, goal in measured:
        per_image = f"{stage.seconds / stage.images * 1e3:,.2f}" if stage.images else ""
        wanted = "" if goal is None else f"<= {goal:,.1f} {'met' if stage.seconds <= goal else 'MISSED'}"
        lines.append(f"| {stage.name} | {stage.seconds:,.2f} | {wanted} | {per_image} | {stage.memory / 1e9:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Parses flags, measures, prints the table, writes the JSON."""
    description = __doc__.split("\n")[0]
    config = parse_config(BenchmarkEvaluatorConfig, argv, program="benchmark_evaluator.py", description=description)
    if config.output is not None:
        check_writable(config.output, "--output")
    torch.set_num_threads(config.threads)
    sizes = config.sizes
    measured = measure(sizes, config.threads)
    seconds, memory = extrapolate(measured, sizes), max(each.stage.memory for each in measured)
    document = {
        "format": 1,
        "settings": {**to_dict(config), "output": None, "sizes": dataclasses.asdict(sizes)},
        "machine": machine_info(torch.device("cpu"), "wall time"),
        "peak_flop_per_second": {},
        "rows": [{**dataclasses.asdict(stage), "seconds_goal": goal} for stage, goal in measured],
        "extrapolated_seconds": seconds,
        "peak_memory": memory,
    }
    print(f"{headline(document).splitlines()[0]}\n\n{table(measured)}\n")
    print(f"{sizes.samples:,} samples against {sizes.reference:,}: {seconds / 60:,.1f} minutes, extrapolated")
    print(f"Largest peak of memory: {memory / 1e9:.2f} GB (goal: below {MEMORY / 1e9:.0f} GB)")
    if config.output is not None:
        write_report(document, config.output)


if __name__ == "__main__":
    sys.exit(run(main, "benchmark_evaluator.py"))
