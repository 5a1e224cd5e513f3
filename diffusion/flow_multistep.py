"""Multistep samplers of flow matching: Adams-Bashforth, and UniPC, which corrects it.

A step adds a weighted sum of the last velocities: the integral of the polynomial in time through them. The weights are
host numbers, made once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from diffusion.flow import FlowMatching
from diffusion.flow_samplers import FlowSampler, FlowSamplerSettings, Spacing, flow_steps
from diffusion.sampling import NoiseFn
from runtime.settings import setting

MAX_ADAMS_ORDER, MAX_UNIPC_ORDER = 4, 3


@dataclass(frozen=True)
class AdamsSettings(FlowSamplerSettings):
    """Settings of the Adams-Bashforth sampler."""

    order: int = setting(2, "number of velocities that a step uses, 1 to 4", flag="--adams-order")


class AdamsSampler(FlowSampler):
    """Adams-Bashforth: the velocities of the last evaluations, extrapolated over the step by a polynomial in time.

    The first steps have fewer earlier velocities, and a lower order. For 5 to 12 evaluations, order 2 with a shift of 2
    is best in the few-step results of arXiv 2504.05741.

    Args:
        order: Number of velocities that a step uses, 1 to 4.
        in_log_snr: Extrapolate in the logarithm of the signal-to-noise ratio instead of in time.

    Attributes:
        order: The same.
        weights: Weights of the velocities of each step, oldest first; they sum to 1.
    """

    weights: list[tuple[float, ...]]

    def __init__(
        self,
        process: FlowMatching,
        steps: int | str,
        *,
        order: int = 2,
        in_log_snr: bool = False,
        **spacing: Unpack[Spacing],
    ) -> None:
        super().__init__(process, steps, **spacing)
        if not 1 <= order <= MAX_ADAMS_ORDER:
            raise ValueError(f"the order must be in 1..{MAX_ADAMS_ORDER}, not {order}")
        self.order = order
        nodes = [log_snr(t) for t in self.points] if in_log_snr else list(self.points)
        self.weights = [
            adams_weights(nodes[i + 1 - self.order_at(i) : i + 1], nodes[i + 1]) for i in range(len(self.times))
        ]
        self._history: list[Tensor] = []

    def order_at(self, i: int) -> int:
        """Order of step i: as many velocities as there are."""
        return min(self.order, i + 1)

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step from the remembered velocities."""
        weights = self.weights[i]
        earlier = self._history[len(self._history) + 1 - len(weights) :]  # none at i = 0
        self._history = [*earlier, self._velocity(i, x, sample)]
        for velocity, weight in zip(self._history, weights, strict=True):
            x = torch.add(x, velocity, alpha=weight * self._lengths[i])
        return x


@dataclass(frozen=True)
class FlowUniPCSettings(FlowSamplerSettings):
    """Settings of UniPC on a flow."""

    order: int = setting(2, "2 or 3; the first and last steps are of lower order", flag="--solver-order")


class FlowUniPCSampler(AdamsSampler):
    """UniPC of order 2 or 3 on velocities: each evaluation also corrects the point that it was made at.

    The predictor is Adams-Bashforth's step. The corrector repeats the step that led here, now with the velocity at its
    end, so it is of one order more, and takes no evaluation. Both are linear in the velocities: the correction is a sum
    of them that the next step adds, and is part of its weights.

    Source: Zhao et al., 2023 (arXiv 2302.04867). Its exponential integrator for clean samples is not used: on the
    straight path of a flow the velocity changes less than the clean sample, and errors are three times as large.

    Args:
        order: Order of the predictor, 1 to 3.
    """

    default_grid = "chebyshev"

    def __init__(self, process: FlowMatching, steps: int | str, *, order: int = 2, **spacing: Unpack[Spacing]) -> None:
        count = flow_steps(steps)
        if not 1 <= order <= MAX_UNIPC_ORDER:
            raise ValueError(f"the solver's order must be in 1..{MAX_UNIPC_ORDER}, not {order}")
        if order > count > 1:
            raise ValueError(f"a solver of order {order} needs at least {order} evaluations, not {count}")
        self._dense_end = (spacing.get("grid") or self.default_grid) == "chebyshev"
        super().__init__(process, steps, order=order, **spacing)
        self.weights = [self._corrected(i) for i in range(len(self.times))]

    def order_at(self, i: int) -> int:
        """Order of the predictor in step i; nothing corrects the last one, which is of first order if it is short."""
        order = super().order_at(i)
        return min(order, len(self.times) - i) if self._dense_end else order

    def _corrected(self, i: int) -> tuple[float, ...]:
        """Weights of the step from point i with the correction of that point, in units of the step's length."""
        predictor = self.weights[i]
        if i == 0:
            return predictor
        before = self.weights[i - 1]
        nodes = self.points[i - len(before) : i + 1]
        corrector = mean_weights(nodes, nodes[-2], nodes[-1])
        weights = np.zeros(max(len(predictor), len(corrector)))
        weights[-len(corrector) :] = self._lengths[i - 1] / self._lengths[i] * (np.array(corrector) - [*before, 0.0])
        weights[-len(predictor) :] += predictor
        return tuple(weights.tolist())


def adams_weights(nodes: Sequence[float], end: float) -> tuple[float, ...]:
    """Weights of values at ascending nodes in the mean, from the last node to `end`, of the polynomial through them."""
    return mean_weights(nodes, nodes[-1], end)


def mean_weights(nodes: Sequence[float], start: float, end: float) -> tuple[float, ...]:
    """Weights of values at nodes in the mean from `start` to `end`, which is above, of the polynomial through them.

    Nodes are distinct. The weights are exact but for rounding, and sum to 1.
    """
    # Distances from the start in units of the step: antiderivatives at absolute times would cancel.
    places = (np.asarray(nodes, dtype=np.float64) - start) / (end - start)
    weights = []
    for j, place in enumerate(places):
        others = np.delete(places, j)
        basis = np.poly1d(others, r=True) / np.prod(place - others)
        weights.append(float(np.polyint(basis)(1.0)))
    return tuple(weight / sum(weights) for weight in weights)


def log_snr(t: float) -> float:
    """Logarithm of t / (1 - t), kept finite at both ends as the released samplers do."""
    return math.log(max(t, 1e-3) / (1 - t + 1e-3))
