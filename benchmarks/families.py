"""Every family's way of leaving work out, at full size: cases for the GPU report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.cases import filled_network
from benchmarks.reuse import make_runner, make_sampler, make_schedule
from benchmarks.routing import Share, routing_cases
from benchmarks.timing import Case
from models import family_of

BF16 = torch.bfloat16


def family_groups(
    size: str, images: int, steps: int, device: torch.device, compiler: str | None
) -> list[tuple[str, Callable[[], list[Case]]]]:
    """Names of groups and what makes their cases: routing, caching and sharing in bf16, in the whole sampling loop.

    Args:
        size: behind the family in a model's name, such as "XL/2".
        images: of a batch.
        steps: of a sampler.
        device: where to compute.
        compiler: backend for the blocks, or None.
    """
    return [
        ("routing", partial(_routing, f"DyDiT-{size}", images, steps, device, compiler)),
        ("caching", partial(_reuse, f"Skip-DiT-{size}", "N", (1, 2, 3, 4), images, steps, device, compiler)),
        ("sharing", partial(_reuse, f"DDT-{size}", "R", (1, 4, 10), images, steps, device, compiler)),
    ]


def _routing(model: str, images: int, steps: int, device: torch.device, compiler: str | None) -> list[Case]:
    """About half the work: 5/8 of heads and groups, 3/4 of tokens."""
    config = family_of(model).configs[model]
    part = round(config["num_heads"] * 5 / 8)
    share = Share(model, None, images, part, part, 0.75)
    return routing_cases(share, device, steps=steps, autocast=BF16, compiler=compiler)


def _reuse(model: str, label: str, intervals: Sequence[int], images: int, steps: int, device: torch.device,
           compiler: str | None) -> list[Case]:  # fmt: skip
    """State computed at every step, and less and less often."""
    network = filled_network(model, device)
    if compiler is not None:
        network.compile_blocks(compiler)
    sampler = make_sampler(network, steps)
    sample = make_runner(network, sampler, images, device, BF16)
    schedules = {n: make_schedule(network, sampler, n) for n in intervals}
    return [
        Case(
            f"{model}, {label} = {n}",
            lambda: sample,
            lambda sample, refresh=refresh: sample(refresh),  # type: ignore[misc]  # bound now
            flop=2 * images * network.executed_multiply_adds(refresh),
            images=images,
            precision="bf16",
        )
        for n, refresh in schedules.items()
    ]
