"""Guidance: a second prediction, how it is mixed with the first, and the scale of every evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion.sampling import Evaluation, Model
from diffusion.schedules import convert_time
from models.contract import Conditioning, ModelOutput, NetworkLike, State, TimeConvention

Guidance = Literal["cfg", "autoguidance", "cfg-zero-star"]
ScaleSchedule = Literal["constant", "linear", "cosine"]
Mix = Callable[[Tensor, Tensor, float], Tensor]
ZERO_SHARE = 0.04  # of the evaluations, in which CFG-Zero* leaves x as it is


def linear(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """Second + scale * (first - second), of tensors of one shape."""
    return torch.add(second, first - second, alpha=scale)


def zero_star(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """The same with the multiple of `second` (N, ..., C, H, W) that is closest to `first`, in each row.

    Source: Fan et al., 2025 (CFG-Zero*, arXiv 2503.18886), equation 7.
    """
    rows = tuple(range(1, first.ndim))
    share = (first * second).sum(rows, keepdim=True) / (second.square().sum(rows, keepdim=True) + 1e-8)
    return linear(first, share * second, scale)


def zero_init(table: Sequence[Evaluation]) -> tuple[Evaluation, ...]:
    """Let the first evaluations of a flow, 4 % to the nearest number, be velocities of zero, as in CFG-Zero*."""
    count = round(ZERO_SHARE * len(table))
    rows = [row._replace(scale=0.0, guided=False) for row in table[:count]]
    return (*rows, *(row._replace(refresh=row.refresh or i == 0) for i, row in enumerate(table[count:])))


def scheduled(kind: ScaleSchedule, scale: float, times: Sequence[float], convention: TimeConvention) -> list[float]:
    """Guidance scales of evaluations.

    "linear" and "cosine" rise from 1 at the noise to 2 scale - 1 at the image; over all times their mean is the scale.

    Source: Wang et al., 2024 (arXiv 2404.13040).

    Raises:
        ValueError: For an unknown kind.
    """
    if kind not in get_args(ScaleSchedule):
        raise ValueError(f"unknown schedule {kind!r}; choose from {', '.join(get_args(ScaleSchedule))}")
    passed = [min(max(convert_time(t, convention, "unit"), 0.0), 1.0) for t in times]  # 0 noise, 1 image
    if kind == "constant":
        return [scale] * len(passed)
    return [1 + (scale - 1) * (2 * u if kind == "linear" else 1 - math.cos(math.pi * u)) for u in passed]


class Guide:
    """A weaker network with its conditioning bound, for `guided`.

    Args:
        network: The network.
        conditioning: N rows.
    """

    def __init__(self, network: NetworkLike, conditioning: Conditioning) -> None:
        self._network, self._conditioning = network, conditioning
        self.time_convention: TimeConvention = network.time_convention

    def __call__(self, x: Tensor, t: float | Tensor, *, state: State = None) -> ModelOutput:
        """Evaluate N rows."""
        return self._network(x, t, state=state, **self._conditioning)


class Guided:
    """A network with its conditioning and guidance bound, from `guided`.

    Attributes:
        time_convention: Of the evaluations' times; None takes them as they are.
    """

    def __init__(
        self,
        network: Model,
        cond: Conditioning,
        second: Conditioning | Model | None,
        times: TimeConvention | None,
        channels: int | None,
        mix: Mix,
    ) -> None:
        self._network, self._cond, self._channels, self._mix_rows = network, dict(cond), channels, mix
        self._second = second if callable(second) else None
        # Conditioning of [conditional; unconditional] rows
        self._both = None if second is None or callable(second) else _doubled(cond, second)
        self._convention: TimeConvention | None = getattr(network, "time_convention", times)
        self.time_convention = self._convention if times is None else times

    def __call__(self, x: Tensor, evaluation: Evaluation, state: State = None, /) -> ModelOutput:
        """Evaluate at x (N, ..., C, H, W).

        Returns:
            Output of N rows; its `state` belongs to all rows that were evaluated.

        Raises:
            ValueError: If the evaluation is a forecast, or guided without anything to guide by.
        """
        t, scale = evaluation.t, evaluation.scale
        if scale == 0 and not evaluation.guided:
            return ModelOutput(torch.zeros_like(x))
        if not evaluation.call:
            raise ValueError(f"evaluation at {t} does not call the network: it needs a forecast")
        if not evaluation.guided:
            return self._network(x, self._time(t, self._network), state=state, **self._cond)
        if self._both is not None:
            rows = torch.cat([t, t]) if isinstance(t, Tensor) else t
            out = self._network(torch.cat([x, x]), self._time(rows, self._network), state=state, **self._both)
            first, second = out.sample.chunk(2)
            return out._replace(sample=self._mix(x, first, second, scale))
        if self._second is None:
            raise ValueError(f"guidance scale {scale:g} needs unconditional rows or a second network")
        of_first, of_second = (None, None) if state is None else state
        out = self._network(x, self._time(t, self._network), state=of_first, **self._cond)
        other = self._second(x, self._time(t, self._second), state=of_second)
        kept = None if out.state is None and other.state is None else (out.state, other.state)
        return out._replace(sample=self._mix(x, out.sample, other.sample, scale), state=kept)

    def _mix(self, x: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
        """Guided channels of two outputs, and the first one's values on all others."""
        if scale == 1:
            return first
        first, second = first.to(x.dtype), second.to(x.dtype)  # a scale multiplies half-precision rounding
        channels, count = first.shape[-3], x.shape[-3]
        if self._channels is not None:
            count = min(self._channels, count)
        if count == channels:
            return self._mix_rows(first, second, scale)
        first, kept = first.split([count, channels - count], dim=-3)
        return torch.cat([self._mix_rows(first, second.narrow(-3, 0, count), scale), kept], dim=-3)

    def _time(self, t: float | Tensor, network: object) -> float | Tensor:
        """An evaluation's time in the units of one of the networks."""
        target = getattr(network, "time_convention", self._convention)
        if self.time_convention is None or target is None:
            return t
        return convert_time(t, self.time_convention, target)


