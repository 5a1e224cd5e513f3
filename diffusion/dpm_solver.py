"""DPM-Solver++(2M): a deterministic second-order sampler, good pictures in about 20 evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian_samplers import StepMean
from diffusion.sampling import NoiseFn

if TYPE_CHECKING:
    from diffusion.gaussian_diffusion import GaussianDiffusion
    from models.contract import TimeConvention


class DPMSolverSampler:
    """Integrates the probability-flow ODE in lambda = log(sqrt(abar) / sqrt(1 - abar)), half its log-SNR.

    Between two levels x moves by an exactly integrated linear part and by a clean image D, extrapolated to the middle
    of the step from this evaluation's prediction and the one before:

        x <- sigma'/sigma x + alpha' (1 - exp(-h)) D,    D = x_0 + h / (2 h_before) (x_0 - x_0 before)

    with h the step in lambda. The first step has nothing before it and is of first order, and so is the last, whose h
    is infinite: it returns the predicted clean image. The levels are those of the process, whatever its step spec.

    Source: Lu et al., 2022 (arXiv 2211.01095), algorithm 2 with the midpoint choice of section 4.

    Attributes:
        times: the network's time of each evaluation.
    """

    def __init__(self, process: GaussianDiffusion, *, clip_denoised: bool, convention: TimeConvention) -> None:
        self.times = process.host_times(convention)[::-1]
        one = np.ones(process.num_timesteps)
        self._x_start = StepMean(process, one, 0 * one, clip_denoised=clip_denoised)
        abar = process.tables["alphas_cumprod"][::-1]
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        h = np.diff(np.log(alpha / sigma))
        gain = -alpha[1:] * np.expm1(-h)
        # The share of `gain` that the extrapolation moves from the earlier prediction onto this one.
        moved = gain * np.append(0.0, h[1:] / h[:-1])[: len(h)] / 2
        columns = (np.append(sigma[1:] / sigma[:-1], 0.0), np.append(gain + moved, 1.0), np.append(-moved, 0.0))
        self._coefficients = list(zip(*(column.tolist() for column in columns), strict=True))
        self._before: Tensor | None = None

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step towards the data; draws nothing. Evaluation 0 forgets what an earlier run left behind."""
        by_x, by_x_start, by_before = self._coefficients[i]
        index = len(self.times) - 1 - i
        x_start = self._x_start(x, sample.to(x.dtype), index)
        before, self._before = (None if i == 0 else self._before), x_start
        moved = torch.add(by_x * x, x_start, alpha=by_x_start)
        return moved if before is None or not by_before else torch.add(moved, before, alpha=by_before)
