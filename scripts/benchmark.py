"""Time the network, a training step, optimizer and average, loaders and sampling, each against a plain baseline.

    python scripts/benchmark.py --model DiT-S/2 --batch-size 8
    python scripts/benchmark.py --only forward,train_step,sampling --against ../DiT  # facebookresearch/DiT
    python scripts/benchmark.py --model DDT-S/2 --only forward,train_step --against ../DDT --precision fp32 --rounds 15
    python scripts/benchmark.py --against-version ../older-checkout                  # this project, at another commit

Cases that are compared run in turn (A B C, A B C, ...) in one process on the same weights and inputs, and must agree
before they are timed. A time is the median over rounds: of CPU time on one thread, which other work on the machine
disturbs little; of wall time on several threads; of CUDA events on a GPU. The peak is that of matrix products
(`torch.nn.functional.linear`) timed in the same rounds. How versions are compared: benchmarks/versions.py.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks import cases, versions
from benchmarks.official import official_network
from benchmarks.report import document, headline, machine_info, markdown, report, write_json
from benchmarks.sampling import file_cases, loop_cases
from benchmarks.timing import Case, Clock, Row, TimingSettings, check_at_least, choose_clock, measure, process_seconds
from models import model_config
from runtime.command_line import parse_config
from runtime.devices import choose_device
from runtime.errors import error_prefix, run
from runtime.settings import setting

GROUPS = ("forward", "train_step", "optimizer", "loader", "sampling")
LOOP_IMAGES = 2  # where the surroundings of the network weigh most
Rows = tuple[list[Row], list[str]]  # results, and reasons for what is missing


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(TimingSettings):
    """Settings of benchmark.py."""

    model: str = setting("DiT-S/2", "name in the registry (models.list_models())")
    batch_size: int = setting(8, "images of a forward pass and of a training step")
    only: str = setting(",".join(GROUPS), "groups to run, separated by commas")
    against: Path | None = setting(None, "also time a checkout of the official code, such as facebookresearch/DiT")
    precision: Literal["fp32", "bf16"] | None = setting(None, "of forward pass and training step", shown="both")
    compiled: bool = setting(True, "also time compiled blocks")
    against_version: Path | None = setting(
        None, "only compare with another checkout of this project: forward, training step, sampling step"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "batch_size")
        unknown = sorted(set(self.groups) - set(GROUPS))
        if unknown:
            raise ValueError(f"--only {self.only}: unknown group {unknown[0]!r}; choose from {', '.join(GROUPS)}")
        if self.against is not None and not {"forward", "train_step", "sampling"} & set(self.groups):
            raise ValueError(f"--against {self.against}: has no effect without forward, train_step or sampling")

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups to run, in the order given."""
        return tuple(name.strip() for name in self.only.split(","))


def network_rows(config: BenchmarkSettings, device: torch.device, clock: Clock) -> Rows:
    """The groups that need a network."""
    groups = [group for group in config.groups if group in ("forward", "train_step", "optimizer")]
    if not groups:
        return [], []
    network = cases.random_network(config.model, device)
    inputs = cases.make_inputs(network, config.batch_size, device)
    peer = official_network(config.against, network, config.model) if config.against else None
    compiler = cases.find_compiler(device) if config.compiled else None
    skipped = [] if compiler or not config.compiled else ["compiled blocks: no C++ compiler (on a GPU: no Triton)"]
    peaks = cases.peak_cases(network, config.batch_size, device)
    makers: dict[str, Callable[[], list[Case]]] = {
        "forward": lambda: cases.forward_cases(network, inputs, peer, compiler) + peaks,
        "train_step": lambda: cases.train_cases(network, inputs, peer, compiler) + peaks,
        "optimizer": lambda: cases.optimizer_cases(network),
    }
    rows = []
    for group in groups:
        made = makers[group]()
        first = made[0]  # others are compared with it
        chosen = [case for case in made if case is first or config.precision in (None, case.precision)]
        rows += measure(group, chosen, config.rounds, clock)
    return rows, skipped


def loader_rows(rounds: int) -> Rows:
    """The loaders, on one CPU thread whatever the device."""
    with tempfile.TemporaryDirectory() as folder:
        loaders, skipped = cases.make_all(cases.loader_cases(Path(folder)))
        return measure("loader", loaders, rounds, process_seconds), skipped


def sampling_rows(config: BenchmarkSettings, device: torch.device, clock: Clock) -> Rows:
    """The loop around the network on the device, and the file at the end on one CPU thread."""
    loops, skipped = loop_cases(device, LOOP_IMAGES, config.against)
    rows = measure("sampling", loops, config.rounds, clock)
    with tempfile.TemporaryDirectory() as folder:
        rows += measure("sampling", file_cases(Path(folder)), config.rounds, process_seconds)
    return rows, skipped


def compare_versions(config: BenchmarkSettings, other: Path) -> None:
    """Compare with another version of this project, print the table, write the JSON."""
    rows = versions.compare(other, config.model, config.batch_size, config.threads)
    print(versions.table(rows))
    machine = machine_info(torch.device("cpu"), "process CPU time")
    write_json(document(config, machine, [row._asdict() for row in rows]), config.output)


def main(argv: Sequence[str]) -> None:
    """Parse flags, measure, print the table, write the JSON."""
    config = parse_config(BenchmarkSettings, argv, program="benchmark.py", doc=__doc__)
    with error_prefix(f"--model {config.model}"):
        model_config(config.model)
    config.start()
    if config.against_version is not None:
        return compare_versions(config, config.against_version)
    device = choose_device(config.device)
    clock_name, clock = choose_clock(device, config.threads)
    rows, skipped = network_rows(config, device, clock)
    others: dict[str, Callable[[], Rows]] = {
        "loader": lambda: loader_rows(config.rounds),
        "sampling": lambda: sampling_rows(config, device, clock),
    }
    for group in config.groups:
        if group in others:
            more_rows, more_skipped = others[group]()
            rows, skipped = rows + more_rows, skipped + more_skipped
    result = report(config, machine_info(device, clock_name), rows, skipped)
    print(f"{headline(result)}\n\n{markdown(result)}")
    write_json(result, config.output)


if __name__ == "__main__":
    sys.exit(run(main, "benchmark.py"))
