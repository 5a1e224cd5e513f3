"""Samplers of the Gaussian diffusion: host tables built once, a handful of tensor operations a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion, value_in
from diffusion.sampling import NoiseFn
from diffusion.schedules import Array
from diffusion.time_grids import TimeGrid
from models.contract import TimeConvention
from runtime.settings import setting

Steps = str | Sequence[int] | None


class AffineStep:
    """a x_0 + b x with the clean sample x_0 that the network predicts.

    x_0 is affine in x and the prediction, and so is the whole, unless x_0 is clipped: two operations. The coefficients
    a and b are (num_timesteps,) float64, by index; `clip_denoised` clamps x_0 to [-1, 1].
    """

    def __init__(self, process: GaussianDiffusion, a: Array, b: Array, *, clip_denoised: bool) -> None:
        self._process, self._clip = process, clip_denoised
        by_x, by_prediction = b, a
        if not clip_denoised:
            by_x = a * process.tables["x_start_by_x"] + b
            by_prediction = a * process.tables["x_start_by_prediction"]
        self._by_x, self._by_prediction = by_x.tolist(), by_prediction.tolist()

    def __call__(self, x: Tensor, sample: Tensor, index: int) -> Tensor:
        """Apply to x and the raw output there; returns a new tensor."""
        if self._clip:
            prediction = self._process.pred_xstart(sample, x, index, clip_denoised=True)
        else:
            prediction = self._process.prediction_in(sample, x)
        return torch.add(self._by_x[index] * x, prediction, alpha=self._by_prediction[index])


class GaussianSampler:
    """Evaluations of a (respaced) process.

    Args:
        process: Process that the network was trained under.
        steps: Step spec, such as "250" or "ddim50", over the original timesteps; None keeps the process as it is.
        start: Leave out this many of the noisiest steps: x starts as `sampler.process.q_sample` at its last index.
        grid: Time grid; None takes the sampler's own, `default_grid`. It has no effect where `steps` is None.

    Attributes:
        process: The process on the steps that are taken.
        times: Timestep of each evaluation.

    Raises:
        ValueError: Naming the argument that is malformed or out of range.
    """

    time_convention: ClassVar[TimeConvention] = GaussianDiffusion.time_convention
    default_grid: ClassVar[TimeGrid] = "uniform"
    times: tuple[float, ...]

    def __init__(self, process: GaussianDiffusion, steps: Steps, start: int, grid: TimeGrid | None) -> None:
        process = process if steps is None else process.respaced(steps, grid or self.default_grid)
        if not 0 <= start < process.num_timesteps:
            raise ValueError(f"the start must be in 0..{process.num_timesteps - 1}, not {start}")
        self.process = process.restricted(process.timesteps[: process.num_timesteps - start]) if start else process
        self.times = tuple(float(t) for t in reversed(self.process.timesteps))


@dataclass(frozen=True)
class GaussianSamplerSettings:
    """Settings of every sampler of the Gaussian diffusion."""

    clip_denoised: bool | None = setting(
        None, "clamp predicted clean images to [-1, 1]", shown="yes for pixels, no for latents"
    )
    grid: TimeGrid | None = setting(
        None,
        "spacing of the times",
        get_args(TimeGrid),
        flag="--time-grid",
        shown="uniform for ddpm and ddim, logsnr for edm, chebyshev for the others, quadratic at order 3",
    )


class AncestralSampler(GaussianSampler):
    """Draws x_{t-1} from p(x_{t-1} | x_t), from the last index down to 0 (Ho et al., 2020, algorithm 2)."""

    def __init__(
        self,
        process: GaussianDiffusion,
        steps: Steps = None,
        *,
        grid: TimeGrid | None = None,
        clip_denoised: bool = False,
        start: int = 0,
    ) -> None:
        super().__init__(process, steps, start, grid)
        tables = self.process.tables
        a, b = tables["posterior_mean_coef1"], tables["posterior_mean_coef2"]
        self._mean = AffineStep(self.process, a, b, clip_denoised=clip_denoised)
        small, large = tables["posterior_log_variance_clipped"], tables["log_betas"]
        # A learned variance is between the two, by a value v from -1 to 1; its root is midpoint * exp(v * half-range).
        fixed = {"fixed_small": small, "fixed_large": tables["log_fixed_large"]}
        midpoint = fixed.get(process.variance, (large + small) / 2)
        self._midpoint, self._half_range = np.exp(midpoint / 2).tolist(), ((large - small) / 4).tolist()

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step, with noise; the last one returns the mean."""
        index = len(self.times) - 1 - i
        sample = sample.to(x.dtype)
        mean, noise = self._mean(x, sample, index), noise_fn(x)
        if index == 0:
            return mean
        if self.process.variance == "learned_range":
            half_range = torch.exp(self._half_range[index] * value_in(sample, x))
            return torch.addcmul(mean, half_range, noise, value=self._midpoint[index])
        return torch.add(mean, noise, alpha=self._midpoint[index])


