"""Start from an image, and keep a part of it: image-to-image and inpainting, with every sampler."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.flow import FlowMatching
from diffusion.sampling import Sampler, StepHook
from diffusion.solver_table import TableSampler
from models import ModelOutput


class Edit(NamedTuple):
    """Images that sampling starts from.

    Attributes:
        clean: (N, ..., h, w) latents of the images.
        mask: 1 where it is made anew and 0 where it is kept, for broadcasting with `clean`; None: anew everywhere.
    """

    clean: Tensor
    mask: Tensor | None = None

    def start(self, sampler: Sampler, noise: Tensor) -> Tensor:
        """The images with as much noise as the sampler's first evaluation expects."""
        return noised(sampler, 0, self.clean, noise)

    def keep(self, sampler: Sampler, noise: Tensor, on_step: StepHook | None) -> StepHook | None:
        """Hook that puts back what is kept after every step, at its noise level; then calls another."""
        mask = self.mask
        if mask is None:
            return on_step

        def hook(i: int, x: Tensor, out: ModelOutput) -> Tensor:
            last = i + 1 == len(sampler.times)
            kept = self.clean if last else noised(sampler, i + 1, self.clean, noise)
            x = torch.lerp(kept, x, mask)
            replaced = None if on_step is None else on_step(i, x, out)
            return x if replaced is None else replaced

        return hook


def noised(sampler: Sampler, i: int, clean: Tensor, noise: Tensor) -> Tensor:
    """Clean latents with the noise level of evaluation i."""
    alpha, sigma = level(sampler, i)
    return alpha * clean + sigma * noise


def level(sampler: Sampler, i: int) -> tuple[float, float]:
    """(alpha, sigma) at evaluation i, of x = alpha clean + sigma noise."""
    if isinstance(sampler, TableSampler):
        return sampler.table.levels[i]
    process = getattr(sampler, "process", None)
    if isinstance(process, FlowMatching):
        return sampler.times[i], 1 - sampler.times[i]
    abar = float(process.tables["alphas_cumprod"][process.timesteps.index(sampler.times[i])])  # type: ignore[union-attr]
    return abar**0.5, (1 - abar) ** 0.5
