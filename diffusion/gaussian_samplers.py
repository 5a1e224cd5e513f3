"""Samplers of the Gaussian diffusion: host tables built once, a handful of tensor operations a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion, value_in
from diffusion.sampling import NoiseFn
from diffusion.schedules import Array
from models.contract import TimeConvention
from runtime.settings import setting

Steps = str | Sequence[int] | None


class _AffineStep:
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


class _GaussianSampler:
    """Evaluations of a (respaced) process.

    Args:
        process: Process that the network was trained under.
        steps: Step spec, such as "250" or "ddim50", over the original timesteps; None keeps the process as it is.
        start: Leave out this many of the noisiest steps: x starts as `sampler.process.q_sample` at its last index.

    Attributes:
        process: The process on the steps that are taken.
        times: Timestep of each evaluation.

    Raises:
        ValueError: Naming the argument that is malformed or out of range.
    """

    time_convention: ClassVar[TimeConvention] = GaussianDiffusion.time_convention

    def __init__(self, process: GaussianDiffusion, steps: Steps, start: int) -> None:
        process = process if steps is None else process.respaced(steps)
        if not 0 <= start < process.num_timesteps:
            raise ValueError(f"the start must be in 0..{process.num_timesteps - 1}, not {start}")
        self.process = process.restricted(process.timesteps[: process.num_timesteps - start]) if start else process
        self.times = tuple(float(t) for t in reversed(self.process.timesteps))


@dataclass(frozen=True)
class AncestralSettings:
    """Settings of the ancestral sampler, and of every other one of the Gaussian diffusion."""

    clip_denoised: bool | None = setting(
        None, "clamp predicted clean images to [-1, 1]", shown="yes for pixels, no for latents"
    )


class AncestralSampler(_GaussianSampler):
    """Draws x_{t-1} from p(x_{t-1} | x_t), from the last index down to 0 (Ho et al., 2020, algorithm 2)."""

    def __init__(
        self, process: GaussianDiffusion, steps: Steps = None, *, clip_denoised: bool = False, start: int = 0
    ) -> None:
        super().__init__(process, steps, start)
        tables = self.process.tables
        a, b = tables["posterior_mean_coef1"], tables["posterior_mean_coef2"]
        self._mean = _AffineStep(self.process, a, b, clip_denoised=clip_denoised)
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
class DDIMSettings(AncestralSettings):
    """Settings of DDIM."""

    eta: float = setting(0.0, "noise of DDIM: 0 none, 1 as much as DDPM")


class DDIMSampler(_GaussianSampler):
    """Non-Markovian steps between noise levels (Song et al., 2021, arXiv 2010.02502, equation 12), in either direction.

    With x_0 and epsilon both affine in x and the prediction, a step is  x <- a x_0 + b x + sigma noise.
    It is deterministic at eta 0, and as noisy as DDPM at eta 1. In reverse it goes from a sample to the noise that
    would produce it.

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
        clip_denoised: bool = False,
        start: int = 0,
    ) -> None:
        super().__init__(process, steps, start)
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
        self._mean = _AffineStep(self.process, a, b, clip_denoised=clip_denoised)
        self._sigma = sigma.tolist()
        self.times = self.times[::-1] if reverse else self.times
        self._indices = range(len(self.times))[order]

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step to the neighbouring noise level, with noise only if eta is positive."""
        index = self._indices[i]
        mean = self._mean(x, sample.to(x.dtype), index)
        return torch.add(mean, noise_fn(x), alpha=self._sigma[index]) if self.eta else mean


class DPMSolverSampler(_GaussianSampler):
    """DPM-Solver++(2M): the probability-flow ODE in lambda = log(sqrt(abar) / sqrt(1 - abar)), half its log-SNR.

    Between two levels x changes by an exactly integrated linear part and by a clean sample D, extrapolated to the
    midpoint of the step from this evaluation's prediction and the one before:

        x <- sigma'/sigma x + alpha' (1 - exp(-h)) D,    D = x_0 + h / (2 h_before) (x_0 - x_0 before)

    with h the step in lambda. The first step has nothing before it and is of first order. So is the last, with
    infinite h: it returns the predicted clean sample. The levels are those of the process, whatever its step spec.

    Source: Lu et al., 2022 (arXiv 2211.01095), algorithm 2 with the midpoint choice of section 4.
    """

    # Known to be defective. Its numbers stay what they are until that is mended on its own.

    def __init__(
        self, process: GaussianDiffusion, steps: Steps = None, *, clip_denoised: bool = False, start: int = 0
    ) -> None:
        super().__init__(process, steps, start)
        one = np.ones(self.process.num_timesteps)
        self._x_start = _AffineStep(self.process, one, 0 * one, clip_denoised=clip_denoised)
        abar = self.process.tables["alphas_cumprod"][::-1]
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        h = np.diff(np.log(alpha / sigma))
        gain = -alpha[1:] * np.expm1(-h)
        # The share of `gain` that the extrapolation takes from the earlier prediction and adds to this one.
        shifted = gain * np.append(0.0, h[1:] / h[:-1])[: len(h)] / 2
        columns = (np.append(sigma[1:] / sigma[:-1], 0.0), np.append(gain + shifted, 1.0), np.append(-shifted, 0.0))
        self._coefficients = list(zip(*(column.tolist() for column in columns), strict=True))
        self._before: Tensor | None = None

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step, without noise. Evaluation 0 forgets the history of an earlier run."""
        by_x, by_x_start, by_before = self._coefficients[i]
        index = len(self.times) - 1 - i
        x_start = self._x_start(x, sample.to(x.dtype), index)
        before, self._before = (None if i == 0 else self._before), x_start
        first_order = torch.add(by_x * x, x_start, alpha=by_x_start)
        if before is None or not by_before:
            return first_order
        return torch.add(first_order, before, alpha=by_before)
