"""Time the evaluator's stages on a CPU, with each one's peak of memory, and extrapolate to 50,000 images.

    python scripts/benchmark_evaluator.py                   # about ten minutes
    python scripts/benchmark_evaluator.py --threads 2 --num-images 256

Every stage runs in a separate process; memory is that process's largest resident size, PyTorch and the preparation
included. Times are wall times of single runs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import evaluation
from benchmarks.evaluation import EvaluatorSizes, Stage
from benchmarks.report import aligned, document, headline, machine_info, write_json
from benchmarks.timing import OutputSettings, check_at_least
from evaluator.settings import BATCH_SIZE
from runtime.command_line import parse_config
from runtime.errors import run
from runtime.settings import setting

FULL_RANK_ROWS = 5000
SECONDS_PER_IMAGE = 0.115  # on one core
SECONDS_FULL_RANK, SECONDS_SINGULAR = 2.0, 5.0
MEMORY = 3e9


@dataclass(frozen=True, kw_only=True)
class EvaluatorBenchmarkSettings(OutputSettings):
    """Settings of benchmark_evaluator.py."""

    num_images: int = setting(1000, "images that the network evaluates", was={"--images": None})
    smoke: bool = setting(False, "everything tiny: shows that the benchmark works, measures nothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, BATCH_SIZE["cpu"], "num_images")

    @property
    def sizes(self) -> EvaluatorSizes:
        """Sizes of all stages."""
        published = dataclasses.replace(evaluation.PUBLISHED, images=self.num_images, batch=BATCH_SIZE["cpu"])
        return evaluation.TINY if self.smoke else published


def stages(sizes: EvaluatorSizes, threads: int) -> list[tuple[Callable[[EvaluatorSizes], Stage], float | None]]:
    """The work of all stages, and the goal of each in seconds."""
    many = max(FULL_RANK_ROWS * sizes.pool // evaluation.PUBLISHED.pool, sizes.pool + 2)
    singular = "Frechet distance, singular covariances"
    return [
        (evaluation.reading, None),
        (evaluation.digest, None),
        (evaluation.features, SECONDS_PER_IMAGE * sizes.images / threads),
        (evaluation.statistics, None),
        (partial(evaluation.distance, rows=many, name="Frechet distance, full rank"), SECONDS_FULL_RANK),
        (partial(evaluation.general_square_root, rows=many), None),
        (partial(evaluation.distance, rows=sizes.few, name=singular), SECONDS_SINGULAR),
        (evaluation.distance_from_features, SECONDS_SINGULAR),
        (partial(evaluation.manifolds, precision="adm"), None),
        (partial(evaluation.manifolds, precision="float32"), None),
        (evaluation.dry_run, None),
    ]


def measure(sizes: EvaluatorSizes, threads: int) -> list[Stage]:
    """Run all stages, one after the other."""
    measured = []
    for work, goal in stages(sizes, threads):
        stage = dataclasses.replace(evaluation.run_alone(work, threads, sizes), seconds_goal=goal)
        measured.append(stage)
        print(f"{stage.name}: {stage.seconds:.2f} s", file=sys.stderr, flush=True)
    return measured


def extrapolate(measured: Sequence[Stage], sizes: EvaluatorSizes) -> float:
    """Seconds of a whole evaluation: the network's time per image, times all images, and the measured rest."""
    by_name = {stage.name.split(",")[0]: stage for stage in measured}
    network, rest = by_name["features"], by_name["everything but the network"]
    return network.seconds / network.images * (sizes.reference + sizes.samples) + rest.seconds


def table(measured: Sequence[Stage]) -> str:
    """The stages as a Markdown table."""
    rows = []
    for stage in measured:
        goal = stage.seconds_goal
        per_image = f"{stage.seconds / stage.images * 1e3:,.2f}" if stage.images else ""
        shown = "" if goal is None else f"<= {goal:,.1f} {'met' if stage.seconds <= goal else 'MISSED'}"
        rows.append([stage.name, f"{stage.seconds:,.2f}", shown, per_image, f"{stage.memory / 1e9:.2f}"])
    return aligned(["stage", "s", "goal", "ms per image", "peak GB"], rows)


def main(argv: Sequence[str]) -> None:
    """Parse flags, measure, print the table, write the JSON."""
    config = parse_config(EvaluatorBenchmarkSettings, argv, program="benchmark_evaluator.py", doc=__doc__)
    config.start()
    sizes = config.sizes
    measured = measure(sizes, config.threads)
    seconds, memory = extrapolate(measured, sizes), max(stage.memory for stage in measured)
    machine = machine_info(torch.device("cpu"), "wall time")
    result = document(config, machine, measured, extrapolated_seconds=seconds, peak_memory=memory)
    result["settings"]["sizes"] = dataclasses.asdict(sizes)
    print(f"{headline(result)}\n\n{table(measured)}\n")
    print(f"{sizes.samples:,} samples against {sizes.reference:,}: {seconds / 60:,.1f} minutes, extrapolated")
    print(f"Largest peak of memory: {memory / 1e9:.2f} GB (goal: below {MEMORY / 1e9:.0f} GB)")
    write_json(result, config.output)


if __name__ == "__main__":
    sys.exit(run(main, "benchmark_evaluator.py"))
