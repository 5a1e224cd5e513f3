"""Count parameters and MACs of named models: one forward of one image, no guidance; whole runs on request.

    python scripts/count_flops.py                                   # all rows that were published
    python scripts/count_flops.py --model DiT-XL/2 --input-size 64 --check
    python scripts/count_flops.py --model Skip-DiT-XL/2 --cache-interval 2 3 4 --num-sampling-steps 250
    python scripts/count_flops.py --model DyDiT-XL/2 --keep 0.625 0.625 0.75

The "Gflops" of the papers are MACs. Some counts add the layer norms, by 1 or by 4 operations an
element: that is the difference between 118.62, 118.64 and 118.69 for DiT-XL/2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.costs import counted_cost, layer_norm_elements, reused_cost, routed_cost, run_cost
from benchmarks.report import aligned
from diffusion import AncestralSampler, create_diffusion, skip_cache
from diffusion.caching import CacheSchedule, takes_cache_depth
from models import DyDiT, Network, create_model, family_of, model_config
from models.dydit_block import Routing
from runtime.command_line import parse_config
from runtime.errors import UserError, error_prefix, run
from runtime.settings import Values, flag_name, setting

# (model, side of the latent image), as published with arXiv 2212.09748: all sizes at 256 pixels, the largest at 512.
PUBLISHED = tuple((f"DiT-{size}/{patch}", 32) for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)) + (
    ("DiT-XL/2", 64),
)


@dataclass(frozen=True, kw_only=True)
class CountSettings:
    """Settings of count_flops.py."""

    model: tuple[str, ...] = setting((), "models to count", shown="every published row")
    input_size: int | None = setting(
        None, "side of the (latent) image: 32 for 256 pixels, 64 for 512", shown="the model's own"
    )
    cache_depth: int | None = setting(None, "blocks kept at an end by steps that reuse state", shown="the model's own")
    cache_interval: tuple[int, ...] = setting((), "also count runs with Skip-Cache that compute state every N steps")
    num_sampling_steps: str | None = setting(None, "step spec of those runs", shown="250")
    keep: tuple[float, float, float] | None = setting(
        None, "shares of heads, MLP groups and tokens that a DyDiT keeps on", shown="all"
    )
    check: bool = setting(False, "count with PyTorch's own counter too; exit with status 1 if it disagrees")
    json: bool = setting(False, "print JSON instead of a table")

    def __post_init__(self) -> None:
        if self.num_sampling_steps is not None and not self.cache_interval:
            raise ValueError(f"--num-sampling-steps {self.num_sampling_steps}: has no effect without --cache-interval")
        if self.keep is not None and not all(0 <= share <= 1 for share in self.keep):
            raise ValueError(f"--keep {' '.join(map(str, self.keep))}: shares lie in [0, 1]")
        if self.keep is not None and not self.model:
            raise ValueError("--keep: needs --model")
        if self.input_size is not None and not self.model:
            raise ValueError(f"--input-size {self.input_size}: needs --model; the published rows have their own sizes")


class Run(NamedTuple):
    """A sampling run with Skip-Cache, of one image without guidance."""

    interval: int  # N
    full: int  # steps that compute everything
    cached: int  # steps that reuse state
    macs: int  # executed in all steps
    speedup: float  # MACs of as many full steps over those


class Count(NamedTuple):
    """One row of the table."""

    model: str  # in the registry
    input_size: int  # of the (latent) image
    parameters: int  # all of them, frozen positions included
    trainable: int  # those that training changes
    macs: int  # of linear maps and attention products
    layer_norm_elements: int  # that pass through layer norms
    parts: dict[str, int]  # `macs` by part; with --keep at those shares, rounded
    macs_with_state: int | None  # of a step that reuses state, if the network keeps any
    runs: list[Run]  # with Skip-Cache, if asked for
    torch_macs: int | None  # `macs` as PyTorch counts them, if asked for
    torch_macs_with_state: int | None  # likewise


def count(name: str, config: CountSettings, **overrides: object) -> Count:
    """Count one model, without memory for its weights.

    Raises:
        ValueError: For an unknown name, a size that the model cannot have, a run that it cannot make, or shares of a
            model that has no routers.
    """
    with torch.device("meta"):
        network = create_model(name, **overrides)
    parts = network.cost()
    if config.keep is not None:
        if not isinstance(network, DyDiT):
            raise ValueError("has no routers; --keep is for DyDiT")
        masks = Routing(*(torch.full((1, 1, 1), share, dtype=torch.float64) for share in config.keep))
        parts = {part: round(macs) for part, macs in routed_cost(network, masks).items()}
    keeps = network.keeps_state
    return Count(
        model=name,
        input_size=network.sample_shape[-1],
        parameters=sum(p.numel() for p in network.parameters()),
        trainable=sum(p.numel() for p in network.parameters() if p.requires_grad),
        macs=sum(parts.values()),
        layer_norm_elements=layer_norm_elements(network),
        parts=parts,
        macs_with_state=sum(reused_cost(network).values()) if keeps else None,
        runs=[
            count_run(
                network, interval, config.num_sampling_steps or "250", CacheSchedule(*family_of(name).cache_bounds)
            )
            for interval in config.cache_interval
        ],
        torch_macs=counted_cost(network) if config.check else None,
        torch_macs_with_state=counted_cost(network, reused=True) if config.check and keeps else None,
    )


def count_run(network: Network, interval: int, steps: str, bounds: CacheSchedule) -> Run:
    """Count the steps of a sampling run and the MACs that they execute."""
    refresh = skip_cache(network, AncestralSampler(create_diffusion(), steps), interval, bounds)
    executed = run_cost(network, refresh)
    always = run_cost(network, [True] * len(refresh))
    return Run(interval, sum(refresh), len(refresh) - sum(refresh), executed, always / executed)


def giga(number: float) -> str:
    """Billions with four decimals."""
    return f"{number / 1e9:,.4f}"


def summary(counts: Sequence[Count]) -> str:
    """The table of all models; after a single one, its parts."""
    rows = []
    for c in counts:
        normed = [giga(c.macs + k * c.layer_norm_elements) for k in (0, 1, 4)]
        rows.append([c.model, str(c.input_size), f"{c.parameters:,}", f"{c.trainable:,}", *normed])
    tables = [aligned(["model", "input", "parameters", "trainable", "G MACs", "+1 per LN element", "+4"], rows)]
    if len(counts) == 1:
        only = counts[0]
        parts = [[name.replace("_", " "), giga(n), f"{n / only.macs:.2%}"] for name, n in only.parts.items()]
        tables.append(aligned(["part", "G MACs", "share"], parts))
    runs = [
        [c.model, str(r.interval), str(r.full), str(r.cached), giga(r.macs), f"{r.speedup:.3f} x"]
        for c in counts
        for r in c.runs
    ]
    if runs:
        tables.append(aligned(["run with Skip-Cache", "N", "full", "cached", "G MACs", "fewer by"], runs))
    return "\n\n".join(tables)


def as_json(counts: Sequence[Count]) -> str:
    """A list of rows; what was not counted is left out."""
    rows = [{**c._asdict(), "runs": [r._asdict() for r in c.runs]} for c in counts]
    return json.dumps([{name: value for name, value in row.items() if value is not None} for row in rows], indent=2)


def _shown(without: int | None, with_state: int | None) -> str:
    return f"{without:,}" + ("" if with_state is None else f" and {with_state:,} with state")


def main(argv: Sequence[str]) -> None:
    """Parse flags, count, print; exit with status 1 if a check fails."""
    config = parse_config(CountSettings, argv, program="count_flops.py", doc=__doc__)
    counts = []
    for name, input_size in [(name, config.input_size) for name in config.model] or PUBLISHED:
        sizes = {"input_size": input_size, "cache_depth": config.cache_depth}
        fields: Values = {field: value for field, value in sizes.items() if value is not None}
        flags = "".join(f" {flag_name(field)} {value}" for field, value in fields.items())
        intervals = " ".join(map(str, config.cache_interval))
        with error_prefix(f"--model {name}{flags}" + (f" --cache-interval {intervals}" if intervals else "")):
            own = model_config(name)
            if config.cache_depth is not None and not takes_cache_depth(own):
                raise UserError(f"--cache-depth {config.cache_depth}: has no effect on {name}; leave it out")
            if side := fields.pop("input_size", None):
                fields["sample_shape"] = (*own.sample_shape[:-2], side, side)
            counts.append(count(name, config, **fields))
    print(as_json(counts) if config.json else summary(counts))
    wrong = [c for c in counts if (c.torch_macs, c.torch_macs_with_state) != (c.macs, c.macs_with_state)]
    for c in wrong if config.check else ():
        stated, counted = _shown(c.macs, c.macs_with_state), _shown(c.torch_macs, c.torch_macs_with_state)
        print(f"{c.model} at {c.input_size}: {stated} stated, {counted} counted by PyTorch", file=sys.stderr)
    if config.check and wrong:
        sys.exit(1)
    if config.check and not config.json:
        print(f"\nPyTorch's counter agrees: {len(counts)} of {len(counts)}")


if __name__ == "__main__":
    sys.exit(run(main, "count_flops.py"))
