"""Whole sampling runs that reuse state, each against one that never does and against the ratio of executed MACs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from benchmarks.costs import run_cost
from benchmarks.report import aligned
from benchmarks.sampling import SamplingRun
from benchmarks.timing import Clock, interleave
from diffusion.caching import check_keeps_state
from models import Network, family_of
from sampling.pipeline import Pipeline

WARM_UPS = 1


def reusing_run(pipeline: Pipeline, steps: int, interval: int, images: int, precision: str = "fp32") -> SamplingRun:
    """Prepare an unguided run that computes state every so often: by Skip-Cache's rule, or in a flow by sharing.

    Raises:
        ValueError: If the network keeps no state.
        UserError: For numbers of steps that the sampler cannot take.
    """
    check_keeps_state(pipeline.network)
    flow = family_of(pipeline.info.model).process == "flow"
    reuse = {"sharing_interval" if flow else "cache_interval": interval}
    settings = {"sampler": "euler" if flow else "ddpm", "num_sampling_steps": steps, "precision": precision}
    prepared = pipeline.prepare(**settings, **reuse, cfg_scale=1.0, tf32=False)
    return SamplingRun(pipeline, prepared, images)


class Run(NamedTuple):
    """One way through all steps of a sampler.

    Attributes:
        name: Name in tables.
        refresh: One flag per step, whether state is computed.
        blocks: Number of blocks that ran, counted.
        macs: Executed MACs, of one image.
        sample: Does it.
    """

    name: str
    refresh: tuple[bool, ...]
    blocks: int
    macs: int
    sample: Callable[[], Tensor]


@dataclass(frozen=True)
class ReuseRow:
    """Result of one run; `speedup` and `bound` are against the one that computes state at every step."""

    name: str
    full_steps: int
    cached_steps: int
    blocks: int
    macs: int
    rounds: list[float]
    seconds: float
    bound: float
    speedup: float

    @property
    def share(self) -> float:
        """Reached share of the bound."""
        return self.speedup / self.bound


def count_blocks(network: Network, work: Callable[[], object]) -> int:
    """Count the blocks of a network that run during a piece of work."""
    count = 0

    def add(*_: object) -> None:
        nonlocal count
        count += 1

    handles = [block.register_forward_hook(add) for block in network.blocks]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return count


def make_runs(
    pipeline: Pipeline, steps: int, intervals: Sequence[int], images: int, precision: str = "fp32"
) -> list[Run]:
    """Prepare a run without reuse, and one for each interval; every one is done once, to count its blocks.

    Raises:
        ValueError: As for `reusing_run`.
    """
    runs = []
    for interval in dict.fromkeys((1, *intervals)):
        run = reusing_run(pipeline, steps, interval, images, precision)
        refresh = tuple(evaluation.refresh for evaluation in run.prepared.table)
        name = "every step" if interval == 1 else f"N = {interval}"
        blocks = count_blocks(run.prepared.network, run.latents)
        runs.append(Run(name, refresh, blocks, run_cost(pipeline.network, refresh), run.latents))
    return runs


def measure_runs(runs: Sequence[Run], rounds: int, clock: Clock) -> list[ReuseRow]:
    """Time the runs in turn; a speed-up is the median over rounds of the first run's time over a run's own."""
    work = {run.name: run.sample for run in runs}
    interleave(work, WARM_UPS, clock)
    times = interleave(work, rounds, clock)
    first = runs[0]
    return [
        ReuseRow(
            name=run.name,
            full_steps=sum(run.refresh),
            cached_steps=len(run.refresh) - sum(run.refresh),
            blocks=run.blocks,
            macs=run.macs,
            rounds=times[run.name],
            seconds=statistics.median(times[run.name]),
            bound=first.macs / run.macs,
            speedup=statistics.median(a / b for a, b in zip(times[first.name], times[run.name], strict=True)),
        )
        for run in runs
    ]


def table(rows: Sequence[ReuseRow]) -> str:
    """The rows as a Markdown table."""
    columns: dict[str, Callable[[ReuseRow], str]] = {
        "state computed": lambda row: row.name,
        "full": lambda row: f"{row.full_steps}",
        "reused": lambda row: f"{row.cached_steps}",
        "blocks run": lambda row: f"{row.blocks:,}",
        "G MACs": lambda row: f"{row.macs / 1e9:,.1f}",
        "s": lambda row: f"{row.seconds:.2f}",
        "bound": lambda row: f"{row.bound:.3f} x",
        "speed-up": lambda row: f"{row.speedup:.3f} x",
        "of bound": lambda row: f"{row.share:.1%}",
    }
    return aligned(list(columns), [[cell(row) for cell in columns.values()] for row in rows])
