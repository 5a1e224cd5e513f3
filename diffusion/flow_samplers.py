"""One-step samplers of flow matching: times from noise (0) to data (1), a velocity at each, host numbers in between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypedDict, Unpack, get_args

import numpy as np
import torch
from torch import Tensor

from diffusion.flow import FlowMatching
from diffusion.sampling import NoiseFn
from diffusion.schedules import FlowGrid, unit_grid
from models.contract import TimeConvention
from runtime.settings import setting

FlowKind = Literal["ode", "sde", "sde_mean", "sde_preserve"]


def flow_steps(spec: int | str) -> int:
    """Number of steps in a flow's step spec; a ValueError if it is not a positive number."""
    if isinstance(spec, str) and not spec.isdecimal() or int(spec) < 1:
        raise ValueError(f"step spec {spec!r}: a flow is sampled in a number of steps, such as 50")
    return int(spec)


class Spacing(TypedDict, total=False):
    """Arguments of every sampler of flows, as in `FlowSampler`."""

    grid: FlowGrid | None
    shift: float
    last_step: float | None
    start: int


class FlowSampler:
    """Times of a flow's sampler.

    Args:
        process: Process that the network was trained under.
        steps: N, a number or its string.
        shift: Shift of the times, above 1 for more steps near the noise.
        last_step: Length of the last step before the shift; None makes all equally long.
        grid: Spacing of the times before the shift; None takes the sampler's own, `default_grid`.
        start: Leave out this many of the first steps: x starts as `process.q_sample` at `times[0]`.

    Attributes:
        process: The process.
        points: Flow times from the start to 1, one more than steps.
        times: Flow time of each evaluation.

    Raises:
        ValueError: Naming the argument that is out of range.
    """

    time_convention: ClassVar[TimeConvention] = FlowMatching.time_convention
    default_grid: ClassVar[FlowGrid] = "uniform"
    times: tuple[float, ...]

    def __init__(
        self,
        process: FlowMatching,
        steps: int | str,
        shift: float = 1.0,
        last_step: float | None = None,
        grid: FlowGrid | None = None,
        start: int = 0,
    ) -> None:
        points = unit_grid(flow_steps(steps), shift, last_step, grid or self.default_grid)
        if not 0 <= start < len(points) - 1:
            raise ValueError(f"the start must be in 0..{len(points) - 2}, not {start}")
        self.process, self.points = process, points[start:]
        self.times = self.points[:-1]
        self._lengths: list[float] = np.diff(self.points).tolist()

    def _velocity(self, i: int, x: Tensor, sample: Tensor) -> Tensor:
        """Velocity of the raw output of evaluation i, in the dtype of x."""
        return self.process.convert(sample.to(x.dtype), x, self.times[i], "velocity")


@dataclass(frozen=True)
class FlowSamplerSettings:
    """Settings of every sampler of flows."""

    grid: FlowGrid | None = setting(
        None,
        "spacing of the times",
        get_args(FlowGrid),
        flag="--time-grid",
        shown="chebyshev for flow-unipc, uniform for the others",
    )
    shift: float = setting(1.0, "shift of a flow's times, above 1 for more steps near the noise", flag="--time-shift")
    last_step: float | None = setting(None, "length of a flow's last step before the shift", shown="as all others")


@dataclass(frozen=True)
class EulerSettings(FlowSamplerSettings):
    """Settings of the Euler sampler."""

    kind: FlowKind = setting("ode", "the ODE, or a stochastic process instead", flag="--sde")


class EulerSampler(FlowSampler):
    """Euler steps of the flow, or of a stochastic process with the same distribution at every time.

    The score of the linear path is s = (t v - x) / (1 - t). With noise of strength w = 1 - t a step dt adds to v dt

    - "sde": s w dt and noise of variance 2 w dt; "sde_preserve": half of each;
    - "sde_mean": s w dt alone, a drift towards the mode.

    The last step is the flow's own, without noise. Published results of DDT (arXiv 2504.05741) are those of 250 steps
    with a last step of 0.04.

    Source: Ma et al., 2024 (SiT, arXiv 2401.08740), where the diffusion may have any strength.
    """

    def __init__(
        self, process: FlowMatching, steps: int | str, *, kind: FlowKind = "ode", **spacing: Unpack[Spacing]
    ) -> None:
        super().__init__(process, steps, **spacing)
        if kind not in get_args(FlowKind):
            raise ValueError(f"{kind!r} is not one of {', '.join(get_args(FlowKind))}")
        # (drift by the score, variance of the noise), in units of w dt
        drift, variance = {"ode": (0, 0), "sde": (1, 2), "sde_mean": (1, 0), "sde_preserve": (0.5, 1)}[kind]
        # With s w = t v - x, a step is affine in x and v: x <- by_x x + by_velocity v + deviation noise
        self._coefficients = [
            (1 - drift * dt, (1 + drift * t) * dt, math.sqrt(variance * (1 - t) * dt))
            for t, dt in zip(self.times[:-1], self._lengths, strict=False)
        ]
        self._coefficients.append((1.0, self._lengths[-1], 0.0))

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """One step; the stochastic kinds add noise in all but the last."""
        by_x, by_velocity, deviation = self._coefficients[i]
        mean = torch.add(x if by_x == 1 else by_x * x, self._velocity(i, x, sample), alpha=by_velocity)
        return torch.add(mean, noise_fn(x), alpha=deviation) if deviation else mean


@dataclass(frozen=True)
class HeunSettings(FlowSamplerSettings):
    """Settings of the Heun sampler."""

    exact: bool = setting(False, "evaluate twice a step", flag="--heun-exact")


class HeunSampler(FlowSampler):
    """Heun's method: an Euler step to predict, then the mean of both velocities; the last step is Euler's.

    If exact, each predicted point is evaluated for this step alone: 2 N - 1 evaluations. Otherwise its velocity is also
    the first one of the next step: N evaluations.
    """

    def __init__(
        self, process: FlowMatching, steps: int | str, *, exact: bool = False, **spacing: Unpack[Spacing]
    ) -> None:
        super().__init__(process, steps, **spacing)
        self.exact = exact
        self.times = (self.points[0], *(t for t in self.points[1:-1] for _ in range(2 if exact else 1)))
        self._start: tuple[Tensor, Tensor] | None = None  # x and velocity at the start of the current step

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """Move to the point of the next evaluation: the predicted one, or the end of the step."""
        velocity = self._velocity(i, x, sample)
        if i == 0:
            self._start = None
        number = (i + 1) // 2 if self.exact else i  # of the step that starts here, or that was predicted
        if self._start is not None:
            (x, first), dt = self._start, self._lengths[number - 1]
            x, self._start = torch.add(x, first + velocity, alpha=dt / 2), None
            if self.exact:
                return x
        if number < len(self._lengths) - 1:
            self._start = x, velocity
        return torch.add(x, velocity, alpha=self._lengths[number])
