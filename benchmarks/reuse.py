"""Whole sampling runs that reuse state, timed beside one that never does and beside what their multiply-adds allow."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusion.refresh import every_nth
from torch import Tensor

from benchmarks.report import aligned
from benchmarks.timing import Clock, interleave
from diffusion import PUBLISHED_PROCESS, FlowMatching, ImageNoise, create_diffusion, guided, sample_loop, skip_cache
from diffusion.sampling import Sampler
from models import Network

WARM_UPS = 1
Schedule = tuple[bool, ...]


def _published_as_flow(network: Network) -> bool:
    return PUBLISHED_PROCESS[network.time_convention] == FlowMatching.name


def make_sampler(network: Network, steps: int) -> Sampler:
    """Of the process that the network's family is published with: ancestral, or Euler for a flow.

    Raises:
        ValueError: for a number of steps that it cannot take.
    """
    if _published_as_flow(network):
        return FlowMatching().euler(steps, convention=network.time_convention)
    learn_sigma = network.out_channels == 2 * network.in_channels
    return create_diffusion(str(steps), learn_sigma=learn_sigma).ancestral(convention=network.time_convention)


def make_schedule(network: Network, sampler: Sampler, interval: int) -> Schedule:
    """When state is refreshed: by Skip-Cache's rule, or in a flow every so often (where does not change the cost).

    Raises:
        ValueError: if the network keeps no state, or the interval is below 1.
    """
    if _published_as_flow(network) and network.keeps_state:
        return every_nth(len(sampler.times), interval)
    return skip_cache(network, sampler.times, interval)


def make_runner(
    network: Network, sampler: Sampler, rows: int, device: torch.device, autocast: torch.dtype | None = None
) -> Callable[[Schedule], Tensor]:
    """A function of a refresh schedule that draws `rows` images without guidance, through the one sampling loop."""
    prepared = network.for_sampling(sampler.times)
    shape = (network.in_channels, network.input_size, network.input_size)
    denoise = guided(prepared, torch.arange(rows, device=device) % network.num_classes, None, 1.0)

    def sample(refresh: Schedule) -> Tensor:
        noise = ImageNoise(0, range(rows), shape, device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return sample_loop(denoise, sampler, noise.initial(), refresh, noise)

    return sample


@dataclass(frozen=True)
class Run:
    """One way through all steps of a sampler.

    Attributes:
        name: in tables.
        refresh: one flag per step.
        blocks: blocks that ran, counted.
        multiply_adds: executed, for one image.
    """

    name: str
    refresh: Schedule
    blocks: int
    multiply_adds: int


@dataclass(frozen=True)
class Row:
    """What was measured of one run; `speedup` and `bound` are against the one that refreshes at every step."""

    name: str
    full_steps: int
    cached_steps: int
    blocks: int
    multiply_adds: int
    rounds: list[float]
    seconds: float
    bound: float
    speedup: float

    @property
    def share(self) -> float:
        """How much of the bound was reached."""
        return self.speedup / self.bound


def count_blocks(network: Network, work: Callable[[], object]) -> int:
    """Blocks of a network that run during a piece of work."""
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
    network: Network, sampler: Sampler, intervals: Sequence[int], sample: Callable[[Schedule], Tensor]
) -> list[Run]:
    """A run without reuse, and one for each interval; every one is done once, to count its blocks.

    Raises:
        ValueError: if the network keeps no state, or an interval is below 1.
    """
    runs = []
    for interval in dict.fromkeys((1, *intervals)):
        refresh = make_schedule(network, sampler, interval)
        name = "every step" if interval == 1 else f"N = {interval}"
        blocks = count_blocks(network, partial(sample, refresh))
        runs.append(Run(name, refresh, blocks, network.executed_multiply_adds(refresh)))
    return runs


def measure_runs(runs: Sequence[Run], sample: Callable[[Schedule], Tensor], rounds: int, clock: Clock) -> list[Row]:
    """Times the runs in turn; a speed-up is the median over rounds of the first run's time over a run's own."""
    work = {run.name: partial(sample, run.refresh) for run in runs}
    interleave(work, WARM_UPS, clock)
    times = interleave(work, rounds, clock)
    first = runs[0]
    return [
        Row(
            name=run.name,
            full_steps=sum(run.refresh),
            cached_steps=len(run.refresh) - sum(run.refresh),
            blocks=run.blocks,
            multiply_adds=run.multiply_adds,
            rounds=times[run.name],
            seconds=statistics.median(times[run.name]),
            bound=first.multiply_adds / run.multiply_adds,
            speedup=statistics.median(a / b for a, b in zip(times[first.name], times[run.name], strict=True)),
        )
        for run in runs
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    titles = [
        "state refreshed",
        "full",
        "reused",
        "blocks run",
        "G multiply-adds",
        "s",
        "bound",
        "speed-up",
        "of bound",
    ]
    cells = [
        [
            row.name,
            f"{row.full_steps}",
            f"{row.cached_steps}",
            f"{row.blocks:,}",
            f"{row.multiply_adds / 1e9:,.1f}",
            f"{row.seconds:.2f}",
            f"{row.bound:.3f} x",
            f"{row.speedup:.3f} x",
            f"{row.share:.1%}",
        ]
        for row in rows
    ]
    return aligned(titles, cells, left=1)
