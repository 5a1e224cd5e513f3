"""Time sampling runs that reuse state against one that does not, and against the ratio of their MACs.

    python scripts/benchmark_reuse.py --model DDT-XL/2 --num-sampling-steps 100 --intervals 4 10
    python scripts/benchmark_reuse.py --model Skip-Latte-XL/2 --input-size 8 --num-sampling-steps 50
    python scripts/benchmark_reuse.py --model HunyuanDiT2DModel --num-sampling-steps 100
    python scripts/benchmark_reuse.py --hidden-size 1152 --num-heads 16 --input-size 32 --precision bf16 --device cuda

Without flags: Skip-Cache in 28 blocks of width 192. HunyuanDiT2DModel is diffusers' network of 40 layers, with
Skip-Cache by hooks. Runs go through the real sampling loop and take turns (A B C, A B C, ...); a speed-up is the
median over rounds of two neighbours' ratio. The clock is wall time, or CUDA events on a GPU. The bound is the ratio of
the MACs that the schedules execute; time can fall short of it by all that is not a block.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks import hunyuan
from benchmarks.report import document, headline, machine_info, write_json
from benchmarks.reuse import ReuseRun, results, reuse_case, reuse_runs, table
from benchmarks.sampling import random_pipeline
from benchmarks.timing import TimingSettings, check_at_least, cuda_seconds, measure, wall_seconds
from models import model_config
from runtime.command_line import parse_config
from runtime.devices import choose_device
from runtime.errors import error_prefix, run
from runtime.settings import Values, setting


@dataclass(frozen=True, kw_only=True)
class ReuseSettings(TimingSettings):
    """Settings of benchmark_reuse.py."""

    model: str = setting("Skip-DiT-XL/2", f"name in the registry, of a model that keeps state, or {hunyuan.MODEL}")
    hidden_size: int = setting(192, "width; the other settings of the model stay")
    num_heads: int = setting(3, "number of attention heads")
    input_size: int = setting(16, "side of the latent image")
    cache_depth: int | None = setting(None, "blocks kept at an end", shown="the model's own")
    intervals: tuple[int, ...] = setting((2, 3, 4), "numbers of steps from one that computes state to the next")
    num_sampling_steps: int = setting(250, "ancestral steps, or Euler steps of a flow")
    batch_size: int = setting(1, "images at a time, without guidance")
    precision: Literal["fp32", "bf16"] = setting("fp32", "of the network")
    rounds: int = setting(5, "timed runs of each; the median counts")
    check: float | None = setting(None, "exit with status 1 if less than this share of a bound is reached")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "hidden_size", "num_heads", "input_size", "batch_size")
        for interval in self.intervals:
            if not 1 <= interval <= self.num_sampling_steps:
                raise ValueError(
                    f"--intervals {interval}: must lie in 1..{self.num_sampling_steps}, the number of steps"
                )


def prepare_runs(config: ReuseSettings, device: torch.device) -> Mapping[str, ReuseRun]:
    """Build the network, and prepare its runs: one that computes state at every step, and one for every interval.

    Raises:
        ValueError: For settings that do not fit the network.
        UserError: For numbers of steps that its sampler cannot take.
    """
    intervals, steps = list(dict.fromkeys((1, *config.intervals))), config.num_sampling_steps
    if config.model == hunyuan.MODEL:
        if config.precision != "fp32":
            raise ValueError(f"--precision {config.precision}: is timed in fp32 alone")
        transformer = hunyuan.hunyuan_transformer(device, config.hidden_size, config.num_heads, config.input_size)
        return hunyuan.hunyuan_runs(transformer, steps, intervals, config.batch_size, config.cache_depth or 1)
    side = config.input_size
    fields: Values = {"sample_shape": (*model_config(config.model).sample_shape[:-2], side, side)}
    names = ("hidden_size", "num_heads", "cache_depth")
    fields |= {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    pipeline = random_pipeline(config.model, device, **fields)
    return reuse_runs(pipeline, steps, intervals, config.batch_size, config.precision)


def measure_runs(config: ReuseSettings, device: torch.device) -> list[Values]:
    """Prepare the runs, and time them."""
    with error_prefix(f"--model {config.model}"):
        runs = prepare_runs(config, device)
    clock = cuda_seconds if device.type == "cuda" else wall_seconds
    rows = measure("reuse", [reuse_case(name, run) for name, run in runs.items()], config.rounds, clock)
    return results(rows, list(runs.values()))


def main(argv: Sequence[str]) -> None:
    """Parse flags, measure, print the table, write the JSON; exit with status 1 if a check fails."""
    config = parse_config(ReuseSettings, argv, program="benchmark_reuse.py", doc=__doc__)
    config.start()
    device = choose_device(config.device)
    entries = measure_runs(config, device)
    clock = "CUDA events" if device.type == "cuda" else "wall time"
    result = document(config, machine_info(device, clock), entries)
    print(f"{headline(result)}\n\n{table(entries)}")
    write_json(result, config.output)
    short = [row for row in entries if config.check is not None and row["share_of_bound"] < config.check]
    for row in short:
        print(f"{row['name']}: {row['share_of_bound']:.1%} of the bound, below {config.check:.0%}", file=sys.stderr)
    if short:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run(main, "benchmark_reuse.py"))
