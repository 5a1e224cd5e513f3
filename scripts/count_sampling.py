"""Counts what sampling from a checkpoint executes: images are drawn, and every evaluation is counted as it was.

    python scripts/count_sampling.py --ckpt new_dydit0.7.pt --images 32
    python scripts/count_sampling.py --ckpt DiT-XL-2-skip --sampler ddim --cache-interval 3 --images 2

What a router left out, what a reused state made needless, rows that guidance did not double: none of it is counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from runtime.config import parse_config, setting

from benchmarks.counting import SamplingCost
from benchmarks.report import aligned
from runtime import distributed
from runtime.errors import run
from sampling.config import SamplingConfig
from sampling.pipeline import Pipeline


@dataclass(frozen=True)
class CountSamplingConfig(SamplingConfig):
    """Settings of count_sampling.py."""

    images: int = setting(8, "images to draw, of the classes in turn")
    json: bool = setting(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        super().__post_init__()
        if self.images < 1:
            raise ValueError(f"--images {self.images}: must be at least 1")


def summary(cost: SamplingCost, images: int) -> dict[str, Any]:
    """Per evaluated row by part; per image; and the share of the blocks' work, as routers are trained on it."""
    return {
        "evaluations_per_image": cost.rows / images,
        "parts": {part: cost.executed[part] / cost.rows for part in cost.dense},
        "dense_parts": {part: number / cost.rows for part, number in cost.dense.items()},
        "multiply_adds": cost.executed.total() / cost.rows,
        "dense_multiply_adds": cost.dense.total() / cost.rows,
        "multiply_adds_per_image": cost.executed.total() / images,
        "block_ratio": cost.block_ratio,
    }


def count_sampling(config: CountSamplingConfig) -> dict[str, Any]:
    """Draws latents from a checkpoint and counts what that took.

    Raises:
        UserError: for anything about the checkpoint that does not fit.
    """
    with distributed.world(config.device) as world:
        pipeline = Pipeline(config, world.device)
        with SamplingCost().listening() as cost:
            pipeline.denoise(0, range(config.images), torch.arange(config.images) % pipeline.num_classes)
    return {"model": pipeline.config.model, "images": config.images, **summary(cost, config.images)}


def unit_of(number: float) -> tuple[str, float]:
    """Billions or millions, whichever shows a number of multiply-adds and its parts: letter and size."""
    return ("G", 1e9) if number >= 1e9 else ("M", 1e6)


def summary_table(found: dict[str, Any]) -> str:
    """What an evaluated row takes on average, by part, beside the network with nothing left out."""
    parts = {**found["parts"], "all": found["multiply_adds"]}
    dense = {**found["dense_parts"], "all": found["dense_multiply_adds"]}
    letter, unit = unit_of(dense["all"])
    titles, rows = ["part", f"{letter} multiply-adds", "of", "share"], []
    for part, number in parts.items():
        share = f"{number / dense[part]:.1%}" if dense[part] else ""
        rows.append([part.replace("_", " "), f"{number / unit:,.4f}", f"{dense[part] / unit:,.4f}", share])
    image = found["multiply_adds_per_image"]
    letter, unit = unit_of(image)
    return (
        f"{found['model']}, {found['images']} images, {found['evaluations_per_image']:.1f} evaluations an image\n\n"
        f"{aligned(titles, rows, 1)}\n\nshare of the blocks' work: {found['block_ratio']:.3f}\n"
        f"an image: {image / unit:,.4f} {letter} multiply-adds"
    )


def main(argv: Sequence[str]) -> None:
    """Parses flags, draws, counts, prints."""
    config = parse_config(CountSamplingConfig, argv, program="count_sampling.py", description=__doc__.split("\n")[0])
    found = count_sampling(config)
    print(json.dumps(found, indent=2) if config.json else summary_table(found))


if __name__ == "__main__":
    sys.exit(run(main, "count_sampling.py"))
