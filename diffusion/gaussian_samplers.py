"""Samplers of the Gaussian diffusion: host tables built once, a handful of tensor operations a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from diffusion.sampling import NoiseFn
from diffusion.schedules import Array

if TYPE_CHECKING:
    from diffusion.gaussian_diffusion import GaussianDiffusion
    from models.contract import TimeConvention


class StepMean:
    """a x_0 + b x with the clean image x_0 that the network predicts.

    x_0 is affine in x and the prediction, and so is the whole, unless x_0 is clipped: two operations do.

    Args:
        process: gives x_0.
        a: (num_timesteps,) float64, by index.
        b: the same.
        clip_denoised: clamp x_0 to [-1, 1].
    """

    def __init__(self, process: GaussianDiffusion, a: Array, b: Array, *, clip_denoised: bool) -> None:
        self._process, self._clip = process, clip_denoised
        by_x, by_prediction = b, a
        if process.prediction == "epsilon" and not clip_denoised:
            by_x = a * process.tables["sqrt_recip_alphas_cumprod"] + b
            by_prediction = -a * process.tables["sqrt_recipm1_alphas_cumprod"]
        self._by_x, self._by_prediction = by_x.tolist(), by_prediction.tolist()

    def __call__(self, x: Tensor, sample: Tensor, index: int) -> Tensor:
        """For x (N, C, H, W) and the raw output (N, output_channels, H, W) there; a new tensor."""
        if self._clip:
            prediction = self._process.pred_xstart(sample, x, index, clip_denoised=True)
        else:
            prediction = self._process.prediction_in(sample, x)
        return torch.add(self._by_x[index] * x, prediction, alpha=self._by_prediction[index])


class AncestralSampler:
    """Draws x_{t-1} from p(x_{t-1} | x_t), from the last index down to 0 (Ho et al., 2020, algorithm 2).

    Attributes:
        times: the network's time of each evaluation.
    """

    def __init__(self, process: GaussianDiffusion, *, clip_denoised: bool, convention: TimeConvention) -> None:
        self.process, self.times = process, process.host_times(convention)[::-1]
        tables = process.tables
        a, b = tables["posterior_mean_coef1"], tables["posterior_mean_coef2"]
        self._mean = StepMean(process, a, b, clip_denoised=clip_denoised)
        small, large = tables["posterior_log_variance_clipped"], tables["log_betas"]
        # A learned variance lies between the two, by a value v from -1 to 1: its root is middle * exp(v * reach)
        fixed = {"fixed_small": small, "fixed_large": tables["log_fixed_large"]}
        middle = fixed.get(process.variance, (large + small) / 2)
        self._middle, self._reach = np.exp(middle / 2).tolist(), ((large - small) / 4).tolist()

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One draw; the last step returns the mean."""
        index = len(self.times) - 1 - i
        sample = sample.to(x.dtype)
        mean, noise = self._mean(x, sample, index), noise_fn(x)
        if index == 0:
            return mean
        if self.process.variance == "learned_range":
            value = sample.narrow(-3, x.shape[-3], x.shape[-3])
            return torch.addcmul(mean, torch.exp(self._reach[index] * value), noise, value=self._middle[index])
        return torch.add(mean, noise, alpha=self._middle[index])


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
        self.eta = eta
        order = slice(None, None, 1 if reverse else -1)
        tables = process.tables
        here, there = tables["alphas_cumprod"], tables["alphas_cumprod_next" if reverse else "alphas_cumprod_prev"]
        # eta is 0 in reverse, where `there` is the noisier level and the second root would be imaginary
        sigma = 0 * here if reverse else eta * np.sqrt((1 - there) / (1 - here)) * np.sqrt(1 - here / there)
        if not (eta >= 0 and (sigma**2 <= 1 - there).all()):
            raise ValueError(f"eta must lie in [0, 1], not {eta}: a step would carry more noise than its end")
        # The share of epsilon = (x / sqrt(abar) - x_0) / sqrt(1 / abar - 1), spread over x_0 and x.
        share = np.sqrt(1 - there - sigma**2) / tables["sqrt_recipm1_alphas_cumprod"]
        a, b = np.sqrt(there) - share, share * tables["sqrt_recip_alphas_cumprod"]
        self._mean = StepMean(process, a, b, clip_denoised=clip_denoised)
        self._sigma = sigma.tolist()
        self.times = process.host_times(convention)[order]
        self._indices = range(len(self.times))[order]

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step to the neighbouring noise level; noise is drawn only if eta is positive."""
        index = self._indices[i]
        moved = self._mean(x, sample.to(x.dtype), index)
        return torch.add(moved, noise_fn(x), alpha=self._sigma[index]) if self.eta else moved
