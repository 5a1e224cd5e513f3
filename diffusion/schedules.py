"""Schedules: betas, which timesteps to keep, how to shift time. Functions of numbers, in float64 on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

if TYPE_CHECKING:
    from models.contract import TimeConvention

Array = npt.NDArray[np.float64]
Time = TypeVar("Time", float, Tensor)

BETA_SCHEDULES = ("linear", "squaredcos_cap_v2")


def named_betas(name: str, num_timesteps: int) -> Array:
    """Betas of a named schedule that scales with the number of timesteps.

    Args:
        name: "linear" (Ho et al., 2020, endpoints 1e-4 and 2e-2 at 1000 steps, scaled by 1000 / T) or
            "squaredcos_cap_v2" (Nichol and Dhariwal, 2021, section 3.2, capped at 0.999).
        num_timesteps: T.

    Returns:
        (T,) float64 in (0, 1].

    Raises:
        ValueError: for an unknown name, or a T at which "linear" leaves (0, 1] (T < 20).
    """
    if name == "linear":
        scale = 1000 / num_timesteps
        return _valid(np.linspace(scale * 1e-4, scale * 2e-2, num_timesteps, dtype=np.float64))
    if name == "squaredcos_cap_v2":
        edges = np.cos((np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
        return _valid(np.minimum(1 - edges[1:] / edges[:-1], 0.999))
    raise ValueError(f"unknown noise schedule {name!r}; known: {', '.join(BETA_SCHEDULES)}")


def endpoint_betas(name: str, start: float, end: float, num_timesteps: int) -> Array:
    """Betas of the older schedules, which are given by their endpoints.

    Args:
        name: "quad", "linear", "warmup10", "warmup50", "const" or "jsd".
        start: first beta (where the schedule has one of its own).
        end: last beta.
        num_timesteps: T.

    Returns:
        (T,) float64 in (0, 1].

    Raises:
        ValueError: for an unknown name or betas outside (0, 1].
    """
    if name == "quad":
        betas = np.linspace(start**0.5, end**0.5, num_timesteps, dtype=np.float64) ** 2
    elif name == "linear":
        betas = np.linspace(start, end, num_timesteps, dtype=np.float64)
    elif name in ("warmup10", "warmup50"):
        rising = int(num_timesteps * int(name[-2:]) / 100)
        betas = np.full(num_timesteps, end, dtype=np.float64)
        betas[:rising] = np.linspace(start, end, rising, dtype=np.float64)
    elif name == "const":
        betas = np.full(num_timesteps, end, dtype=np.float64)
    elif name == "jsd":
        betas = 1.0 / np.arange(num_timesteps, 0, -1, dtype=np.float64)
    else:
        raise ValueError(f"unknown noise schedule {name!r}; known: quad, linear, warmup10, warmup50, const, jsd")
    return _valid(betas)


def _valid(betas: Array) -> Array:
    if not ((betas > 0) & (betas <= 1)).all():
        raise ValueError(f"betas must lie in (0, 1], but range over [{betas.min():.4g}, {betas.max():.4g}]")
    return betas


def space_timesteps(num_timesteps: int, spec: str | Sequence[int]) -> list[int]:
    """Chooses the timesteps of a shorter process.

    Args:
        num_timesteps: length of the original process.
        spec: "ddimN" for N steps at one fixed stride from 0 (Song et al., 2021); or counts per equal section, as
            "250", "10,15,20" or a sequence of numbers (Nichol and Dhariwal, 2021); "" keeps everything.

    Returns:
        The kept indices, ascending, distinct.

    Raises:
        ValueError: naming the spec, if it cannot be met.
    """
    if isinstance(spec, str):
        if spec == "":
            return list(range(num_timesteps))
        if spec.startswith("ddim"):
            return _fixed_stride(num_timesteps, spec)
        counts = _integers(spec.split(","), spec)
    else:
        counts = _integers(spec, spec)
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
    (wanted,) = _integers([spec.removeprefix("ddim")], spec)
    for stride in range(1, num_timesteps):
        if len(range(0, num_timesteps, stride)) == wanted:
            return list(range(0, num_timesteps, stride))
    raise ValueError(f"step spec {spec!r}: no integer stride through {num_timesteps} timesteps makes {wanted} steps")


def _integers(texts: Sequence[str | int], spec: str | Sequence[int]) -> list[int]:
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise ValueError(f"step spec {spec!r} is not understood; examples: '250', '10,15,20', 'ddim50'") from None


def shift_time(t: Time, shift: float) -> Time:
    """Moves unit time towards noise: t / (t + (1 - t) * shift), with 0 = noise and 1 = data.

    Args:
        t: in [0, 1].
        shift: positive; 1 leaves t alone; above 1, more of the steps are spent near the noise.

    Source: Esser et al., 2024 (arXiv 2403.03206), section 5.3.2, written for data at 1.
    """
    return t / (t + (1 - t) * shift)


def unit_grid(num_steps: int, shift: float = 1.0, last_step: float | None = None) -> tuple[float, ...]:
    """Unit times from noise to data: `num_steps` starts at equal distances, then 1; all moved by `shift_time`.

    Args:
        num_steps: N.
        shift: of time.
        last_step: length of the last step before the shift; None, or a single step, makes all steps equally long.

    Returns:
        N + 1 times, the first 0 and the last 1.

    Raises:
        ValueError: naming the number that makes no grid.
    """
    if num_steps < 1:
        raise ValueError(f"the number of steps must be at least 1, not {num_steps}")
    if not 0 < shift < float("inf"):
        raise ValueError(f"the time shift must be positive and finite, not {shift}")
    if last_step is None or num_steps == 1:
        last_step = 1 / num_steps
    elif not 0 < last_step < 1:
        raise ValueError(f"the last step must lie in (0, 1), not {last_step}")
    starts = np.linspace(0, 1 - last_step, num_steps).tolist()
    return tuple(shift_time(t, shift) for t in (*starts, 1.0))


def unit_to_network(t: Time, convention: TimeConvention) -> Time:
    """Says a unit time (0 = noise, 1 = data) in a network's units ("index": 1000 (1 - t), 0 = clean).

    Raises:
        ValueError: for an unknown convention.
    """
    if convention == "unit":
        return t
    if convention == "index":
        return 1000 * (1 - t)
    raise ValueError(f"unknown time convention {convention!r}; known: index, unit")


def index_to_network(index: Time, convention: TimeConvention) -> Time:
    """Says a time on the index scale (0..999, 0 = clean) in a network's units ("unit": 0 = noise, 1 = data).

    Raises:
        ValueError: for an unknown convention.
    """
    if convention == "index":
        return index
    if convention == "unit":
        return 1 - index / 1000
    raise ValueError(f"unknown time convention {convention!r}; known: index, unit")


def network_to_index(time: float, convention: TimeConvention) -> float:
    """Says a network's time on the index scale (0..999, 0 = clean).

    A unit time is a rounded number, and rules on the index scale have bounds that times stand on: the result is rounded
    to a millionth, so that an index which was said in units comes back as it was.

    Raises:
        ValueError: for an unknown convention.
    """
    if convention == "index":
        return time
    if convention == "unit":
        return round(1000 * (1 - time), 6)
    raise ValueError(f"unknown time convention {convention!r}; known: index, unit")
