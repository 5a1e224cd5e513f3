"""Multistep solvers of the probability-flow ODE of the Gaussian diffusion: DPM-Solver++, UniPC, DEIS.

With lambda = log(alpha / sigma) the ODE has two exact solutions over a step from lambda_s to lambda_t of length h,

    x_t = sigma_t / sigma_s x_s + alpha_t integral of exp(lambda - lambda_t) x_0(lambda)            (clean samples)
    x_t = alpha_t / alpha_s x_s - sigma_t integral of exp(lambda_t - lambda) epsilon(lambda)        (noise)

A multistep solver puts a polynomial through the last predictions in the place of x_0 or epsilon. Its integral is a
weighted sum of them, so every solver here is a table of host numbers, a row for each step: a factor of x, weights
of the predictions, newest first, and the deviation of the noise of a stochastic solver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from diffusion.gaussian import GaussianDiffusion
from diffusion.gaussian_samplers import AffineStep, GaussianSampler, GaussianSamplerSettings, Steps
from diffusion.sampling import NoiseFn
from diffusion.schedules import Array
from diffusion.time_grids import TimeGrid, half_log_snr
from runtime.settings import setting

MAX_ORDER = 3
Kind = Literal["ode", "sde"]


class Step(NamedTuple):
    """One step: x becomes by_x x + the sum of weights times predictions, newest first, + deviation noise."""

    by_x: float
    weights: tuple[float, ...]
    deviation: float = 0.0


class Levels(NamedTuple):
    """Noise levels of the evaluations, in the order of sampling, (N,) float64 each."""

    alpha: Array
    sigma: Array
    log_snr: Array  # lambda, half the logarithm of the signal-to-noise ratio


@dataclass(frozen=True)
class MultistepSettings(GaussianSamplerSettings):
    """Settings of every multistep solver."""

    order: int = setting(2, "2 or 3; the first and last steps are of lower order", flag="--solver-order")


@dataclass(frozen=True)
class DPMSolverSettings(MultistepSettings):
    """Settings of DPM-Solver++."""

    kind: Kind = setting("ode", "the ODE, or a stochastic process instead", flag="--sde")


class MultistepSampler(GaussianSampler):
    """A solver in the form of a table of steps.

    Subclasses write `row`, and say which predictions it weighs. Few evaluations are best spent at both ends of time: in
    the first step, of first order, all errors are made at once, and near t = 0 the log-SNR changes fastest.

    Args:
        order: Number of predictions that a step extrapolates from, 1 to 3.

    Attributes:
        order: The same.
        table: A `Step` for each evaluation but the last, which returns the predicted clean sample.

    Raises:
        ValueError: If the order is out of range, or above the number of evaluations.
    """

    few_evaluations: tuple[TimeGrid, TimeGrid] = ("chebyshev", "quadratic")  # at order 2, and at order 3
    predicts: Literal["x_start", "epsilon"] = "x_start"

    def __init__(
        self,
        process: GaussianDiffusion,
        steps: Steps = None,
        *,
        order: int = 2,
        grid: TimeGrid | None = None,
        clip_denoised: bool = False,
        start: int = 0,
    ) -> None:
        super().__init__(process, steps, start, grid or self.few_evaluations[order > 2])
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"the solver's order must be in 1..{MAX_ORDER}, not {order}")
        count = len(self.times) + start
        if order > count > 1:
            raise ValueError(f"a solver of order {order} needs at least {order} evaluations, not {count}")
        self.order = order
        tables = self.process.tables
        abar = tables["alphas_cumprod"][::-1]
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        levels = Levels(alpha, sigma, half_log_snr(abar))
        self.table = [self.row(i, levels) for i in range(len(abar) - 1)]
        one, noise = np.ones(len(abar)), (1 / sigma)[::-1]
        self._x_start = AffineStep(self.process, one, 0 * one, clip_denoised=clip_denoised)
        self._predict = self._x_start
        if self.predicts == "epsilon":
            self._predict = AffineStep(self.process, -alpha[::-1] * noise, noise, clip_denoised=clip_denoised)
        self._history: list[Tensor] = []

    def row(self, i: int, levels: Levels) -> Step:
        """Compute the step from level i to the next one."""
        raise NotImplementedError

    def order_at(self, i: int) -> int:
        """Order of the step from level i to the next: as many predictions as there are, and fewer at the end.

        A grid that ends at t = 0 has a last level far from the one before it, and extrapolating over it magnifies
        errors; the step to it is of first order.
        """
        last = len(self.times) - (1 if self.process.timesteps[0] == 0 else 0)
        return max(1, min(self.order, i + 1, last - i))

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step; evaluation 0 forgets the history of an earlier run."""
        index, sample = len(self.times) - 1 - i, sample.to(x.dtype)
        if index == 0:
            return self._x_start(x, sample, 0)
        row, newest = self.table[i], self._predict(x, sample, index)
        earlier = [] if i == 0 else self._history
        self._history = [newest, *earlier][: MAX_ORDER + 1]
        x = row.by_x * x
        for value, weight in zip(self._history, row.weights, strict=False):
            x = torch.add(x, value, alpha=weight)
        return torch.add(x, noise_fn(x), alpha=row.deviation) if row.deviation else x


