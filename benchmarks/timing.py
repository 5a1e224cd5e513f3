"""Cases, and the one timer: everything that is compared runs in turn, and must agree before it is timed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from runtime.errors import UserError

WARM_UPS = 2
# Largest max|difference| / max|reference| of a tensor. A bf16 product keeps 8 bits, and errors of the layers add up.
SAME, SAME_GRADIENT, BF16 = 1e-5, 1e-4, 0.1

Clock = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Case:
    """One thing to be timed.

    Attributes:
        name: in tables, unique within a group.
        prepare: makes the state, once.
        run: the work, given the state.
        outcome: (state, result of the first run) -> tensors that must agree with the reference's; None: not compared.
        reference: name of the case that it is compared with; it stands before this one.
        tolerance: largest relative error of `outcome`.
        flop: of one run; 0 where nobody counts.
        images: of one run, a fraction where a run is part of a trajectory; 0 where that means nothing.
        steps: of one run, where a step is what counts; 0 elsewhere.
        precision: whose GEMM peak is the limit, "fp32" or "bf16".
        is_peak: a bare matrix product, which sets that peak.
        predicted_memory: peak in bytes that is expected of the state, where somebody foretells it.
    """

    name: str
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]
    outcome: Callable[[Any, Any], Sequence[Tensor]] | None = None
    reference: str | None = None
    tolerance: float = SAME
    flop: float = 0.0
    images: float = 0
    steps: int = 0
    precision: str = "fp32"
    is_peak: bool = False
    predicted_memory: Callable[[Any], int] | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of one case; `error` is against the reference, `memory` the CUDA peak in bytes."""

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


def interleave(runs: Mapping[str, Callable[[], Any]], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Times A B C, A B C, ...: what slows the machine for a while then slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, work in runs.items():
            times[name].append(clock(work))
    return times


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest max|difference| / max|wanted| over pairs of tensors; NaN where a number is not finite.

    Raises:
        ValueError: if shapes differ.
    """
    worst = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
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
    """Error of a case against its reference.

    Raises:
        UserError: if they compute different things, so that comparing their times would mean nothing.
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
    """Prepares cases, compares their first results, warms up, and times them in turn.

    Args:
        group: name for the rows.
        cases: references first.
        rounds: timed runs of each.
        clock: seconds of one call.
        known: outcomes of earlier calls by name, to compare with; added to.
        device: where peak memory is read, if it is a GPU and there is a single case.

    Raises:
        UserError: if a case does not agree with its reference.
    """
    outcomes = {} if known is None else known
    runs: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float | None] = {}
    predicted: dict[str, int] = {}
    for case in cases:
        state = case.prepare()
        if case.predicted_memory is not None:
            predicted[case.name] = case.predicted_memory(state)
        result = case.run(state)
        if case.outcome is not None:
            outcomes[case.name] = case.outcome(state, result)
        errors[case.name] = check(case, outcomes)
        runs[case.name] = partial(case.run, state)
    interleave(runs, WARM_UPS - 1, clock)  # the first run above was one too
    watched = device if device is not None and device.type == "cuda" and len(cases) == 1 else None
    if watched is not None:
        torch.cuda.reset_peak_memory_stats(watched)
    times = interleave(runs, rounds, clock)
    memory = None if watched is None else torch.cuda.max_memory_allocated(watched)
    return [
        Row(
            group=group,
            steps=case.steps,
            seconds=statistics.median(times[case.name]),
            rounds=times[case.name],
            error=errors[case.name],
            memory=memory,
            predicted_memory=predicted.get(case.name),
            **{name: getattr(case, name) for name in ("name", "flop", "images", "precision", "is_peak", "reference")},
        )
        for case in cases
    ]


def process_seconds(work: Callable[[], Any]) -> float:
    """CPU time of a call, over all threads of the process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_seconds(work: Callable[[], Any]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cuda_seconds(work: Callable[[], Any]) -> float:
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