def guided(
    network: Model,
    cond: Conditioning,
    second: Conditioning | Model | None = None,
    *,
    times: TimeConvention | None = None,
    channels: int | None = None,
    mix: Mix | None = None,
) -> Guided:
    """Bind conditioning and guidance to a network: the only place that doubles rows.

    Guided channels become second + scale * (first - second), or another `mix`, with the scale of each evaluation.

    Args:
        network: A network, or any function with its signature. If it has no `time_convention`, it takes process times.
        cond: Conditioning of N rows.
        second: The unconditional rows, for classifier-free guidance (Ho and Salimans, 2022, arXiv 2207.12598): the same
            network is evaluated once on [conditional; unconditional] rows. Or another network with its conditioning
            bound, called as second(x, t, state=state), for autoguidance (Karras et al., 2024, arXiv 2406.02507); its
            times are those of `network` unless it has a `time_convention`. None: the runs have no guided evaluation.
        times: Convention of the process's times, such as `sampler.time_convention`; None: the network's own.
        channels: Guide only this many leading channels of x; None guides all. 3 is that of the official DiT releases.
        mix: Function of both outputs and the scale; None for `linear`.

    Raises:
        ValueError: If the network does not take this conditioning, or the unconditional rows do not fit it.
    """
    names = getattr(network, "conditioning", None)
    unknown = [] if names is None else [name for name in cond if name not in names]
    if unknown:
        takes = f"takes {', '.join(names)}" if names else "takes none"
        raise ValueError(f"the network has no conditioning {', '.join(map(repr, unknown))}; it {takes}")
    return Guided(network, cond, second, times, channels, mix or linear)


def _doubled(cond: Conditioning, second: Conditioning) -> dict[str, Tensor]:
    """Conditioning of the rows [conditional; unconditional]."""
    if cond.keys() != second.keys():
        raise ValueError(f"the unconditional rows have {sorted(second)}, the conditional ones {sorted(cond)}")
    for name, value in cond.items():
        if second[name].shape != value.shape:
            raise ValueError(
                f"the unconditional rows of {name!r} have shape {tuple(second[name].shape)}, "
                f"the conditional ones {tuple(value.shape)}"
            )
    return {name: torch.cat([value, second[name]]) for name, value in cond.items()}
