"""Whole sampling runs that share the encoder, timed beside one that does not and beside what is left to compute."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Clock, interleave
from diffusion import FlowMatching, ImageNoise, guided, sample_loop
from diffusion.refresh import every_nth
from models import Network

WARM_UPS = 1


@dataclass(frozen=True)
class SharedRun:
    """What was measured of one refresh rate; `speedup` and `bound` are against the run that shares nothing.

    Attributes:
        rate: steps to each encoder call.
        encoder_calls: counted in a run.
        evaluations: of the decoder.
        multiply_adds: executed for one image.
        rounds: seconds of each timed run.
        bound: multiply-adds of the unshared run over these.
        speedup: median over rounds of the unshared run's time over this one's.
    """

    rate: int
    encoder_calls: int
    evaluations: int
    multiply_adds: int
    rounds: list[float]
    bound: float
    speedup: float

    @property
    def seconds(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.rounds)

    @property
    def share(self) -> float:
        """How much of the bound was reached."""
        return self.speedup / self.bound


def make_sampling(
    network: Network, steps: int, rows: int, device: torch.device, autocast: torch.dtype | None = None
) -> Callable[[Sequence[bool]], Tensor]:
    """A function of a refresh schedule that draws images through the one sampling loop: Euler, without guidance."""
    sampler = FlowMatching().euler(steps, convention=network.time_convention)
    prepared = network.for_sampling(sampler.times)
    denoise = guided(prepared, torch.arange(rows, device=device) % network.num_classes, None, 1.0)
    start = ImageNoise(0, range(rows), (network.in_channels, network.input_size, network.input_size), device).initial()

    def sample(refresh: Sequence[bool]) -> Tensor:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            return sample_loop(denoise, sampler, start, refresh)

    return sample


def count_encoder_calls(network: Network, work: Callable[[], Any]) -> int:
    """How often the first block runs during a piece of work."""
    calls: list[None] = []
    handle = network.blocks[0].register_forward_hook(lambda *_: calls.append(None))
    try:
        work()
    finally:
        handle.remove()
    return len(calls)


def measure_sharing(
    network: Network, sample: Callable[[Sequence[bool]], Tensor], steps: int, rates: Sequence[int], rounds: int,
    clock: Clock,
) -> list[SharedRun]:  # fmt: skip
    """Times a run without sharing and one for each rate, in turn.

    Args:
        network: whose blocks are watched.
        sample: from `make_sampling`, of the same network.
        steps: of the sampler.
        rates: of uniform refreshing; where a refresh stands does not change what it costs.
        rounds: timed runs of each.
        clock: seconds of one call.

    Raises:
        ValueError: if the network keeps no state, or a rate is below 1.
    """
    if not network.keeps_state:
        raise ValueError("this network keeps nothing between evaluations that could be shared")
    schedules = {rate: every_nth(steps, rate) for rate in dict.fromkeys((1, *rates))}
    work = {str(rate): partial(sample, refresh) for rate, refresh in schedules.items()}
    calls = {rate: count_encoder_calls(network, work[str(rate)]) for rate in schedules}  # a warm-up too
    interleave(work, WARM_UPS, clock)
    times = interleave(work, rounds, clock)
    executed = {rate: network.executed_multiply_adds(refresh) for rate, refresh in schedules.items()}
    return [
        SharedRun(
            rate=rate,
            encoder_calls=calls[rate],
            evaluations=steps,
            multiply_adds=executed[rate],
            rounds=times[str(rate)],
            bound=executed[1] / executed[rate],
            speedup=statistics.median(a / b for a, b in zip(times["1"], times[str(rate)], strict=True)),
        )
        for rate in schedules
    ]


def markdown(runs: Sequence[SharedRun]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| encoder calls | shared | G multiply-adds | s | bound | speed-up | of the bound |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        lines.append(
            f"| {run.encoder_calls} of {run.evaluations} | {1 - run.encoder_calls / run.evaluations:.0%} | "
            f"{run.multiply_adds / 1e9:,.2f} | {run.seconds:.3f} | {run.bound:.2f} x | {run.speedup:.2f} x | "
            f"{run.share:.2f} |"
        )
    return "\n".join(lines)


def as_json(runs: Sequence[SharedRun]) -> list[dict[str, Any]]:
    """The rows of a results file."""
    return [{**dataclasses.asdict(run), "seconds": run.seconds, "share_of_bound": run.share} for run in runs]
