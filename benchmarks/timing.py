"""Cases and the one timer: cases that are compared run in turn, and must agree before they are timed."""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from runtime.errors import UserError
from runtime.files import check_writable
from runtime.settings import flag_name, setting

WARM_UPS = 2
# Largest max|difference| / max|reference| of a tensor. A bf16 product keeps 8 bits, and errors of the layers add up.
SAME, SAME_GRADIENT, BF16 = 1e-5, 1e-4, 0.1

Clock = Callable[[Callable[[], object]], float]  # seconds of a call


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Flags of every benchmark on a CPU."""

    threads: int = setting(1, "number of CPU threads")
    output: Path | None = setting(None, "JSON file for the results")

    def __post_init__(self) -> None:
        check_at_least(self, 1, "threads")

    def start(self) -> None:
        """Set the number of threads, and check that the results can be written."""
        if self.output is not None:
            check_writable(self.output, "--output")
        torch.set_num_threads(self.threads)


@dataclass(frozen=True, kw_only=True)
class TimingSettings(OutputSettings):
    """Flags of the benchmarks that time cases in turn."""

    rounds: int = setting(7, "timed runs of each case; the median counts")
    device: Literal["cuda", "cpu"] | None = setting(None, "where to compute", shown="cuda if there is one")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "rounds")


def check_at_least(settings: object, least: int, *names: str) -> None:
    """Check that numbers among settings, where given, are not below a bound.

    Raises:
        ValueError: Naming the flag.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ValueError(f"{flag_name(name)} {value}: must be at least {least}")


class Work(NamedTuple):
    """Evaluations of a network, of which a time can be predicted.

    Attributes:
        kind: In sampling, weights were cast before.
        rows: Of an evaluation.
        times: Number of evaluations, or of training steps.
        graphs: Launched by CUDA graphs.
    """

    kind: Literal["training", "forward", "sampling"]
    rows: int
    times: int
    graphs: bool = False


@dataclass(frozen=True)
class Case:
    """One thing to be timed."""

    name: str  # in tables, unique within a group
    prepare: Callable[[], object]  # makes the state, once
    run: Callable[[Any], Any]  # the work, given the state
    # (state, result of the first run) -> tensors that must agree with the reference's; None: not compared
    outcome: Callable[[Any, Any], Sequence[Tensor]] | None = None
    reference: str | None = None  # name of the earlier case that it is compared with
    tolerance: float = SAME  # largest relative error of `outcome`
    flop: float = 0.0  # of one run; 0 if they are not counted
    images: float = 0  # of one run, a fraction where a run is part of a trajectory; 0 if that means nothing
    steps: int = 0  # of one run; 0 if a step is not what counts
    precision: str = "fp32"  # of the GEMM peak that is the limit, "fp32" or "bf16"
    is_peak: bool = False  # a bare matrix product, which sets that peak
    work: Work | None = None
    predicted_memory: Callable[[Any], int] | None = None  # function of the state that predicts its peak memory in bytes


@dataclass(frozen=True)
class Row:
    """Result of one case; `error` is that against the reference, `memory` the CUDA peak in bytes."""

    group: str
    name: str
    seconds: float
    rounds: list[float]
    flop: float
    images: float
    precision: str
    is_peak: bool
    reference: str | None
    error: float | None
    steps: int = 0
    memory: int | None = None
    predicted_memory: int | None = None
    work: Work | None = None


def interleave(runs: Mapping[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Time A B C, A B C, ...: what slows the machine for a while then slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, work in runs.items():
            times[name].append(clock(work))
    return times


def relative_error(actual: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Largest max|difference| / max|reference| over pairs of tensors; NaN if a number is not finite.

    Raises:
        ValueError: If shapes differ.
    """
    worst = 0.0
    for ours, theirs in zip(actual, reference, strict=True):
        if ours.shape != theirs.shape:  # broadcasting would hide it
            raise ValueError(f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}")
        ours, theirs = ours.detach().float(), theirs.detach().float()
        scale = float(theirs.abs().max())
        error = float((ours - theirs).abs().max()) / (scale or 1.0)
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def check(case: Case, outcomes: Mapping[str, Sequence[Tensor]]) -> float | None:
    """Compute the error of a case against its reference.

    Raises:
        UserError: If they compute different things, so that comparing their times would mean nothing.
    """
    if case.reference is None:
        return None
    error = relative_error(outcomes[case.name], outcomes[case.reference])
    if not error <= case.tolerance:
        raise UserError(
            f"{case.name} differs from {case.reference} by {error:.1e} of its largest value, "
            f"more than the {case.tolerance:.0e} allowed; times are not compared"
        )
    return error


def measure(
    group: str,
    cases: Sequence[Case],
    rounds: int,
    clock: Clock,
    *,
    known: dict[str, Sequence[Tensor]] | None = None,
    device: torch.device | None = None,
) -> list[Row]:
    """Prepare cases, compare their first results, warm up, and time them in turn.

    Args:
        group: Name for the rows.
        cases: References first.
        rounds: Number of timed runs of each.
        clock: Seconds of one call.
        known: Outcomes of earlier calls by name, to compare with; added to.
        device: Device to read the peak memory of, if it is a GPU and there is a single case.

    Raises:
        UserError: If a case does not agree with its reference.
    """
    outcomes = {} if known is None else known
    runs: dict[str, Callable[[], object]] = {}
    rows: list[Row] = []
    for case in cases:
        state = case.prepare()
        predicted = None if case.predicted_memory is None else case.predicted_memory(state)
        result = case.run(state)
        if case.outcome is not None:
            outcomes[case.name] = case.outcome(state, result)
        runs[case.name] = partial(case.run, state)
        copied = ("name", "flop", "images", "precision", "is_peak", "reference", "steps", "work")
        fields = {name: getattr(case, name) for name in copied}
        rows.append(
            Row(group=group, seconds=0, rounds=[], error=check(case, outcomes), predicted_memory=predicted, **fields)
        )
    interleave(runs, WARM_UPS - 1, clock)  # the first run above was one too
    watched = device if device is not None and device.type == "cuda" and len(cases) == 1 else None
    if watched is not None:
        torch.cuda.reset_peak_memory_stats(watched)
    times = interleave(runs, rounds, clock)
    memory = None if watched is None else torch.cuda.max_memory_allocated(watched)
    return [
        replace(row, seconds=statistics.median(times[row.name]), rounds=times[row.name], memory=memory) for row in rows
    ]


def failure(error: Exception) -> str:
    """Say in one line why a measurement is missing; the traceback of an unexpected error goes to standard error."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, UserError | ImportError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0]


def process_seconds(work: Callable[[], object]) -> float:
    """CPU time of a call, over all threads of the process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cuda_seconds(work: Callable[[], object]) -> float:
    """Time of a call on the GPU, between two events of its stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def choose_clock(device: torch.device, threads: int) -> tuple[str, Clock]:
    """Name and clock: CPU time says nothing about the speed of several threads, nor of a GPU."""
    if device.type == "cuda":
        return "CUDA events", cuda_seconds
    return ("process CPU time", process_seconds) if threads == 1 else ("wall time", wall_seconds)
