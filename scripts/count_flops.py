"""Counts parameters and multiply-adds of named models: one forward of one image, no guidance; whole runs on request.

    python scripts/count_flops.py                                   all rows that were published
    python scripts/count_flops.py --model DiT-XL/2 --input-size 64 --check
    python scripts/count_flops.py --model Skip-DiT-XL/2 --cache-interval 2 3 4 --num-sampling-steps 250
    python scripts/count_flops.py --model DyDiT-XL/2 --keep 0.625 0.625 0.75

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
from diffusion.refresh import takes_cache_depth
from runtime.config import flag_name, parse_config, setting
from torch.utils.flop_counter import FlopCounterMode

from diffusion import create_diffusion, skip_cache
from models import DyDiT, Network, Routing, create_model, model_config
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
    cache_depth: int | None = setting(None, "blocks kept at an end by steps that reuse state; the model's own")
    cache_interval: tuple[int, ...] = setting((), "also count runs with Skip-Cache, state refreshed every N steps")
    num_sampling_steps: str | None = setting(None, "step spec of those runs (250)")
    keep: tuple[float, float, float] | None = setting(
        None, "shares of heads, MLP groups and tokens that a DyDiT keeps on"
    )
    check: bool = setting(False, "count with PyTorch's own counter too; exit with status 1 where it disagrees")
    json: bool = setting(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        if self.num_sampling_steps is not None and not self.cache_interval:
            raise ValueError(f"--num-sampling-steps {self.num_sampling_steps}: has no effect without --cache-interval")
        if self.keep is not None and not all(0 <= share <= 1 for share in self.keep):
            raise ValueError(f"--keep {' '.join(map(str, self.keep))}: shares lie in [0, 1]")
        if self.keep is not None and not self.model:
            raise ValueError("--keep: needs --model")


class Run(NamedTuple):
    """A sampling run with Skip-Cache, of one image without guidance.

    Attributes:
        interval: N.
        full: steps that compute everything.
        cached: steps that reuse state.
        multiply_adds: executed in all steps.
        speedup: multiply-adds of as many full steps over those.
    """

    interval: int
    full: int
    cached: int
    multiply_adds: int
    speedup: float


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
        multiply_adds_with_state: of a step that reuses state, if the network keeps any.
        runs: with Skip-Cache, if asked for.
        torch_multiply_adds: as PyTorch counts them, if asked for.
        torch_multiply_adds_with_state: likewise.
    """

    model: str
    input_size: int
    parameters: int
    trainable: int
    multiply_adds: int
    layer_norm_elements: int
    parts: dict[str, int]
    multiply_adds_with_state: int | None
    runs: list[Run]
    torch_multiply_adds: int | None
    torch_multiply_adds_with_state: int | None

    @property
    def stated(self) -> tuple[int, int | None]:
        """Without and with state, as the network says."""
        return self.multiply_adds, self.multiply_adds_with_state

    @property
    def counted(self) -> tuple[int | None, int | None]:
        """Without and with state, as PyTorch counted."""
        return self.torch_multiply_adds, self.torch_multiply_adds_with_state


def count(
    name: str,
    overrides: dict[str, int],
    *,
    check: bool = False,
    intervals: Sequence[int] = (),
    steps: str = "250",
    keep: tuple[float, float, float] | None = None,
) -> Count:
    """Counts one model, without memory for its weights.

    Args:
        name: in the registry.
        overrides: of its config.
        check: let PyTorch count too.
        intervals: of the runs to count.
        steps: step spec of the runs.
        keep: shares of heads, MLP groups and tokens that are on.

    Raises:
        ValueError: for an unknown name, a size that the model cannot have, a run that it cannot make, or shares of a
            model that has no routers.
    """
    with torch.device("meta"):
        network = create_model(name, **overrides)
    parts = network.multiply_adds()
    if keep is not None:
        if not isinstance(network, DyDiT):
            raise ValueError("has no routers; --keep is for DyDiT")
        parts = {part: round(found) for part, found in network.multiply_adds_at(constant_routing(*keep)).items()}
    counted = torch_multiply_adds(network) if check else (None, None)
    return Count(
        model=name,
        input_size=network.input_size,
        parameters=sum(p.numel() for p in network.parameters()),
        trainable=sum(p.numel() for p in network.parameters() if p.requires_grad),
        multiply_adds=sum(parts.values()),
        layer_norm_elements=network.layer_norm_elements(),
        parts=parts,
        multiply_adds_with_state=sum(network.multiply_adds_with_state().values()) if network.keeps_state else None,
        runs=[count_run(network, interval, steps) for interval in intervals],
        torch_multiply_adds=counted[0],
        torch_multiply_adds_with_state=counted[1],
    )


