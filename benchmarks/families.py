"""Cases of the families that leave work out, at full size, for the GPU report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.cases import random_network
from benchmarks.costs import run_cost
from benchmarks.reuse import reusing_run
from benchmarks.routing import Workload, routing_cases
from benchmarks.sampling import SamplingRun, random_pipeline
from benchmarks.timing import Case
from models import model_config


def family_groups(
    models: tuple[str, str, str], images: int, steps: int, device: torch.device, compiler: str | None
) -> list[tuple[str, Callable[[], list[Case]]]]:
    """Names of groups and makers of their cases: routing, caching and sharing in bf16, in the whole sampling loop.

    Args:
        models: Names of a DyDiT, a Skip-DiT and a DDT.
        images: Images of a batch.
        steps: Steps of a sampler.
        device: Device of all tensors.
        compiler: Backend for the blocks, or None.
    """
    routed, skipping, divided = models
    return [
        ("routing", partial(_routing, routed, images, steps, device, compiler)),
        ("caching", partial(_reuse, skipping, "N", (1, 2, 3, 4), images, steps, device, compiler)),
        ("sharing", partial(_reuse, divided, "R", (1, 4, 10), images, steps, device, compiler)),
    ]


def _routing(model: str, images: int, steps: int, device: torch.device, compiler: str | None) -> list[Case]:
    """About half the work: 5/8 of heads and groups, 3/4 of tokens."""
    part = round(model_config(model).num_heads * 5 / 8)
    workload = Workload(model, None, images, part, part, 0.75)
    return routing_cases(workload, device, steps=steps, autocast=torch.bfloat16, compiler=compiler)


def _reuse(model: str, label: str, intervals: Sequence[int], images: int, steps: int, device: torch.device,
           compiler: str | None) -> list[Case]:  # fmt: skip
    """State computed at every step, and less and less often."""
    network = random_network(model, device)
    pipeline, cases = random_pipeline(network, model), []
    for interval in intervals:
        run = reusing_run(pipeline, steps, min(interval, steps), images, "bf16")
        if compiler is not None:
            run.prepared.network.compile_blocks(compiler)
        macs = run_cost(network, [evaluation.refresh for evaluation in run.prepared.table])
        name = f"{model}, {label} = {interval}"
        prepare = partial(SamplingRun, *run)
        cases.append(Case(name, prepare, SamplingRun.latents, flop=2 * images * macs, images=images, precision="bf16"))
    return cases
