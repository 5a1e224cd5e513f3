"""Times a DyDiT that leaves out what is off, beside a plain DiT of the same weights and beside masks.

    python scripts/benchmark_routing.py                   # S/2, and one block of XL/2, at about half the work
    python scripts/benchmark_routing.py --model DyDiT-B/2 --batch-size 4 --heads 6 --groups 6 --tokens 0.7

A speed-up is worth as much as the work it left out, so the table shows both and their quotient: 1 means that all saved
work became saved time. Routers, packing and scattering are in the time, and routers in the work. With --steps whole
guided sampling loops are timed (DDPM, scale 1.5), of --batch-size images. How: docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runtime.config import flag_name, parse_config, setting, to_dict

from benchmarks.cases import find_compiler
from benchmarks.report import aligned, headline, machine_info, report, write_report
from benchmarks.routing import ALL_ON, DENSE, ROUTED, Share, routing_cases, saving
from benchmarks.timing import Row, choose_clock, measure
from models import DyDiT, family_of, model_config
from models.dydit import DyDiTConfig
from runtime import distributed
from runtime.errors import UserError, blame, run
from runtime.files import check_writable

# About half of the blocks' work: where the goals are stated.
SHARES = (
    Share("DyDiT-S/2", depth=None, rows=8, heads=4, groups=3, tokens=0.8),
    Share("DyDiT-XL/2", depth=1, rows=2, heads=10, groups=10, tokens=0.75),
)
CUDA_SHARES = (Share("DyDiT-XL/2", depth=None, rows=64, heads=10, groups=10, tokens=0.75),)


@dataclass(frozen=True)
class RoutingBenchmarkConfig:
    """Settings of benchmark_routing.py."""

    model: str | None = setting(None, "a DyDiT of the registry; none: the published cases")
    depth: int | None = setting(None, "blocks; the model's own")
    batch_size: int = setting(8, "images per evaluation, or per sampling loop")
    heads: int | None = setting(None, "heads that are on in every block; half of them")
    groups: int | None = setting(None, "groups of MLP channels that are on; half of them")
    tokens: float = setting(0.8, "share of the tokens that goes through the MLP")
    steps: int | None = setting(None, "time guided sampling loops of this many steps; single evaluations")
    bf16: bool = setting(False, "bf16 autocast instead of float32")
    compile: bool = setting(False, "compile the blocks")
    rounds: int = setting(7, "timed runs of each case; the median counts")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))
    threads: int = setting(1, "CPU threads")
    output: Path | None = setting(None, "JSON file for the results")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        for name in ("depth", "batch_size", "heads", "groups", "steps", "rounds", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        if not 0 <= self.tokens <= 1:
            raise ValueError(f"--tokens {self.tokens}: must lie in [0, 1]")
        if self.model is None:
            for name in ("depth", "heads", "groups"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{flag_name(name)} {getattr(self, name)}: has no effect without --model")


def shares(config: RoutingBenchmarkConfig, device: torch.device) -> tuple[Share, ...]:
    """What is timed: the published cases, or the one that the flags describe.

    Raises:
        UserError: for a model without routers, or more heads or groups than it has.
    """
    if config.model is None:
        return CUDA_SHARES if device.type == "cuda" else SHARES
    with blame(f"--model {config.model}"):
        family, own = family_of(config.model), model_config(config.model)
    if family.network is not DyDiT:
        raise UserError(f"--model {config.model}: has no routers; choose a DyDiT")
    assert isinstance(own, DyDiTConfig)
    for name in ("heads", "groups"):
        if (getattr(config, name) or 0) > own.num_heads:
            raise UserError(f"{flag_name(name)} {getattr(config, name)}: {config.model} has {own.num_heads}")
    heads, groups = config.heads or own.num_heads // 2, config.groups or own.num_heads // 2
    return (Share(config.model, config.depth, config.batch_size, heads, groups, config.tokens),)


def table(groups: Sequence[Sequence[Row]]) -> str:
    """Speed-up over the plain DiT, reduction of its work, and their quotient, for what is left out."""
    rows = []
    for group in groups:
        for row in group:
            found = saving(group, row.name)
            quotient = f"{found.quotient:.3f}" if row.name in (ALL_ON, ROUTED) else ""
            spread = (max(row.rounds) - min(row.rounds)) / row.seconds
            times = [f"{row.seconds * 1e3:,.1f}", f"{spread:.0%}"]
            rows.append([row.group, row.name, *times, f"{found.speedup:.3f}", f"{found.reduction:.3f}", quotient])
    return aligned(["case", "", "ms", "spread", "speed-up", "less work", "quotient"], rows, left=2)


def savings(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One case's results against the plain DiT, for the JSON."""
    found = {row.name: saving(rows, row.name) for row in rows if row.name != DENSE}
    return [
        {"case": rows[0].group, "name": name, **each._asdict(), "quotient": each.quotient}
        for name, each in found.items()
    ]


def main(argv: Sequence[str]) -> None:
    """Parses flags, measures, prints the tables, writes the JSON."""
    summary = __doc__.split("\n")[0]
    config = parse_config(RoutingBenchmarkConfig, argv, program="benchmark_routing.py", description=summary)
    if config.output is not None:
        check_writable(config.output, "--output")
    device = distributed.choose_device(config.device)
    wanted = shares(config, device)
    compiler = find_compiler(device) if config.compile else None
    if config.compile and compiler is None:
        raise UserError("--compile: needs a C++ compiler, or Triton on a GPU")
    torch.set_num_threads(config.threads)
    clock_name, clock = choose_clock(device, config.threads)
    autocast = torch.bfloat16 if config.bf16 else None
    groups = []
    for share in wanted:
        cases = routing_cases(share, device, steps=config.steps, autocast=autocast, compiler=compiler)
        groups.append(measure(share.title, cases, config.rounds, clock))
    rows = [row for group in groups for row in group]
    document = report({**to_dict(config), "output": None}, machine_info(device, clock_name), rows, [])
    document["savings"] = [entry for group in groups for entry in savings(group)]
    print(f"{headline(document)}\n\n{table(groups)}")
    if config.output is not None:
        write_report(document, config.output)


if __name__ == "__main__":
    sys.exit(run(main, "benchmark_routing.py"))
