"""Time a DyDiT that leaves out what is off, against a plain DiT of the same weights and against masks.

    python scripts/benchmark_routing.py                   # S/2, and one block of XL/2, at about half the work
    python scripts/benchmark_routing.py --model DyDiT-B/2 --batch-size 4 --heads 6 --groups 6 --tokens 0.7

A speed-up is worth as much as the work it left out, so the table shows both and their quotient: 1 means that all saved
work became saved time. Routers, packing and scattering are in the time, and routers in the work. With
--num-sampling-steps whole guided sampling loops are timed (DDPM, scale 1.5), of --batch-size images. Figures are in
docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.cases import find_compiler
from benchmarks.report import aligned, headline, machine_info, report, spread, write_json
from benchmarks.routing import ALL_ON, DENSE, ROUTED, Workload, routing_cases, speedup
from benchmarks.timing import Row, TimingSettings, check_at_least, choose_clock, measure
from models import DyDiT, family_of, model_config
from runtime.command_line import parse_config
from runtime.devices import choose_device
from runtime.errors import UserError, error_prefix, run
from runtime.settings import Values, flag_name, setting

# About half of the blocks' work: where the goals are stated.
WORKLOADS = (
    Workload("DyDiT-S/2", depth=None, rows=8, heads=4, groups=3, tokens=0.8),
    Workload("DyDiT-XL/2", depth=1, rows=2, heads=10, groups=10, tokens=0.75),
)
CUDA_WORKLOADS = (Workload("DyDiT-XL/2", depth=None, rows=64, heads=10, groups=10, tokens=0.75),)


@dataclass(frozen=True, kw_only=True)
class RoutingSettings(TimingSettings):
    """Settings of benchmark_routing.py."""

    model: str | None = setting(None, "a DyDiT of the registry", shown="the published cases")
    depth: int | None = setting(None, "number of blocks", shown="the model's own")
    batch_size: int = setting(8, "images of an evaluation, or of a sampling loop")
    heads: int | None = setting(None, "heads that are on in every block", shown="half of them")
    groups: int | None = setting(None, "groups of MLP channels that are on", shown="half of them")
    tokens: float = setting(0.8, "share of the tokens that goes through the MLP")
    num_sampling_steps: int | None = setting(
        None, "time guided sampling loops of this many steps", shown="single evaluations", was={"--steps": None}
    )
    precision: Literal["fp32", "bf16"] = setting("fp32", "of the network", was={"--bf16": "bf16"})
    compile: bool = setting(False, "compile the blocks")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "depth", "batch_size", "heads", "groups", "num_sampling_steps")
        if not 0 <= self.tokens <= 1:
            raise ValueError(f"--tokens {self.tokens}: must lie in [0, 1]")
        for name in ("depth", "heads", "groups") if self.model is None else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: has no effect without --model")


def workloads(config: RoutingSettings, device: torch.device) -> tuple[Workload, ...]:
    """The published cases, or the one that the flags describe.

    Raises:
        UserError: For a model without routers, or more heads or groups than it has.
    """
    if config.model is None:
        return CUDA_WORKLOADS if device.type == "cuda" else WORKLOADS
    with error_prefix(f"--model {config.model}"):
        family, own = family_of(config.model), model_config(config.model)
    if family.network is not DyDiT:
        raise UserError(f"--model {config.model}: has no routers; choose a DyDiT")
    for name in ("heads", "groups"):
        if (getattr(config, name) or 0) > own.num_heads:
            raise UserError(f"{flag_name(name)} {getattr(config, name)}: {config.model} has {own.num_heads}")
    heads, groups = config.heads or own.num_heads // 2, config.groups or own.num_heads // 2
    return (Workload(config.model, config.depth, config.batch_size, heads, groups, config.tokens),)


def table(groups: Sequence[Sequence[Row]]) -> str:
    """Speed-up over the plain DiT, reduction of its work, and their quotient, for what is left out."""
    rows = []
    for group in groups:
        for row in group:
            gain = speedup(group, row.name)
            quotient = f"{gain.quotient:.3f}" if row.name in (ALL_ON, ROUTED) else ""
            times = [f"{row.seconds * 1e3:,.1f}", f"{spread(row.rounds, row.seconds):.0%}"]
            rows.append([row.group, row.name, *times, f"{gain.speedup:.3f}", f"{gain.reduction:.3f}", quotient])
    return aligned(["case", "", "ms", "spread", "speed-up", "less work", "quotient"], rows, left=2)


def savings(rows: Sequence[Row]) -> list[Values]:
    """Results of one group against the plain DiT, for the JSON."""
    results = {row.name: speedup(rows, row.name) for row in rows if row.name != DENSE}
    return [
        {"case": rows[0].group, "name": name, **each._asdict(), "quotient": each.quotient}
        for name, each in results.items()
    ]


def main(argv: Sequence[str]) -> None:
    """Parse flags, measure, print the tables, write the JSON."""
    config = parse_config(RoutingSettings, argv, program="benchmark_routing.py", doc=__doc__)
    config.start()
    device = choose_device(config.device)
    compiler = find_compiler(device) if config.compile else None
    if config.compile and compiler is None:
        raise UserError("--compile: needs a C++ compiler, or Triton on a GPU")
    clock_name, clock = choose_clock(device, config.threads)
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    groups = []
    for workload in workloads(config, device):
        cases = routing_cases(workload, device, steps=config.num_sampling_steps, autocast=autocast, compiler=compiler)
        groups.append(measure(workload.title, cases, config.rounds, clock))
    result = report(config, machine_info(device, clock_name), [row for group in groups for row in group], [])
    result["savings"] = [entry for group in groups for entry in savings(group)]
    print(f"{headline(result)}\n\n{table(groups)}")
    write_json(result, config.output)


if __name__ == "__main__":
    sys.exit(run(main, "benchmark_routing.py"))
