"""Counts parameters and multiply-adds of named models: one forward of one image, no guidance.

    python scripts/count_flops.py                                   all rows that were published
    python scripts/count_flops.py --model DiT-XL/2 --input-size 64 --check

The "Gflops" of the papers are multiply-adds. Some counts add the layer norms, by 1 or by 4 operations an element: that
is the difference between 118.62, 118.64 and 118.69 for DiT-XL/2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import Network, create_model
from runtime.config import parse_config, setting
from runtime.errors import UserError, blame, run

# (model, side of the latent image), as published with arXiv 2212.09748: all sizes at 256 pixels, the largest at 512.
PUBLISHED = tuple((f"DiT-{size}/{patch}", 32) for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)) + (
    ("DiT-XL/2", 64),
)


@dataclass(frozen=True)
class CountConfig:
    """Settings of count_flops.py."""

    model: tuple[str, ...] = setting((), "models to count; none: every published row")
    input_size: int | None = setting(None, "side of the (latent) image: 32 for 256 pixels, 64 for 512")
    check: bool = setting(False, "count with PyTorch's own counter too; exit with status 1 where it disagrees")
    json: bool = setting(False, "print JSON instead of a table")


class Count(NamedTuple):
    """One row of the table.

    Attributes:
        model: registry name.
        input_size: side of the (latent) image.
        parameters: all of them, frozen positions included.
        trainable: those that training changes.
        multiply_adds: linear maps and attention products.
        layer_norm_elements: elements that pass through layer norms.
        parts: `multiply_adds` by part.
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


def count(name: str, input_size: int | None, *, check: bool) -> Count:
    """Counts one model, without memory for its weights.

    Raises:
        ValueError: for an unknown name, or a size that the model cannot have.
    """
    with torch.device("meta"):
        network = create_model(name, **({} if input_size is None else {"input_size": input_size}))
    parts = network.multiply_adds()
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


@torch.no_grad()
def torch_multiply_adds(network: Network) -> int:
    """What PyTorch's counter sees in one forward on the meta device; it counts a multiply-add as two operations."""
    side = network.input_size
    x = torch.empty(1, network.in_channels, side, side, device="meta")
    y = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        network(x, 0, y)
    return counter.get_total_flops() // 2


def giga(number: int) -> str:
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
    wanted = [(name, config.input_size) for name in config.model]
    if not wanted:
        if config.input_size is not None:
            raise UserError(f"--input-size {config.input_size}: needs --model; the published rows have their own sizes")
        wanted = list(PUBLISHED)
    counts = []
    for name, input_size in wanted:
        with blame(f"--model {name}" if input_size is None else f"--model {name} --input-size {input_size}"):
            counts.append(count(name, input_size, check=config.check))
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
