"""Times sampling runs with Skip-Cache beside one without, and beside what their multiply-adds allow.

    python scripts/benchmark_caching.py                                              28 blocks of width 192 on a CPU
    python scripts/benchmark_caching.py --hidden-size 1152 --num-heads 16 --input-size 32 --batch-size 32 \
        --precision bf16 --device cuda                                               XL/2 on a GPU

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

from benchmarks.caching import CachedRow, make_runner, make_runs, measure_runs
from benchmarks.cases import filled_network
from benchmarks.report import headline, machine_info, write_report
from benchmarks.timing import cuda_seconds, wall_seconds
from diffusion import create_diffusion
from runtime.config import flag_name, parse_config, setting, to_dict
from runtime.errors import blame, run
from runtime.files import check_writable

GOAL = 0.95  # of the bound


@dataclass(frozen=True)
class CachingConfig:
    """Settings of benchmark_caching.py."""

    model: str = setting("Skip-DiT-XL/2", "name in the registry, of a model that keeps state")
    hidden_size: int = setting(192, "width")
    num_heads: int = setting(3, "attention heads")
    input_size: int = setting(16, "side of the latent image")
    cache_depth: int | None = setting(None, "blocks kept at an end; the model's own")
    cache_interval: tuple[int, ...] = setting((2, 3, 4), "state is refreshed every N steps")
    num_sampling_steps: str = setting("250", "step spec")
    batch_size: int = setting(1, "images at a time, without guidance")
    precision: str = setting("fp32", "of the network", ("fp32", "bf16"))
    rounds: int = setting(5, "timed runs of each; the median counts")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))
    threads: int = setting(1, "CPU threads")
    check: bool = setting(False, f"exit with status 1 where less than {GOAL:.0%} of a bound is reached")
    output: Path | None = setting(None, "JSON file for the results")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        for name in ("batch_size", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch sees no GPU here")
        with blame(f"--num-sampling-steps {self.num_sampling_steps}"):
            create_diffusion(self.num_sampling_steps)


def measure(config: CachingConfig, device: torch.device) -> list[CachedRow]:
    """Builds the network, and times its runs."""
    overrides: dict[str, Any] = {name: getattr(config, name) for name in ("hidden_size", "num_heads", "input_size")}
    if config.cache_depth is not None:
        overrides["cache_depth"] = config.cache_depth
    with blame(f"--model {config.model}"):
        network = filled_network(config.model, device, **overrides)
    process = create_diffusion(config.num_sampling_steps, learn_sigma=network.out_channels == 2 * network.in_channels)
    sampler = process.ancestral(convention=network.time_convention)
    autocast = torch.bfloat16 if config.precision == "bf16" else None
    sample = make_runner(network, sampler, config.batch_size, device, autocast)
    with blame(f"--cache-interval {' '.join(map(str, config.cache_interval))}"):
        runs = make_runs(network, sampler, config.cache_interval, sample)
    return measure_runs(runs, sample, config.rounds, cuda_seconds if device.type == "cuda" else wall_seconds)


def table(rows: Sequence[CachedRow]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| state refreshed | full | cached | blocks run | G multiply-adds | s | bound | speed-up | of bound |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.full_steps} | {row.cached_steps} | {row.blocks:,} | {row.multiply_adds / 1e9:,.1f} "
            f"| {row.seconds:.2f} | {row.bound:.3f} x | {row.speedup:.3f} x | {row.share:.1%} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Parses flags, measures, prints the table, writes the JSON."""
    config = parse_config(CachingConfig, argv, program="benchmark_caching.py", description=__doc__.split("\n")[0])
    if config.output is not None:
        check_writable(config.output, "--output")
    torch.set_num_threads(config.threads)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
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
    if config.check and any(row.share < GOAL for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run(main, "benchmark_caching.py"))