@dataclass(frozen=True)
class DDIMSettings(GaussianSamplerSettings):
    """Settings of DDIM."""

    eta: float = setting(0.0, "noise of DDIM: 0 none, 1 as much as DDPM")


class DDIMSampler(GaussianSampler):
    """Non-Markovian steps between noise levels (Song et al., 2021, arXiv 2010.02502, equation 12), in either direction.

    With x_0 and epsilon both affine in x and the prediction, a step is  x <- a x_0 + b x + sigma noise.
    It is deterministic at eta 0. At eta 1 it is as noisy as DDPM, and the same as "Euler ancestral" (k-diffusion). In
    reverse it goes from a sample to the noise that would produce it.

    Raises:
        ValueError: If eta is negative, or so large that a step would carry more noise than the level it leads to.
    """

    def __init__(
        self,
        process: GaussianDiffusion,
        steps: Steps = None,
        *,
        eta: float = 0.0,
        reverse: bool = False,
        grid: TimeGrid | None = None,
        clip_denoised: bool = False,
        start: int = 0,
    ) -> None:
        super().__init__(process, steps, start, grid)
        self.eta = eta
        tables, order = self.process.tables, slice(None, None, 1 if reverse else -1)
        here, there = tables["alphas_cumprod"], tables["alphas_cumprod_next" if reverse else "alphas_cumprod_prev"]
        # eta has no meaning in reverse, where `there` is the noisier level and the second root would be imaginary
        sigma = 0 * here if reverse else eta * np.sqrt((1 - there) / (1 - here)) * np.sqrt(1 - here / there)
        if not (eta >= 0 and (sigma**2 <= 1 - there).all()):
            raise ValueError(f"eta must be in [0, 1], not {eta}: a step would carry more noise than its end")
        # The share of epsilon = (x / sqrt(abar) - x_0) / sqrt(1 / abar - 1), spread over x_0 and x.
        share = np.sqrt(1 - there - sigma**2) / tables["sqrt_recipm1_alphas_cumprod"]
        a, b = np.sqrt(there) - share, share * tables["sqrt_recip_alphas_cumprod"]
        self._mean = AffineStep(self.process, a, b, clip_denoised=clip_denoised)
        self._sigma = sigma.tolist()
        self.times = self.times[::-1] if reverse else self.times
        self._indices = range(len(self.times))[order]

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step to the neighbouring noise level, with noise only if eta is positive."""
        index = self._indices[i]
        mean = self._mean(x, sample.to(x.dtype), index)
        return torch.add(mean, noise_fn(x), alpha=self._sigma[index]) if self.eta else mean


class EDMSampler(GaussianSampler):
    """Heun's method: a DDIM step to predict, a second evaluation there, then the mean of both predictions of the noise.

    It evaluates twice a step, 2 N - 1 times in all: the last step is DDIM's, and returns the predicted clean sample.

    Source: Karras et al., 2022 (arXiv 2206.00364), algorithm 1 without noise, in sigma / alpha.
    """

    default_grid = "logsnr"  # an error in the noise of the first steps is multiplied by their length in sigma / alpha

    def __init__(
        self,
        process: GaussianDiffusion,
        steps: Steps = None,
        *,
        grid: TimeGrid | None = None,
        clip_denoised: bool = False,
        start: int = 0,
    ) -> None:
        super().__init__(process, steps, start, grid)
        self.times = (self.times[0], *(t for t in self.times[1:] for _ in range(2)))
        abar = self.process.tables["alphas_cumprod"]
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        one = np.ones_like(alpha)
        self._x_start = AffineStep(self.process, one, 0 * one, clip_denoised=clip_denoised)
        self._noise = AffineStep(self.process, -alpha / sigma, 1 / sigma, clip_denoised=clip_denoised)
        # To the next level: x <- by_x x + by_noise epsilon
        by_x = np.append(1.0, alpha[:-1]) / alpha
        by_noise = np.append(0.0, sigma[:-1]) - by_x * sigma
        self._by_x, self._by_noise = by_x.tolist(), by_noise.tolist()
        self._begun: tuple[Tensor, Tensor] | None = None  # x and noise at the start of the step

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """Move to the predicted end of a step, or from there to the corrected one."""
        index = self.process.num_timesteps - 1 - (i + 1) // 2  # of the level that x is at
        sample = sample.to(x.dtype)
        if i == len(self.times) - 1:
            return self._x_start(x, sample, index)
        noise = self._noise(x, sample, index)
        if i == 0:
            self._begun = None
        if self._begun is None:
            self._begun = x, noise
            return torch.add(self._by_x[index] * x, noise, alpha=self._by_noise[index])
        (start, first), self._begun = self._begun, None
        return torch.add(self._by_x[index + 1] * start, first + noise, alpha=self._by_noise[index + 1] / 2)
