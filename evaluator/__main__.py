"""Score generated images against real ones: Inception Score, FID, sFID, precision and recall, as ADM defines them.

    python evaluator/evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz
    torchrun --nproc-per-node 8 evaluator/evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz

Standard output is ADM's lines. samples.scores.json holds everything that is needed to compare the numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import runtime  # noqa: F401  # first: it reports other packages named models
from evaluator.evaluation import evaluate
from evaluator.settings import EvaluatorConfig
from runtime import distributed
from runtime.command_line import parse_config
from runtime.errors import run


def main(argv: Sequence[str]) -> None:
    """Parse the flags and evaluate."""
    config = parse_config(EvaluatorConfig, argv, program="evaluator", doc=__doc__)
    with distributed.world(config.device) as world:
        evaluate(config, world)


if __name__ == "__main__":
    sys.exit(run(main, "evaluator"))
