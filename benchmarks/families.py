"""Cases of the families that leave work out, at full size, for the GPU report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.reuse import reuse_case, reuse_runs
from benchmarks.routing import Workload, routing_cases
from benchmarks.sampling import random_pipeline
from benchmarks.timing import Case
from models import model_config


def family_groups(
    models: tuple[str, str, str, str, str], images: int, steps: int, device: torch.device, compiler: str | None
) -> dict[str, Callable[[], list[Case]]]:
    """Makers of cases of a DyDiT, Skip-DiT, DDT, Skip-Latte and Skip-LatteT2V by group; all in bf16, in whole loops."""
    routed, skipping, divided, moving, texts = models
    clips = max(1, images // model_config(moving).sample_shape[0])  # of as many frames as there are images

    def routing() -> list[Case]:
        part = round(model_config(routed).num_heads * 5 / 8)  # with 3/4 of the tokens about half the work
        workload = Workload(routed, None, images, part, part, 0.75)
        return routing_cases(workload, device, steps=steps, autocast=torch.bfloat16, compiler=compiler)

    def reuse(model: str, intervals: Sequence[int], images: int = images) -> list[Case]:
        pipeline = random_pipeline(model, device, compiler)
        runs = reuse_runs(pipeline, steps, intervals, images, "bf16")
        return [reuse_case(f"{model}, {name}", run) for name, run in runs.items()]

    return {
        "caching": partial(reuse, skipping, (1, 2, 3, 4)),
        "sharing": partial(reuse, divided, (1, 4, 10)),
        "routing": routing,
        "clips": partial(reuse, moving, (1, 2, 3, 4), clips),
        "text": partial(reuse, texts, (1, 2, 3, 4), clips),
    }
