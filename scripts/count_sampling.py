"""Count the work that sampling from a checkpoint executes: images are sampled, and every evaluation is counted.

    python scripts/count_sampling.py --ckpt new_dydit0.7 --num-images 32
    python scripts/count_sampling.py --ckpt DiT-XL-2-skip --sampler ddim --cache-interval 3 --num-images 2

What a router left out, what a reused state made needless, rows that guidance did not double: none of it is counted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.counting import SamplingCost
from benchmarks.report import aligned
from benchmarks.sampling import conditioning_in_turn
from benchmarks.timing import check_at_least
from runtime import distributed
from runtime.errors import run
from runtime.given import Given
from runtime.settings import Values, setting
from sampling.config import SamplingSettings, parse_settings
from sampling.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class CountSamplingSettings(SamplingSettings):
    """Settings of count_sampling.py."""

    num_images: int = setting(8, "images to sample, of the classes in turn", was={"--images": None})
    json: bool = setting(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "num_images")


def summary(cost: SamplingCost, images: int) -> Values:
    """MACs of an evaluated row by part, of an image, and the executed share of the blocks' work."""
    return {
        "evaluations_per_image": cost.rows / images,
        "parts": {part: cost.executed[part] / cost.rows for part in cost.dense},
        "dense_parts": {part: number / cost.rows for part, number in cost.dense.items()},
        "macs": cost.executed.total() / cost.rows,
        "dense_macs": cost.dense.total() / cost.rows,
        "macs_per_image": cost.executed.total() / images,
        "block_ratio": cost.block_ratio,
    }


def count_sampling(given: Given[CountSamplingSettings]) -> Values:
    """Sample latents from a checkpoint and count the work.

    Raises:
        UserError: For anything about the checkpoint that does not fit.
    """
    images = given.general.num_images
    with distributed.world(given.general.compute.device) as world:
        pipeline = Pipeline.open(given, world.device)
        prepared = pipeline.prepare()
        with SamplingCost().listening() as cost:
            rows, null = conditioning_in_turn(pipeline, images)
            pipeline.denoise(prepared, 0, range(images), rows, null=null)
    return {"model": pipeline.info.model, "images": images, **summary(cost, images)}


def unit_of(number: float) -> tuple[str, float]:
    """Billions or millions, whichever shows a number of MACs and its parts: letter and size."""
    return ("G", 1e9) if number >= 1e9 else ("M", 1e6)


def summary_table(counted: Values) -> str:
    """MACs of an evaluated row on average, by part, against the network with nothing left out."""
    parts = {**counted["parts"], "all": counted["macs"]}
    dense = {**counted["dense_parts"], "all": counted["dense_macs"]}
    letter, unit = unit_of(dense["all"])
    rows = []
    for part, number in parts.items():
        share = f"{number / dense[part]:.1%}" if dense[part] else ""
        rows.append([part.replace("_", " "), f"{number / unit:,.4f}", f"{dense[part] / unit:,.4f}", share])
    table = aligned(["part", f"{letter} MACs", "of", "share"], rows)
    image = counted["macs_per_image"]
    letter, unit = unit_of(image)
    evaluations, ratio = counted["evaluations_per_image"], counted["block_ratio"]
    return (
        f"{counted['model']}, {counted['images']} images, {evaluations:.1f} evaluations an image\n\n{table}\n\n"
        f"share of the blocks' work: {ratio:.3f}\nan image: {image / unit:,.4f} {letter} MACs"
    )


def main(argv: Sequence[str]) -> None:
    """Parse flags, sample, count, print."""
    given = parse_settings(CountSamplingSettings, argv, "count_sampling.py", __doc__)
    counted = count_sampling(given)
    print(json.dumps(counted, indent=2) if given.general.json else summary_table(counted))


if __name__ == "__main__":
    sys.exit(run(main, "count_sampling.py"))