def constant_routing(heads: float, groups: float, tokens: float) -> Routing:
    """Masks that have these means everywhere."""
    return Routing(*(torch.full((1, 1, 1), share, dtype=torch.float64) for share in (heads, groups, tokens)))


def count_run(network: Network, interval: int, steps: str) -> Run:
    """Counts the steps of a sampling run and what they execute."""
    times = create_diffusion(steps).ancestral(convention=network.time_convention).times
    refresh = skip_cache(network, times, interval)
    executed = network.executed_multiply_adds(refresh)
    always = network.executed_multiply_adds([True] * len(refresh))
    return Run(interval, sum(refresh), len(refresh) - sum(refresh), executed, always / executed)


@torch.no_grad()
def torch_multiply_adds(network: Network) -> tuple[int, int | None]:
    """What PyTorch's counter sees in a forward on the meta device, without state and with it, if there is any.

    It counts a multiply-add as two operations.
    """
    side = network.input_size
    x = torch.empty(1, network.in_channels, side, side, device="meta")
    y = torch.zeros(1, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        state = network(x, 0, y).state
    with FlopCounterMode(display=False) as counter_with_state:
        network(x, 0, y, state)
    return counter.get_total_flops() // 2, counter_with_state.get_total_flops() // 2 if network.keeps_state else None


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
    runs = [
        [c.model, str(r.interval), str(r.full), str(r.cached), giga(r.multiply_adds), f"{r.speedup:.3f} x"]
        for c in counts
        for r in c.runs
    ]
    if runs:
        text += "\n\n" + table([["run with Skip-Cache", "N", "full", "cached", "G multiply-adds", "fewer by"], *runs])
    return text


def as_json(counts: Sequence[Count]) -> str:
    """A list of rows; the recount and the runs only where they were asked for."""
    rows: list[dict[str, Any]] = [{**c._asdict(), "runs": [r._asdict() for r in c.runs]} for c in counts]
    for row in rows:
        for field in ("torch_multiply_adds", "torch_multiply_adds_with_state", "multiply_adds_with_state"):
            if row[field] is None:
                del row[field]
    return json.dumps(rows, indent=2)


def _shown(without_and_with_state: tuple[int | None, int | None]) -> str:
    plain, with_state = without_and_with_state
    return f"{plain:,}" + ("" if with_state is None else f" and {with_state:,} with state")


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
        sizes = {"input_size": input_size, "cache_depth": config.cache_depth}
        overrides = {field: value for field, value in sizes.items() if value is not None}
        flags = "".join(f" {flag_name(field)} {value}" for field, value in overrides.items())
        runs = " ".join(map(str, config.cache_interval))
        with blame(f"--model {name}{flags}" + (f" --cache-interval {runs}" if runs else "")):
            if config.cache_depth is not None and not takes_cache_depth(model_config(name)):
                raise UserError(f"--cache-depth {config.cache_depth}: has no effect on {name}; leave it out")
            steps = config.num_sampling_steps or "250"
            counts.append(
                count(
                    name, overrides, check=config.check, intervals=config.cache_interval, steps=steps, keep=config.keep
                )
            )
    print(as_json(counts) if config.json else summary(counts))
    if not config.check:
        return
    wrong = [c for c in counts if c.counted != c.stated]
    for c in wrong:
        found = f"{_shown(c.stated)} stated, {_shown(c.counted)} counted by PyTorch"
        print(f"{c.model} at {c.input_size}: {found}", file=sys.stderr)
    if wrong:
        sys.exit(1)
    if not config.json:
        print(f"\nPyTorch's counter agrees: {len(counts)} of {len(counts)}")


if __name__ == "__main__":
    sys.exit(run(main, "count_flops.py"))
