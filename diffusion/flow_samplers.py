"""Samplers of flow matching: times from noise (0) to data (1), a velocity at each, host numbers alone in between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from diffusion.sampling import NoiseFn
from diffusion.schedules import unit_to_network

if TYPE_CHECKING:
    from models.contract import TimeConvention

Kind = Literal["ode", "sde", "sde_mean", "sde_preserve"]
MAX_ORDER = 4


class EulerSampler:
    """Euler steps of the flow, or of a stochastic process with the same distribution at every time.

    The score of the linear path is s = (t v - x) / (1 - t). With noise of strength w = 1 - t a step dt adds to v dt

    - "sde": s w dt and noise of variance 2 w dt; "sde_preserve": half of each;
    - "sde_mean": s w dt alone, which pulls towards the mode.

    The last step is the flow's own, without noise.

    Attributes:
        grid: N + 1 unit times.
        times: the network's time of each evaluation.

    Raises:
        ValueError: for an unknown kind.

    Source: Ma et al., 2024 (SiT, arXiv 2401.08740), whose diffusion may have any strength.
    """

    def __init__(self, grid: Sequence[float], *, kind: Kind = "ode", convention: TimeConvention) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"{kind!r} is none of {', '.join(get_args(Kind))}")
        self.grid, self.times = tuple(grid), _network_times(grid[:-1], convention)
        # (pull of the score, variance of the noise), in units of w dt
        pull, variance = {"ode": (0, 0), "sde": (1, 2), "sde_mean": (1, 0), "sde_preserve": (0.5, 1)}[kind]
        # With s w = t v - x, a step is affine in x and v: x <- x_share x + v_share v + deviation noise
        self._coefficients = [
            (1 - pull * dt, (1 + pull * t) * dt, math.sqrt(variance * (1 - t) * dt))
            for t, dt in zip(grid[:-2], np.diff(grid).tolist(), strict=False)
        ]
        self._coefficients.append((1.0, grid[-1] - grid[-2], 0.0))

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step; the stochastic kinds draw noise in all but the last."""
        x_share, v_share, deviation = self._coefficients[i]
        moved = torch.add(x if x_share == 1 else x_share * x, _velocity(sample, x), alpha=v_share)
        return torch.add(moved, noise_fn(x), alpha=deviation) if deviation else moved


class HeunSampler:
    """Heun's method: an Euler step to look ahead, then the mean of both velocities; the last step is Euler's.

    Exact, each look ahead costs an evaluation of its own: 2 N - 1 in all. Otherwise the velocity found there serves as
    the first of the next step: N in all.

    Attributes:
        grid: N + 1 unit times.
        times: the network's time of each evaluation.
    """

    def __init__(self, grid: Sequence[float], *, exact: bool = False, convention: TimeConvention) -> None:
        self.grid, self.exact = tuple(grid), exact
        visits = [t for t in grid[1:-1] for _ in range(2 if exact else 1)]
        self.times = _network_times([grid[0], *visits], convention)
        self._lengths = np.diff(grid).tolist()
        self._start: tuple[Tensor, Tensor] | None = None  # x and velocity where the step under way began

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """Moves to where the next velocity is wanted: ahead, or to the end of the step."""
        velocity = _velocity(sample, x)
        if i == 0:
            self._start = None
        number = (i + 1) // 2 if self.exact else i  # of the step that begins here, or before the look ahead
        if self._start is not None:
            (x, first), dt = self._start, self._lengths[number - 1]
            x, self._start = torch.add(x, first + velocity, alpha=dt / 2), None
            if self.exact:
                return x
        if number < len(self._lengths) - 1:
            self._start = x, velocity
        return torch.add(x, velocity, alpha=self._lengths[number])


class AdamsSampler:
    """Adams-Bashforth: the velocities of the last evaluations, extrapolated over the step by a polynomial in time.

    The first steps have fewer velocities behind them, and a lower order.

    Attributes:
        grid: N + 1 unit times.
        times: the network's time of each evaluation.
        weights: of the velocities of each step, oldest first; they sum to 1.

    Raises:
        ValueError: for an order outside 1..4.
    """

    def __init__(
        self, grid: Sequence[float], *, order: int = 2, in_log_snr: bool = False, convention: TimeConvention
    ) -> None:
        if not 1 <= order <= MAX_ORDER:
            raise ValueError(f"the order must lie in 1..{MAX_ORDER}, not {order}")
        self.grid, self.times = tuple(grid), _network_times(grid[:-1], convention)
        nodes = [log_snr(t) for t in grid] if in_log_snr else list(grid)
        self._lengths = np.diff(grid).tolist()
        self.weights = [adams_weights(nodes[max(0, i + 1 - order) : i + 1], nodes[i + 1]) for i in range(len(grid) - 1)]
        self._history: list[Tensor] = []

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step from the velocities that are remembered."""
        weights = self.weights[i]
        earlier = self._history[len(self._history) + 1 - len(weights) :]  # none at i = 0
        self._history = [*earlier, _velocity(sample, x)]
        for velocity, weight in zip(self._history, weights, strict=True):
            x = torch.add(x, velocity, alpha=weight * self._lengths[i])
        return x


def adams_weights(nodes: Sequence[float], end: float) -> tuple[float, ...]:
    """Shares of values at nodes in the mean, from the last node to `end`, of the polynomial through them.

    Args:
        nodes: distinct and ascending.
        end: beyond the last one.

    Returns:
        One weight per node, exact but for rounding; they sum to 1.
    """
    # Measured from the last node in units of the step: antiderivatives at absolute times would cancel.
    places = (np.asarray(nodes, dtype=np.float64) - nodes[-1]) / (end - nodes[-1])
    weights = []
    for j, place in enumerate(places):
        others = np.delete(places, j)
        basis = np.poly1d(others, r=True) / np.prod(place - others)
        weights.append(float(np.polyint(basis)(1.0)))
    return tuple(weight / sum(weights) for weight in weights)


def log_snr(t: float) -> float:
    """Logarithm of t / (1 - t), kept finite at both ends as the released samplers do."""
    return math.log(max(t, 1e-3) / (1 - t + 1e-3))


def _network_times(times: Sequence[float], convention: TimeConvention) -> tuple[float, ...]:
    return tuple(unit_to_network(t, convention) for t in times)


def _velocity(sample: Tensor, x: Tensor) -> Tensor:
    """A raw output in the dtype of x.

    Raises:
        ValueError: if it is no velocity of x.
    """
    if sample.shape != x.shape:  # other channels might still broadcast
        raise ValueError(f"the network puts out {tuple(sample.shape)}; a velocity of x is {tuple(x.shape)}")
    return sample.to(x.dtype)