class DPMSolverSampler(MultistepSampler):
    """DPM-Solver++, multistep, of order 2 ("2M") or 3 ("3M"); order 1 is DDIM.

    Order 2 is the midpoint rule of the paper. Order 3 integrates the polynomial through three predictions exactly. The
    published formula of 3M, and the implementations that follow it, weigh the second difference by half as much, and
    converge with order 2 only; the tests show both.

    The kind "sde" is SDE-DPM-Solver++ (order 1 or 2), which adds noise in all steps but the last.

    Source: Lu et al., 2022 (arXiv 2211.01095), algorithm 2 and appendix.
    """

    def __init__(
        self, process: GaussianDiffusion, steps: Steps = None, *, kind: Kind = "ode", order: int = 2, **settings: object
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"{kind!r} is not one of {', '.join(get_args(Kind))}")
        if kind == "sde" and order > 2:
            raise ValueError(f"the stochastic kind is of order 1 or 2, not {order}")
        self.kind = kind
        super().__init__(process, steps, order=order, **settings)  # type: ignore[arg-type]

    def row(self, i: int, levels: Levels) -> Step:
        """Compute the step from level i to the next one."""
        alpha, sigma, nodes = levels.alpha[i + 1], levels.sigma[i + 1], recent(levels.log_snr, i, self.order_at(i))
        end = levels.log_snr[i + 1]
        if self.kind == "ode":
            return Step(sigma / levels.sigma[i], scaled(alpha, clean_weights(nodes, nodes[0], end)))
        h = end - nodes[0]
        weights = scaled(-math.expm1(-2 * h), midpoint(nodes, h))
        deviation = sigma * math.sqrt(-math.expm1(-2 * h))
        return Step(sigma / levels.sigma[i] * math.exp(-h), scaled(alpha, weights), deviation)


class UniPCSampler(MultistepSampler):
    """UniPC of order 2 or 3: each evaluation also corrects the point that it was made at, at no further cost.

    The predictor is DPM-Solver++'s. The corrector repeats the step that led here, now with the prediction at its end,
    so it is of one order more. Both are linear in the predictions: the correction is a sum of them that is added to x,
    and is part of the row.

    Source: Zhao et al., 2023 (arXiv 2302.04867), with B(h) = exp(h) - 1.
    """

    def row(self, i: int, levels: Levels) -> Step:
        """Compute the step from level i to the next one, after the correction at level i."""
        order, by_x = self.order_at(i), levels.sigma[i + 1] / levels.sigma[i]
        weights = np.zeros(MAX_ORDER + 1)
        nodes = recent(levels.log_snr, i, order)
        weights[:order] = levels.alpha[i + 1] * np.array(clean_weights(nodes, nodes[0], levels.log_snr[i + 1]))
        if i:
            before = self.order_at(i - 1)
            nodes = recent(levels.log_snr, i, before + 1)
            predicted = clean_weights(nodes[1:], nodes[1], nodes[0])
            corrected = clean_weights(nodes, nodes[1], nodes[0])
            weights[: before + 1] += by_x * levels.alpha[i] * (np.array(corrected) - np.array([0.0, *predicted]))
        return Step(by_x, tuple(weights.tolist()))


class DEISSampler(MultistepSampler):
    """DEIS of order 2 or 3: the polynomial goes through predictions of the noise.

    Source: Zhang and Chen, 2023 (arXiv 2204.13902), tAB-DEIS with the polynomial in lambda.
    """

    few_evaluations = ("chebyshev", "chebyshev")
    predicts = "epsilon"

    def row(self, i: int, levels: Levels) -> Step:
        """Compute the step from level i to the next one."""
        nodes, end = recent(levels.log_snr, i, self.order_at(i)), levels.log_snr[i + 1]
        weights = exponential_weights(nodes, nodes[0], end, rate=-1.0)
        return Step(levels.alpha[i + 1] / levels.alpha[i], scaled(-levels.sigma[i + 1], weights))


def recent(levels: Array, i: int, count: int) -> list[float]:
    """Levels i, i - 1, ..., as many as `count`."""
    return [float(level) for level in levels[i - count + 1 : i + 1][::-1]]


def scaled(factor: float, weights: Sequence[float]) -> tuple[float, ...]:
    """Multiply weights by a number."""
    return tuple(float(factor * weight) for weight in weights)


def midpoint(nodes: Sequence[float], h: float) -> list[float]:
    """Weights of the prediction at the middle of a step of length h, extrapolated from one or two nodes."""
    if len(nodes) == 1:
        return [1.0]
    share = h / (nodes[0] - nodes[1]) / 2
    return [1 + share, -share]


def clean_weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Weights of clean samples at nodes in the integral of exp(lambda - end) x_0 from `start` to `end`.

    Two nodes follow the midpoint rule of the papers, which is exact to second order.
    """
    if len(nodes) != 2:
        return exponential_weights(nodes, start, end, rate=1.0)
    gain, middle = -math.expm1(start - end), (start + end) / 2
    share = (middle - nodes[0]) / (nodes[0] - nodes[1])
    return [gain * (1 + share), -gain * share]


def exponential_weights(nodes: Sequence[float], start: float, end: float, rate: float) -> list[float]:
    """Weights of values at nodes in the integral of exp(rate (lambda - end)) p(lambda) from `start` to `end`.

    p is the polynomial through the values. Gauss-Legendre quadrature of 16 points is exact to float64 for the steps
    that a solver takes (at most 20 in lambda).
    """
    points, shares = np.polynomial.legendre.leggauss(16)
    at = start + (points + 1) * (end - start) / 2
    kernel = shares * (end - start) / 2 * np.exp(rate * (at - end))
    basis = [
        math.prod((at - other) / (node - other) for k, other in enumerate(nodes) if k != j) * np.ones_like(at)
        for j, node in enumerate(nodes)
    ]
    return [float(kernel @ values) for values in basis]
