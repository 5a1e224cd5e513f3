"""Scores generated images against real ones: Inception Score, FID, sFID, precision and recall, as ADM defines them.

    python evaluator/evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz
    torchrun --nproc-per-node 8 evaluator/evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz

Standard output is ADM's lines; a JSON beside the samples states everything a reader needs to compare the numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from runtime.config import parse_config

from evaluator.evaluation import evaluate
from evaluator.settings import EvaluatorConfig
from runtime import distributed
from runtime.errors import run


def main(argv: Sequence[str]) -> None:
    """Parses flags and evaluates."""
    config = parse_config(EvaluatorConfig, argv, program="evaluator", description=__doc__.split("\n")[0])
    with distributed.world(config.device) as world:
        evaluate(config, world)


if __name__ == "__main__":
    sys.exit(run(main, "evaluator"))
