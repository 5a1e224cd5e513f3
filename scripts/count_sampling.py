"""Counts what sampling from a checkpoint executes: images are drawn, and every evaluation is counted as it was.

    python scripts/count_sampling.py --ckpt new_dydit0.7.pt --images 32
    python scripts/count_sampling.py --ckpt DiT-XL-2-skip --sampler ddim --cache-interval 3 --images 2

What a router left out, what a reused state made needless, rows that guidance did not double: none of it is counted.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from models import ModelOutput, Network
from runtime import distributed
from runtime.config import parse_config, setting
from runtime.errors import run
from sampling.config import SamplingConfig
from sampling.pipeline import Pipeline

BLOCK_PARTS = ("attention_linear", "attention_products", "mlp")


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


class SamplingCost:
    """Listens to the evaluations of networks, and adds up what they needed; a forward hook.

    Attributes:
        rows: images evaluated, over all evaluations.
        executed: multiply-adds by part, over all rows.
        dense: the same if nothing were left out.
    """

    def __init__(self) -> None:
        self.rows, self.executed, self.dense = 0, Counter[str](), Counter[str]()

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Counts one evaluation, network(x, t, y, state); other modules' are passed over."""
        if not isinstance(module, Network) or not isinstance(output, ModelOutput):
            return
        rows, reused = len(output.sample), len(args) > 3 and args[3] is not None
        executed = module.multiply_adds_with_state() if reused else module.multiply_adds_of(output)
        self.rows += rows
        for total, found in ((self.executed, executed), (self.dense, module.multiply_adds())):
            total.update({part: rows * number for part, number in found.items()})

    def summary(self, images: int) -> dict[str, Any]:
        """Per evaluated row by part; per image; and the share of the blocks' work, as routers are trained on it."""
        blocks = [sum(total[part] for part in BLOCK_PARTS) for total in (self.executed, self.dense)]
        return {
            "evaluations_per_image": self.rows / images,
            "parts": {part: self.executed[part] / self.rows for part in self.dense},
            "dense_parts": {part: number / self.rows for part, number in self.dense.items()},
            "multiply_adds": self.executed.total() / self.rows,
            "dense_multiply_adds": self.dense.total() / self.rows,
            "multiply_adds_per_image": self.executed.total() / images,
            "block_ratio": blocks[0] / blocks[1],
        }


def count_sampling(config: CountSamplingConfig) -> dict[str, Any]:
    """Draws latents from a checkpoint and counts what that took.

    Raises:
        UserError: for anything about the checkpoint that does not fit.
    """
    with distributed.world(config.device) as world:
        pipeline, cost = Pipeline(config, world.device), SamplingCost()
        listening = register_module_forward_hook(cost)
        try:
            pipeline.denoise(0, range(config.images), torch.arange(config.images) % pipeline.num_classes)
        finally:
            listening.remove()
    return {"model": pipeline.config.model, "images": config.images, **cost.summary(config.images)}


def summary_table(found: dict[str, Any]) -> str:
    """What an evaluated row takes on average, by part, beside the network with nothing left out."""
    parts = {**found["parts"], "all": found["multiply_adds"]}
    dense = {**found["dense_parts"], "all": found["dense_multiply_adds"]}
    lines = [f"{'part':<20}{'G multiply-adds':>18}{'of':>12}{'share':>9}"]
    for part, number in parts.items():
        share = f"{number / dense[part]:.1%}" if dense[part] else ""
        lines.append(f"{part.replace('_', ' '):<20}{number / 1e9:>18,.4f}{dense[part] / 1e9:>12,.4f}{share:>9}")
    return (
        f"{found['model']}, {found['images']} images, {found['evaluations_per_image']:.1f} evaluations an image\n\n"
        + "\n".join(lines)
        + f"\n\nshare of the blocks' work: {found['block_ratio']:.3f}\n"
        f"an image: {found['multiply_adds_per_image'] / 1e9:,.4f} G multiply-adds"
    )


def main(argv: Sequence[str]) -> None:
    """Parses flags, draws, counts, prints."""
    config = parse_config(CountSamplingConfig, argv, program="count_sampling.py", description=__doc__.split("\n")[0])
    found = count_sampling(config)
    print(json.dumps(found, indent=2) if config.json else summary_table(found))


if __name__ == "__main__":
    sys.exit(run(main, "count_sampling.py"))
