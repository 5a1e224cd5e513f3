"""Time grids of the Gaussian diffusion: at which timesteps a sampler evaluates the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from diffusion.schedules import Array, space_timesteps

TimeGrid = Literal["uniform", "trailing", "quadratic", "chebyshev", "logsnr", "karras"]
KARRAS_RHO = 7.0


def half_log_snr(alphas_cumprod: Array) -> Array:
    """Lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio, of any shape."""
    return (np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)) / 2


def interpolated(alphas_cumprod: Array, timesteps: Array) -> Array:
    """Abar at timesteps of a process (T,), between two of them by its logarithm."""
    below = np.floor(timesteps).astype(np.int64)
    above, part = np.minimum(below + 1, len(alphas_cumprod) - 1), timesteps - below
    return alphas_cumprod[below] * (alphas_cumprod[above] / alphas_cumprod[below]) ** part


def time_grid(kind: TimeGrid, steps: str | Sequence[int], alphas_cumprod: Array) -> list[float]:
    """Choose the timesteps of a number of evaluations, ascending and distinct.

    Only "uniform" and "trailing" keep to whole ones.

    Args:
        kind: "uniform" is `space_timesteps`, from 0 to T - 1; "trailing" steps of equal length that begin at T - 1 and
            end before 0 (Lin et al., 2024, arXiv 2305.08891, table 2); "quadratic" squares of equal steps (Song et al.,
            2021, arXiv 2010.02502, appendix D.2); "chebyshev" (1 - cos(pi u)) / 2 of equal steps u, close at
            both ends (the Chebyshev-Lobatto nodes); "logsnr" equal steps in the log-SNR (Lu et al., 2022, arXiv
            2206.00927, section 3.4); "karras" equal steps in sigma / alpha to the power 1 / 7 (Karras et al., 2022,
            arXiv 2206.00364, equation 5). All but "trailing" begin at T - 1 and end at 0.
        steps: Number of evaluations; for "uniform" any step spec.
        alphas_cumprod: (T,) of the original process.

    Raises:
        ValueError: If the kind is unknown, or the number is not 1 to T.
    """
    if kind not in get_args(TimeGrid):
        raise ValueError(f"unknown time grid {kind!r}; choose from {', '.join(get_args(TimeGrid))}")
    total = len(alphas_cumprod)
    if kind == "uniform":
        return [*map(float, space_timesteps(total, steps))]
    if not isinstance(steps, str) or not steps.isdecimal() or not 1 <= int(steps) <= total:
        raise ValueError(f"step spec {steps!r}: the time grid {kind!r} takes a number of evaluations, 1 to {total}")
    count = int(steps)
    if kind == "trailing":
        return [float(round(total * (i + 1) / count) - 1) for i in range(count)]
    part = np.linspace(0, 1, count) if count > 1 else np.ones(1)  # a single evaluation is at the noisiest timestep
    if kind == "quadratic":
        return [float(t) for t in (total - 1) * part**2]
    if kind == "chebyshev":
        return [float(t) for t in (total - 1) * (1 - np.cos(np.pi * part)) / 2]
    noise = -half_log_snr(alphas_cumprod)  # log(sigma / alpha), rising
    if kind == "logsnr":
        levels = noise[0] + part * (noise[-1] - noise[0])
    else:
        low, high = np.exp(noise[[0, -1]] / KARRAS_RHO)
        levels = KARRAS_RHO * np.log(low + part * (high - low))
    return timesteps_of(levels, alphas_cumprod)


def timesteps_of(levels: Array, alphas_cumprod: Array) -> list[float]:
    """Timesteps at which log(sigma / alpha) has these values, ascending, by bisection of the interpolated process."""
    low, high = np.zeros(len(levels)), np.full(len(levels), len(alphas_cumprod) - 1.0)
    for _ in range(64):
        middle = (low + high) / 2
        below = -half_log_snr(interpolated(alphas_cumprod, middle)) < levels
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return [float(t) for t in high]
