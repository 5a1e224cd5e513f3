"""Every family's way of leaving work out, at full size: cases for the GPU report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.caching import make_runner
from benchmarks.cases import filled_network
from benchmarks.routing import Share, routing_cases
from benchmarks.sharing import make_sampling
from benchmarks.timing import Case
from diffusion import create_diffusion, skip_cache
from diffusion.refresh import every_nth
from models import Network, family_of

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
        ("caching", partial(_caching, f"Skip-DiT-{size}", images, steps, device, compiler)),
        ("sharing", partial(_sharing, f"DDT-{size}", images, steps, device, compiler)),
    ]


def _routing(model: str, images: int, steps: int, device: torch.device, compiler: str | None) -> list[Case]:
    """About half the work: 5/8 of heads and groups, 3/4 of tokens."""
    config = family_of(model).configs[model]
    part = round(config["num_heads"] * 5 / 8)
    share = Share(model, None, images, part, part, 0.75)
    return routing_cases(share, device, steps=steps, autocast=BF16, compiler=compiler)


def _caching(model: str, images: int, steps: int, device: torch.device, compiler: str | None) -> list[Case]:
    """Skip-Cache's intervals 1 to 4."""
    network = _network(model, device, compiler)
    process = create_diffusion(str(steps), learn_sigma=network.out_channels == 2 * network.in_channels)
    sampler = process.ancestral(convention=network.time_convention)
    sample = make_runner(network, sampler, images, device, BF16)
    schedules = {f"{model}, N = {n}": skip_cache(network, sampler.times, n) for n in (1, 2, 3, 4)}
    return _reuse(network, sample, schedules, images)


def _sharing(model: str, images: int, steps: int, device: torch.device, compiler: str | None) -> list[Case]:
    """All of the encoder's calls, a quarter and a tenth."""
    network = _network(model, device, compiler)
    sample = make_sampling(network, steps, images, device, BF16)
    schedules = {f"{model}, an encoder call in {rate}": every_nth(steps, rate) for rate in (1, 4, 10)}
    return _reuse(network, sample, schedules, images)


def _network(model: str, device: torch.device, compiler: str | None) -> Network:
    network = filled_network(model, device)
    if compiler is not None:
        network.compile_blocks(compiler)
    return network


def _reuse(
    network: Network, sample: Callable[..., Any], schedules: Mapping[str, Sequence[bool]], images: int
) -> list[Case]:
    return [
        Case(
            name,
            lambda: sample,
            lambda sample, refresh=tuple(refresh): sample(refresh),  # type: ignore[misc]  # bound now
            flop=2 * images * network.executed_multiply_adds(refresh),
            images=images,
            precision="bf16",
        )
        for name, refresh in schedules.items()
    ]
