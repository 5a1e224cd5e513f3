"""Samplers of the Gaussian diffusion: host tables built once, a handful of tensor operations a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffusion.sampling import NoiseFn

if TYPE_CHECKING:
    from diffusion.gaussian_diffusion import GaussianDiffusion
    from models.contract import TimeConvention


class AncestralSampler:
    """Draws x_{t-1} from p(x_{t-1} | x_t), from the last index down to 0 (Ho et al., 2020, algorithm 2).

    Attributes:
        times: the network's time of each evaluation.
    """

    def __init__(self, process: GaussianDiffusion, *, clip_denoised: bool, convention: TimeConvention) -> None:
        self.process, self.clip_denoised = process, clip_denoised
        self.times = process.host_times(convention)[::-1]

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One draw; the last step returns the mean."""
        index = len(self.times) - 1 - i
        sample = sample.to(x.dtype)
        p = self.process.p_mean_variance(sample, x, index, clip_denoised=self.clip_denoised)
        noise = noise_fn(x)
        if index == 0:
            return p.mean
        if isinstance(p.log_variance, Tensor):
            return torch.addcmul(p.mean, torch.exp(0.5 * p.log_variance), noise)
        return torch.add(p.mean, noise, alpha=math.exp(0.5 * p.log_variance))


class DDIMSampler:
    """Non-Markovian steps between noise levels (Song et al., 2021, equation 12), in either direction.

    With x_0 and epsilon both affine in x and the prediction, a step is  x <- a x_0 + b x + sigma noise.

    Attributes:
        times: the network's time of each evaluation.

    Raises:
        ValueError: if eta is negative, or so large that a step would carry more noise than the level it leads to.
    """

    def __init__(
        self,
        process: GaussianDiffusion,
        *,
        eta: float = 0.0,
        clip_denoised: bool,
        convention: TimeConvention,
        reverse: bool = False,
    ) -> None:
        self.process, self.clip_denoised, self.eta = process, clip_denoised, eta
        order = slice(None, None, 1 if reverse else -1)
        tables = process.tables
        here, there = tables["alphas_cumprod"], tables["alphas_cumprod_next" if reverse else "alphas_cumprod_prev"]
        # eta is 0 in reverse, where `there` is the noisier level and the second root would be imaginary
        sigma = 0 * here if reverse else eta * np.sqrt((1 - there) / (1 - here)) * np.sqrt(1 - here / there)
        if not (eta >= 0 and (sigma**2 <= 1 - there).all()):
            raise ValueError(f"eta must lie in [0, 1], not {eta}: a step would carry more noise than its end")
        # The share of epsilon = (x / sqrt(abar) - x_0) / sqrt(1 / abar - 1), spread over x_0 and x.
        share = np.sqrt(1 - there - sigma**2) / tables["sqrt_recipm1_alphas_cumprod"]
        columns = (np.sqrt(there) - share, share * tables["sqrt_recip_alphas_cumprod"], sigma)
        self.times = process.host_times(convention)[order]
        self._indices = range(len(self.times))[order]
        self._coefficients = list(zip(*(column[order].tolist() for column in columns), strict=True))

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step to the neighbouring noise level; noise is drawn only if eta is positive."""
        a, b, sigma = self._coefficients[i]
        sample = sample.to(x.dtype)
        x_start = self.process.pred_xstart(sample, x, self._indices[i], clip_denoised=self.clip_denoised)
        moved = torch.add(b * x, x_start, alpha=a)
        return torch.add(moved, noise_fn(x), alpha=sigma) if self.eta else moved
