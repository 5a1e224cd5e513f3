"""Times the network, a training step, optimizer and average, loaders and sampling, each beside a plain baseline.

    python scripts/benchmark.py --model DiT-S/2 --batch-size 8
    python scripts/benchmark.py --only forward,train_step --against ../DiT     # a checkout of facebookresearch/DiT
    python scripts/benchmark.py --only sampling --against ../DiT               # the loop around the network, the .npz

Cases that are compared run in turn (A B C, A B C, ...) in one process on the same weights and inputs, and must agree
before they are timed. A time is the median over rounds: of CPU time on one thread, which neighbours on the machine
disturb little; of wall time on several threads; of CUDA events on a GPU. The peak is that of matrix products
(`torch.nn.functional.linear`) timed in the same rounds.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from runtime.config import flag_name, parse_config, setting, to_dict

from benchmarks.cases import (
    filled_network,
    find_compiler,
    forward_cases,
    loader_cases,
    make_all,
    make_inputs,
    optimizer_cases,
    peak_cases,
    train_cases,
)
from benchmarks.official import official_network
from benchmarks.report import headline, machine_info, markdown, report, write_report
from benchmarks.sampling import file_rows, loop_cases
from benchmarks.timing import Case, Clock, Row, choose_clock, measure, process_seconds
from models import model_config
from runtime import distributed
from runtime.errors import blame, run
from runtime.files import check_writable

GROUPS = ("forward", "train_step", "optimizer", "loader", "sampling")
OF_NO_NETWORK = {"loader", "sampling"}
LOOP_IMAGES = 2  # where what surrounds the network weighs most


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of benchmark.py."""

    model: str = setting("DiT-S/2", "name in the registry (models.list_models())")
    batch_size: int = setting(8, "images per forward pass and training step")
    rounds: int = setting(7, "timed runs of each case; the median counts")
    only: str = setting(",".join(GROUPS), "groups to run, separated by commas")
    against: Path | None = setting(None, "also time a checkout of facebookresearch/DiT (its models.py needs timm)")
    device: str | None = setting(None, "cuda where there is one, else cpu", ("cuda", "cpu"))
    threads: int = setting(1, "CPU threads")
    output: Path | None = setting(None, "JSON file for the results")

    def __post_init__(self) -> None:
        """Refuses what cannot be meant, before any work."""
        for name in ("batch_size", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be at least 1")
        unknown = sorted(set(self.groups) - set(GROUPS))
        if unknown:
            raise ValueError(f"--only {self.only}: unknown group {unknown[0]!r}; choose from {', '.join(GROUPS)}")
        if self.against is not None and not {"forward", "train_step", "sampling"} & set(self.groups):
            raise ValueError(f"--against {self.against}: has no effect without forward, train_step or sampling")

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups to run, in the order given."""
        return tuple(name.strip() for name in self.only.split(","))


def network_rows(config: BenchmarkConfig, device: torch.device, clock: Clock) -> tuple[list[Row], list[str]]:
    """The groups that need a network."""
    network = filled_network(config.model, device)
    inputs = make_inputs(network, config.batch_size, device)
    peer = official_network(config.against, network, config.model) if config.against else None
    compiler, rows, skipped = find_compiler(device), [], []
    if compiler is None:
        skipped.append("compiled blocks: no C++ compiler (on a GPU: no Triton)")
    makers: dict[str, Callable[[], list[Case]]] = {
        "forward": lambda: forward_cases(network, inputs, peer, compiler) + peak_cases(network, len(inputs.x), device),
        "train_step": lambda: train_cases(network, inputs, peer, compiler) + peak_cases(network, len(inputs.x), device),
        "optimizer": lambda: optimizer_cases(network),
    }
    for group in config.groups:
        if group in makers:
            rows += measure(group, makers[group](), config.rounds, clock)
    return rows, skipped


def loader_rows(rounds: int) -> tuple[list[Row], list[str]]:
    """The loaders, on one CPU thread whatever the device."""
    with tempfile.TemporaryDirectory() as folder:
        cases, skipped = make_all(loader_cases(Path(folder)))
        return measure("loader", cases, rounds, process_seconds), skipped


def sampling_rows(config: BenchmarkConfig, device: torch.device, clock: Clock) -> tuple[list[Row], list[str]]:
    """The loop around the network on the device, and the file at the end on one CPU thread."""
    cases, skipped = loop_cases(device, LOOP_IMAGES, config.against)
    rows = measure("sampling", cases, config.rounds, clock)
    more, lacking = file_rows(lambda cases: measure("sampling", cases, config.rounds, process_seconds))
    return rows + more, skipped + lacking


def main(argv: Sequence[str]) -> None:
    """Parses flags, measures, prints the table, writes the JSON."""
    config = parse_config(BenchmarkConfig, argv, program="benchmark.py", description=__doc__.split("\n")[0])
    with blame(f"--model {config.model}"):
        model_config(config.model)
    if config.output is not None:
        check_writable(config.output, "--output")
    torch.set_num_threads(config.threads)
    device = distributed.choose_device(config.device)
    clock_name, clock = choose_clock(device, config.threads)
    rows, skipped = network_rows(config, device, clock) if set(config.groups) - OF_NO_NETWORK else ([], [])
    others: dict[str, Callable[[], tuple[list[Row], list[str]]]] = {
        "loader": lambda: loader_rows(config.rounds),
        "sampling": lambda: sampling_rows(config, device, clock),
    }
    for group in config.groups:
        if group in others:
            more_rows, more_skipped = others[group]()
            rows, skipped = rows + more_rows, skipped + more_skipped
    # Paths are the user's own and say nothing about the numbers
    settings = {**to_dict(config), "against": config.against is not None, "output": None}
    document = report(settings, machine_info(device, clock_name), rows, skipped)
    print(f"{headline(document)}\n\n{markdown(document)}")
    if config.output is not None:
        write_report(document, config.output)


if __name__ == "__main__":
    sys.exit(run(main, "benchmark.py"))
