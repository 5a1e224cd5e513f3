"""Counts parameters and multiply-adds of named models: one forward of one image, no guidance.

    python scripts/count_flops.py                                   all rows that were published
    python scripts/count_flops.py --model DiT-XL/2 --input-size 64 --check
    python scripts/count_flops.py --model DyDiT-XL/2 --keep 0.625 0.625 0.75
    python scripts/count_flops.py --ckpt new_dydit0.7.pt --model DyDiT-XL/2 --images 32

With --ckpt images are drawn, and the evaluations that it takes are counted as they were: what a router left out is not.

The "Gflops" of the papers are multiply-adds. Some counts add the layer norms, by 1 or by 4 operations an element: that
is the difference between 118.62, 118.64 and 118.69 for DiT-XL/2.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from models import DyDiT, ModelOutput, Network, Routing, create_model
from runtime import distributed
from runtime.config import flag_name, parse_config, setting
from runtime.errors import UserError, blame, run

# (model, side of the latent image), as published with arXiv 2212.09748: all sizes at 256 pixels, the largest at 512.
PUBLISHED = tuple((f"DiT-{size}/{patch}", 32) for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)) + (
    ("DiT-XL/2", 64),
)
ROOT = Path(__file__).resolve().parent.parent
BLOCK_PARTS = ("attention_linear", "attention_products", "mlp")


@dataclass(frozen=True)
class CountConfig:
    """Settings of count_flops.py."""

    model: tuple[str, ...] = setting((), "models to count; none: every published row")
    input_size: int | None = setting(None, "side of the (latent) image: 32 for 256 pixels, 64 for 512")
    keep: tuple[float, float, float] | None = setting(
        None, "shares of heads, MLP groups and tokens that a DyDiT keeps on"
    )
    ckpt: Path | None = setting(None, "count what sampling from this checkpoint takes, mean over its evaluations")
    images: int = setting(8, "with --ckpt: images to draw")
    sampler: str = setting("ddpm", "with --ckpt: as in sample.py")
    num_sampling_steps: str = setting("250", "with --ckpt: as in sample.py")
    cfg_scale: float = setting(1.5, "with --ckpt: as in sample.py")
    vae: str | None = setting(None, "with --ckpt: as in sample.py")
    check: bool = setting(False, "count with PyTorch's own counter too; exit with status 1 where it disagrees")
    json: bool = setting(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant."""
        if self.keep is not None and not all(0 <= share <= 1 for share in self.keep):
            raise ValueError(f"--keep {' '.join(map(str, self.keep))}: shares lie in [0, 1]")
        if self.keep is not None and not self.model:
            raise ValueError("--keep: needs --model")
        if self.images < 1:
            raise ValueError(f"--images {self.images}: must be at least 1")
        if self.ckpt is not None:
            for name in ("keep", "check", "input_size"):
                if getattr(self, name):
                    raise ValueError(f"{flag_name(name)}: has no effect with --ckpt")
            if len(self.model) > 1:
                raise ValueError(f"--model {' '.join(self.model)}: a checkpoint is of one model")


class Count(NamedTuple):
    """One row of the table.

    Attributes:
        model: registry name.
        input_size: side of the (latent) image.
        parameters: all of them, frozen positions included.
        trainable: those that training changes.
        multiply_adds: linear maps and attention products.
        layer_norm_elements: elements that pass through layer norms.
        parts: `multiply_adds` by part; with --keep at those shares, rounded.
        torch_multiply_adds: the same as PyTorch counts it, if asked for.
    """

    model: str
    input_size: int
    parameters: int
    trainable: int
    multiply_adds: int
    layer_norm_elements: int
    parts: dict[str, int]
    torch_multiply_adds: int | None


def count(name: str, input_size: int | None, *, check: bool, keep: tuple[float, float, float] | None = None) -> Count:
    """Counts one model, without memory for its weights.

    Raises:
        ValueError: for an unknown name, a size that the model cannot have, or shares of a model that has no routers.
    """
    with torch.device("meta"):
        network = create_model(name, **({} if input_size is None else {"input_size": input_size}))
    parts = network.multiply_adds()
    if keep is not None:
        if not isinstance(network, DyDiT):
            raise ValueError("has no routers; --keep is for DyDiT")
        parts = {part: round(found) for part, found in network.multiply_adds_at(constant_routing(*keep)).items()}
    return Count(
        model=name,
        input_size=network.input_size,
        parameters=sum(p.numel() for p in network.parameters()),
        trainable=sum(p.numel() for p in network.parameters() if p.requires_grad),
        multiply_adds=sum(parts.values()),
        layer_norm_elements=network.layer_norm_elements(),
        parts=parts,
        torch_multiply_adds=torch_multiply_adds(network) if check else None,
    )


def constant_routing(heads: float, groups: float, tokens: float) -> Routing:
    """Masks that have these means everywhere."""
    return Routing(*(torch.full((1, 1, 1), share, dtype=torch.float64) for share in (heads, groups, tokens)))


class SamplingCost:
    """Listens to the evaluations of networks, and adds up what they needed.

    Attributes:
        rows: images evaluated, over all evaluations.
        executed: multiply-adds by part, over all rows.
        dense: the same if nothing were left out.
    """

    def __init__(self) -> None:
        self.rows, self.executed, self.dense = 0, Counter[str](), Counter[str]()

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """A forward hook."""
        if isinstance(module, Network) and isinstance(output, ModelOutput):
            rows = len(output.sample)
            self.rows += rows
            for total, found in (
                (self.executed, module.multiply_adds_of(output)),
                (self.dense, module.multiply_adds()),
            ):
                total.update({part: rows * number for part, number in found.items()})

    def summary(self, images: int) -> dict[str, Any]:
        """Per evaluated row by part; per image; and the share of the blocks' work, as routers are trained on it."""
        blocks = [sum(total[part] for part in BLOCK_PARTS) for total in (self.executed, self.dense)]
        return {
            "evaluations_per_image": self.rows / images,
            "parts": {part: number / self.rows for part, number in self.executed.items()},
            "dense_parts": {part: number / self.rows for part, number in self.dense.items()},
            "multiply_adds": self.executed.total() / self.rows,
            "dense_multiply_adds": self.dense.total() / self.rows,
            "multiply_adds_per_image": self.executed.total() / images,
            "block_ratio": blocks[0] / blocks[1],
        }


