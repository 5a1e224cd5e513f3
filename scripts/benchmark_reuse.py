"""Times sampling runs that reuse state beside one that does not, and beside what their multiply-adds allow.

    python scripts/benchmark_reuse.py                                      Skip-Cache, 28 blocks of width 192 on a CPU
    python scripts/benchmark_reuse.py --model DDT-XL/2 --num-sampling-steps 100 --intervals 4 10       encoder sharing
    python scripts/benchmark_reuse.py --hidden-size 1152 --num-heads 16 --input-size 32 --batch-size 32 \
        --precision bf16 --device cuda                                     XL/2 on a GPU

Runs go through the real sampling loop and take turns (A B C, A B C, ...); a speed-up is the median over rounds of two
neighbours' ratio. The clock is wall time, or CUDA events on a GPU. The bound is the ratio of the multiply-adds that the
schedules execute, from which time can stay behind by all that is not a block.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runtime.config import flag_name, parse_config, setting, to_dict

from benchmarks.cases import filled_network
from benchmarks.report import headline, machine_info, write_report
from benchmarks.reuse import Row, make_runner, make_runs, make_sampler, measure_runs, table
from benchmarks.timing import cuda_seconds, wall_seconds
from runtime import distributed
from runtime.errors import blame, run
from runtime.files import check_writable


@dataclass(frozen=True)
class ReuseConfig:
    """Settings of benchmark_reuse.py."""

    model: str = setting("Skip-DiT-XL/2", "name in the registry, of a model that keeps state")
    hidden_size: int = setting(192, "width; the other settings of the model stay")
    num_heads: int = setting(3, "attention heads")
    input_size: int = setting(16, "side of the latent image")
    cache_depth: int | None = setting(None, "blocks kept at an end; the model's own")
    intervals: tuple[int, ...] = setting((2, 3, 4), "state is refreshed every N steps")
    num_sampling_steps: int = setting(250, "ancestral steps, or Euler's of a flow")
    batch_size: int = setting(1, "images at a time, without guidance")
    precision: str = setting("fp32", "of the network", ("fp32", "bf16"))
    rounds: int = setting(5, "timed runs of each; the median counts")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))
    threads: int = setting(1, "CPU threads")
    check: float | None = setting(None, "exit with status 1 where less than this share of a bound is reached")
    output: Path | None = setting(None, "JSON file for the results")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        for name in ("hidden_size", "num_heads", "input_size", "batch_size", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        for interval in self.intervals:
            if not 1 <= interval <= self.num_sampling_steps:
                raise ValueError(
                    f"--intervals {interval}: must lie in 1..{self.num_sampling_steps}, the number of steps"
                )


def measure(config: ReuseConfig, device: torch.device) -> list[Row]:
    """Builds the network, and times its runs."""
    overrides: dict[str, Any] = {name: getattr(config, name) for name in ("hidden_size", "num_heads", "input_size")}
    if config.cache_depth is not None:
        overrides["cache_depth"] = config.cache_depth
    with blame(f"--model {config.model}"):
        network = filled_network(config.model, device, **overrides)
    with blame(f"--num-sampling-steps {config.num_sampling_steps}"):
        sampler = make_sampler(network, config.num_sampling_steps)
    sample = make_runner(
        network, sampler, config.batch_size, device, torch.bfloat16 if config.precision == "bf16" else None
    )
    with blame(f"--model {config.model}"):
        runs = make_runs(network, sampler, config.intervals, sample)
    return measure_runs(runs, sample, config.rounds, cuda_seconds if device.type == "cuda" else wall_seconds)


def main(argv: Sequence[str]) -> None:
    """Parses flags, measures, prints the table, writes the JSON; leaves with status 1 if a check fails."""
    config = parse_config(ReuseConfig, argv, program="benchmark_reuse.py", description=__doc__.split("\n")[0])
    if config.output is not None:
        check_writable(config.output, "--output")
    torch.set_num_threads(config.threads)
    device = distributed.choose_device(config.device)
    rows = measure(config, device)
    document = {
        "format": 1,
        "settings": {**to_dict(config), "output": None},
        "machine": machine_info(device, "CUDA events" if device.type == "cuda" else "wall time"),
        "peak_flop_per_second": {},
        "rows": [{**dataclasses.asdict(row), "share_of_bound": row.share} for row in rows],
    }
    print(f"{headline(document).splitlines()[0]}\n\n{table(rows)}")
    if config.output is not None:
        write_report(document, config.output)
    if config.check is not None:
        short = [row for row in rows if row.share < config.check]
        for row in short:
            print(f"{row.name}: {row.share:.1%} of the bound, below {config.check:.0%}", file=sys.stderr)
        if short:
            sys.exit(1)


if __name__ == "__main__":
    sys.exit(run(main, "benchmark_reuse.py"))
