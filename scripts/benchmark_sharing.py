"""Times sampling with the encoder shared between steps against the multiply-adds that sharing leaves.

    python scripts/benchmark_sharing.py                                        DDT-XL's 22 + 6 blocks at width 192
    python scripts/benchmark_sharing.py --model DDT-XL/2 --hidden-size 1152 --num-heads 16 --input-size 32 \
        --batch-size 32 --precision bf16                                       the real one, on a GPU

The runs take turns in one process; a speed-up is the median over rounds. --check demands a share of the bound.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cases import filled_network
from benchmarks.report import headline, machine_info, write_report
from benchmarks.sharing import as_json, make_sampling, markdown, measure_sharing
from benchmarks.timing import cuda_seconds, wall_seconds
from runtime.config import flag_name, parse_config, setting, to_dict
from runtime.errors import blame, run
from runtime.files import check_writable

MUST_REACH = 0.93


@dataclass(frozen=True)
class SharingBenchmarkConfig:
    """Settings of benchmark_sharing.py."""

    model: str = setting("DDT-XL/2", "name in the registry, of a network with an encoder to share")
    hidden_size: int = setting(192, "width; the other settings of the model stay")
    num_heads: int = setting(3, "heads")
    input_size: int = setting(16, "side of the (latent) image")
    rates: tuple[int, ...] = setting((4, 10), "steps to each encoder call: 4 shares 75 %, 10 shares 90 %")
    num_sampling_steps: int = setting(100, "Euler steps of a run")
    batch_size: int = setting(1, "images of a run")
    precision: str = setting("fp32", "of matrix products", ("fp32", "bf16"))
    rounds: int = setting(7, "timed runs of each rate")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))
    threads: int = setting(1, "CPU threads")
    check: bool = setting(False, f"exit with status 1 if a rate reaches less than {MUST_REACH} of its bound")
    output: Path | None = setting(None, "JSON file for the results")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        for name in ("hidden_size", "num_heads", "input_size", "num_sampling_steps", "batch_size", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        for rate in self.rates:
            if not 1 <= rate <= self.num_sampling_steps:
                raise ValueError(f"--rates {rate}: must lie in 1..{self.num_sampling_steps}, the number of steps")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch sees no GPU here")


def main(argv: Sequence[str]) -> None:
    """Parses flags, measures, prints the table, writes the JSON; leaves with status 1 if a check fails."""
    config = parse_config(
        SharingBenchmarkConfig, argv, program="benchmark_sharing.py", description=__doc__.split("\n")[0]
    )
    if config.output is not None:
        check_writable(config.output, "--output")
    torch.set_num_threads(config.threads)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    clock_name, clock = ("CUDA events", cuda_seconds) if device.type == "cuda" else ("wall time", wall_seconds)
    with blame(f"--model {config.model}"):
        sizes = {name: getattr(config, name) for name in ("hidden_size", "num_heads", "input_size")}
        network = filled_network(config.model, device, **sizes)
        autocast = torch.bfloat16 if config.precision == "bf16" else None
        steps = config.num_sampling_steps
        sample = make_sampling(network, steps, config.batch_size, device, autocast)
        runs = measure_sharing(network, sample, steps, config.rates, config.rounds, clock)
    document = {
        "format": 1,
        "settings": {**to_dict(config), "output": None},
        "machine": machine_info(device, clock_name),
        "peak_flop_per_second": {},
        "rows": as_json(runs),
    }
    print(f"{headline(document)}\n\n{markdown(runs)}")
    if config.output is not None:
        write_report(document, config.output)
    short = [r for r in runs if r.share < MUST_REACH]
    for r in short:
        print(f"one encoder call in {r.rate} steps: {r.share:.2f} of the bound, below {MUST_REACH}", file=sys.stderr)
    if config.check and short:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run(main, "benchmark_sharing.py"))