def count_sampling(config: CountConfig) -> dict[str, Any]:
    """Draws images from a checkpoint and counts what that took.

    Raises:
        UserError: for anything about the checkpoint that does not fit.
    """
    sys.path.insert(0, str(ROOT))  # sample.py is in no package
    from sample import SAMPLERS, Pipeline, SamplingConfig

    if config.sampler not in SAMPLERS:
        raise UserError(f"--sampler {config.sampler}: choose from {', '.join(SAMPLERS)}")
    settings = {name: getattr(config, name) for name in ("ckpt", "sampler", "num_sampling_steps", "cfg_scale", "vae")}
    try:
        sampling = SamplingConfig(**settings, model=config.model[0] if config.model else None)
    except ValueError as error:
        raise UserError(str(error)) from error
    with distributed.world() as world:
        pipeline, cost = Pipeline(sampling, world.device, vae="ema"), SamplingCost()
        listening = register_module_forward_hook(cost)
        pipeline(0, range(config.images), torch.arange(config.images) % pipeline.num_classes)
        listening.remove()
    return {"model": pipeline.name, "images": config.images, **cost.summary(config.images)}


def sampling_table(found: dict[str, Any]) -> str:
    """What an evaluated row takes on average, by part, beside the network with nothing left out."""
    rows = [["part", "G multiply-adds", "of", "share"]]
    parts = {**found["parts"], "all": found["multiply_adds"]}
    dense = {**found["dense_parts"], "all": found["dense_multiply_adds"]}
    rows += [
        [part.replace("_", " "), giga(n), giga(dense[part]), f"{n / dense[part]:.1%}"] for part, n in parts.items()
    ]
    return (
        f"{found['model']}, {found['images']} images, {found['evaluations_per_image']:.0f} evaluations an image\n\n"
        f"{table(rows)}\n\nshare of the blocks' work: {found['block_ratio']:.3f}\n"
        f"an image: {giga(found['multiply_adds_per_image'])} G multiply-adds"
    )


@torch.no_grad()
def torch_multiply_adds(network: Network) -> int:
    """What PyTorch's counter sees in one forward on the meta device; it counts a multiply-add as two operations."""
    side = network.input_size
    x = torch.empty(1, network.in_channels, side, side, device="meta")
    y = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(x, 0, y)
    return counter.get_total_flops() // 2


def giga(number: float) -> str:
    """Billions with four decimals."""
    return f"{number / 1e9:,.4f}"


def table(rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line) for line in lines)


def summary(counts: Sequence[Count]) -> str:
    """The table of all models; behind a single one, its parts."""
    header = ["model", "input", "parameters", "trainable", "G multiply-adds", "+1 per LN element", "+4"]
    rows = [header]
    for c in counts:
        normed = [giga(c.multiply_adds + k * c.layer_norm_elements) for k in (0, 1, 4)]
        rows.append([c.model, str(c.input_size), f"{c.parameters:,}", f"{c.trainable:,}", *normed])
    text = table(rows)
    if len(counts) == 1:
        only = counts[0]
        parts = [[name.replace("_", " "), giga(n), f"{n / only.multiply_adds:.2%}"] for name, n in only.parts.items()]
        text += "\n\n" + table([["part", "G multiply-adds", "share"], *parts])
    return text


def as_json(counts: Sequence[Count]) -> str:
    """A list of rows; the recount only where it was asked for."""
    rows: list[dict[str, Any]] = [c._asdict() for c in counts]
    for row in rows:
        if row["torch_multiply_adds"] is None:
            del row["torch_multiply_adds"]
    return json.dumps(rows, indent=2)


def main(argv: Sequence[str]) -> None:
    """Parses flags, counts, prints; leaves with status 1 if a check fails."""
    config = parse_config(CountConfig, argv, program="count_flops.py", description=__doc__.split("\n")[0])
    if config.ckpt is not None:
        cost = count_sampling(config)
        print(json.dumps(cost, indent=2) if config.json else sampling_table(cost))
        return
    wanted = [(name, config.input_size) for name in config.model]
    if not wanted:
        if config.input_size is not None:
            raise UserError(f"--input-size {config.input_size}: needs --model; the published rows have their own sizes")
        wanted = list(PUBLISHED)
    counts = []
    for name, input_size in wanted:
        with blame(f"--model {name}" if input_size is None else f"--model {name} --input-size {input_size}"):
            counts.append(count(name, input_size, check=config.check, keep=config.keep))
    print(as_json(counts) if config.json else summary(counts))
    if not config.check:
        return
    wrong = [c for c in counts if c.multiply_adds != c.torch_multiply_adds]
    for c in wrong:
        found = f"{c.multiply_adds:,} stated, {c.torch_multiply_adds:,} counted by PyTorch"
        print(f"{c.model} at {c.input_size}: {found}", file=sys.stderr)
    if wrong:
        sys.exit(1)
    if not config.json:
        print(f"\nPyTorch's counter agrees: {len(counts)} of {len(counts)}")


if __name__ == "__main__":
    sys.exit(run(main, "count_flops.py"))
