"""Whole sampling runs that reuse state, timed beside one that never does and beside what their multiply-adds allow."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.timing import Clock, interleave
from diffusion import ImageNoise, guided, sample_loop, skip_cache
from diffusion.sampling import Sampler
from models import Network

WARM_UPS = 1
EVERY_STEP = "every step"


@dataclass(frozen=True)
class CachedRun:
    """One way through all steps of a sampler.

    Attributes:
        name: in tables.
        refresh: one flag per step.
        blocks: blocks that ran, counted.
        multiply_adds: executed, for one image.
    """

    name: str
    refresh: tuple[bool, ...]
    blocks: int
    multiply_adds: int


@dataclass(frozen=True)
class CachedRow:
    """What was measured of one way; `speedup` and `bound` are against the run that refreshes at every step."""

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


def make_runner(
    network: Network, sampler: Sampler, rows: int, device: torch.device, autocast: torch.dtype | None = None
) -> Callable[[tuple[bool, ...]], Tensor]:
    """A function of a refresh schedule that draws `rows` images without guidance, through the one sampling loop."""
    prepared = network.for_sampling(sampler.times)
    shape = (network.in_channels, network.input_size, network.input_size)
    denoise = guided(prepared, torch.arange(rows, device=device) % network.num_classes, None, 1.0)

    def sample(refresh: tuple[bool, ...]) -> Tensor:
        noise = ImageNoise(0, range(rows), shape, device)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return sample_loop(denoise, sampler, noise.initial(), refresh, noise)

    return sample


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
    network: Network,
    sampler: Sampler,
    intervals: Sequence[int],
    sample: Callable[[tuple[bool, ...]], Tensor],
) -> list[CachedRun]:
    """A run without reuse, and one for each interval; every one is done once, to count its blocks.

    Raises:
        ValueError: if the network keeps no state, or an interval is below 1.
    """
    always = (True,) * len(sampler.times)
    schedules = {EVERY_STEP: always, **{f"N = {n}": skip_cache(network, sampler.times, n) for n in intervals}}
    runs = []
    for name, refresh in schedules.items():
        blocks = count_blocks(network, partial(sample, refresh))
        runs.append(CachedRun(name, refresh, blocks, network.executed_multiply_adds(refresh)))
    return runs


def measure_runs(
    runs: Sequence[CachedRun], sample: Callable[[tuple[bool, ...]], Tensor], rounds: int, clock: Clock
) -> list[CachedRow]:
    """Times the runs in turn; a speed-up is the median over rounds of the first run's time over a run's own."""
    work = {run.name: partial(sample, run.refresh) for run in runs}
    interleave(work, WARM_UPS, clock)
    times = interleave(work, rounds, clock)
    first = runs[0]
    return [
        CachedRow(
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
