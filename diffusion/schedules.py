"""Schedules and times: betas, respacing, time shifts and conversions. Float64 on the host, or tensors as given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from models.contract import TimeConvention

Array = npt.NDArray[np.float64]
Time = TypeVar("Time", float, Tensor, float | Tensor)
FlowGrid = Literal["uniform", "chebyshev"]

BETA_SCHEDULES = ("linear", "squaredcos_cap_v2")
TIME_CONVENTIONS = get_args(TimeConvention)


def named_betas(name: str, num_timesteps: int) -> Array:
    """Betas of a named schedule that scales with the number of timesteps, (T,) float64 in (0, 1].

    Args:
        name: "linear" (Ho et al., 2020; endpoints 1e-4 and 2e-2 at 1000 steps, scaled by 1000 / T) or
            "squaredcos_cap_v2" (Nichol and Dhariwal, 2021, section 3.2, capped at 0.999).
        num_timesteps: T.

    Raises:
        ValueError: For an unknown name, or a T at which "linear" leaves (0, 1] (T < 20).
    """
    if name == "linear":
        scale = 1000 / num_timesteps
        betas = np.linspace(scale * 1e-4, scale * 2e-2, num_timesteps, dtype=np.float64)
    elif name == "squaredcos_cap_v2":
        edges = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - edges[1:] / edges[:-1], 0.999)
    else:
        raise ValueError(f"unknown noise schedule {name!r}; known: {', '.join(BETA_SCHEDULES)}")
    if not ((betas > 0) & (betas <= 1)).all():
        raise ValueError(f"betas must be in (0, 1], but range over [{betas.min():.4g}, {betas.max():.4g}]")
    return betas


def gaussian_tables(betas: Array) -> dict[str, Array]:
    """Coefficients of a Gaussian process, (T,) float64 each. Names as in the papers' code; abar: `alphas_cumprod`."""
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    # The first posterior variance is 0, so its logarithm is taken from the second. A single step has no second one
    # (the official code fails there), and beta is the only variance at hand.
    second = posterior_variance[1] if len(betas) > 1 else betas[0]
    return {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "alphas_cumprod_next": np.append(alphas_cumprod[1:], 0.0),
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": np.log(np.append(second, posterior_variance[1:])),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
        "log_betas": np.log(betas),
        "log_fixed_large": np.log(np.append(second, betas[1:])),
    }


def space_timesteps(num_timesteps: int, spec: str | Sequence[int]) -> list[int]:
    """Choose the timesteps of a shorter process, ascending and distinct.

    Args:
        num_timesteps: Length of the original process.
        spec: "ddimN" for N steps at one fixed stride from 0 (Song et al., 2021); or counts per equal section, as
            "250", "10,15,20" or a sequence of numbers (Nichol and Dhariwal, 2021); "" keeps everything.

    Raises:
        ValueError: If the spec is malformed or asks for more steps than there are.
    """
    if spec == "":
        return list(range(num_timesteps))
    if isinstance(spec, str) and spec.startswith("ddim"):
        return _fixed_stride(num_timesteps, spec)
    counts = _integers(spec.split(",") if isinstance(spec, str) else spec, spec)
    if not counts or min(counts) < 0 or sum(counts) == 0:
        raise ValueError(f"step spec {spec!r} keeps no timestep; give a positive count such as '250'")

    size, larger = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < larger)
        if count > length:
            raise ValueError(f"step spec {spec!r} asks for {count} of the {length} timesteps of section {section + 1}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            # Summing up and rounding half to even are part of the format: i * stride or half-up keep other indices.
            kept.append(start + round(position))
            position += stride
        start += length
    return kept


def _fixed_stride(num_timesteps: int, spec: str) -> list[int]:
    (count,) = _integers([spec.removeprefix("ddim")], spec)
    for stride in range(1, num_timesteps):
        if len(range(0, num_timesteps, stride)) == count:
            return list(range(0, num_timesteps, stride))
    raise ValueError(f"step spec {spec!r}: no integer stride through {num_timesteps} timesteps makes {count} steps")


def _integers(texts: Sequence[str | int], spec: str | Sequence[int]) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise ValueError(f"step spec {spec!r} is not understood; examples: '250', '10,15,20', 'ddim50'") from None


def shift_time(t: Time, shift: float) -> Time:
    """Move flow time towards noise: t / (t + (1 - t) * shift), with 0 = noise and 1 = data.

    Args:
        t: In [0, 1].
        shift: Positive. 1 leaves t as it is; above 1, more of the steps are near the noise.

    Source: Esser et al., 2024 (arXiv 2403.03206), section 5.3.2, written for data at 1.
    """
    return t / (t + (1 - t) * shift)


def unit_grid(
    num_steps: int, shift: float = 1.0, last_step: float | None = None, kind: FlowGrid = "uniform"
) -> tuple[float, ...]:
    """Flow times from noise to data: `num_steps` starts, then 1; all shifted.

    Args:
        num_steps: N.
        shift: Shift of all times.
        last_step: Length of the last step before the shift; None, or a single step, makes all steps equally long.
        kind: "uniform", equal steps; or "chebyshev", (1 - cos(pi u)) / 2 of equal steps u, close at both ends.

    Returns:
        N + 1 times, the first 0 and the last 1.

    Raises:
        ValueError: Naming the argument that is out of range.
    """
    if num_steps < 1:
        raise ValueError(f"the number of steps must be at least 1, not {num_steps}")
    check_shift(shift)
    if kind not in get_args(FlowGrid):
        raise ValueError(f"unknown time grid {kind!r} of a flow; choose from {', '.join(get_args(FlowGrid))}")
    if kind == "chebyshev" and last_step is not None:
        raise ValueError(f"a last step of {last_step} needs equal steps before it: the uniform grid")
    if last_step is None or num_steps == 1:
        last_step = 1 / num_steps
    elif not 0 < last_step < 1:
        raise ValueError(f"the last step must be in (0, 1), not {last_step}")
    starts = np.linspace(0, 1 - last_step, num_steps)
    if kind == "chebyshev":
        starts = (1 - np.cos(np.pi * starts)) / 2
    return tuple(shift_time(t, shift) for t in (*starts.tolist(), 1.0))


def check_shift(shift: float) -> None:
    """Raise a ValueError unless the shift of flow times is positive and finite."""
    if not 0 < shift < float("inf"):
        raise ValueError(f"the time shift must be positive and finite, not {shift}")


def convert_time(t: Time, source: TimeConvention, target: TimeConvention) -> Time:
    """Convert a time between conventions: "index" is 0..999 with 0 = clean, "unit" has 0 = noise and 1 = data.

    `t` itself is returned where the conventions agree.

    Raises:
        ValueError: For an unknown convention.
    """
    for convention in (source, target):
        if convention not in TIME_CONVENTIONS:
            raise ValueError(f"unknown time convention {convention!r}; known: {', '.join(TIME_CONVENTIONS)}")
    if source == target:
        return t
    return 1 - t / 1000 if target == "unit" else 1000 * (1 - t)


def append_dims(coefficients: Time, x: Tensor) -> Time:
    """Let coefficients of rows broadcast over x: (N,) becomes (N, 1, ..., 1) of the rank of x; a number stays one."""
    if isinstance(coefficients, Tensor):
        return coefficients.view(-1, *(1,) * (x.ndim - 1))
    return coefficients
