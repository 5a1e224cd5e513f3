"""The sampling loop, guidance, and noise that belongs to an image.

There is one loop, and it knows neither families nor samplers nor accelerators: a sampler says at which times the
network is evaluated and how a raw output moves x, `guided` says what is evaluated, `refresh` says when state that the
network handed out is thrown away. All decisions come from host numbers; the loop never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from runtime.seeds import image_seed

if TYPE_CHECKING:
    from models.contract import ModelOutput

NoiseFn = Callable[[Tensor], Tensor]
StepHook = Callable[[int, Tensor, "ModelOutput"], None]


class Denoise(Protocol):
    """A network with its labels and guidance bound."""

    def __call__(self, x: Tensor, t: float | Tensor, state: Any = None, /) -> ModelOutput:
        """Evaluates at x (N, C, H, W) and time t, reusing `state` unless it is None."""
        ...


class Sampler(Protocol):
    """Where to evaluate, and how to move."""

    times: tuple[float, ...]
    """One host number per network evaluation, in the network's units."""

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """Moves x (N, C, H, W) after evaluation i; returns a new tensor. Stochastic ones call `noise_fn` once."""
        ...


@torch.no_grad()
def sample_loop(
    denoise: Denoise,
    sampler: Sampler,
    x: Tensor,
    refresh: Sequence[bool] | None = None,
    noise_fn: NoiseFn = torch.randn_like,
    on_step: StepHook | None = None,
) -> Tensor:
    """Carries x through all evaluations of a sampler.

    Args:
        denoise: from `guided`, or any network bound to its labels.
        sampler: such as `create_diffusion("250").ancestral()`.
        x: (N, C, H, W) float32 starting noise (for a reverse sampler: images).
        refresh: one flag per evaluation, whether kept state is recomputed; the first must be True. None: always.
        noise_fn: gives noise like x, called once a step in order by stochastic samplers.
        on_step: called as on_step(i, x, out) after each step.

    Returns:
        (N, C, H, W) float32.

    Raises:
        ValueError: if `refresh` does not fit the sampler.
    """
    check_refresh(refresh, len(sampler.times))
    state = None
    for i, t in enumerate(sampler.times):
        if refresh is None or refresh[i]:
            state = None
        out = denoise(x, t, state)
        state = out.state
        x = sampler.step(i, x, out.sample, noise_fn)
        if on_step is not None:
            on_step(i, x, out)
    return x


def check_refresh(refresh: Sequence[bool] | None, evaluations: int) -> None:
    """Refuses a refresh schedule of another length, or one that starts with nothing to reuse.

    Raises:
        ValueError: saying which.
    """
    if refresh is None:
        return
    if len(refresh) != evaluations:
        raise ValueError(f"the refresh schedule has {len(refresh)} flags for {evaluations} evaluations")
    if evaluations and not refresh[0]:
        raise ValueError("the first evaluation of a refresh schedule must be a refresh: there is no state to reuse")


def guided(
    network: Callable[..., ModelOutput],
    y: Tensor,
    y_null: Tensor | int | None,
    scale: float,
    channels: int | None = None,
    interval: tuple[float, float] | None = None,
    times: Sequence[float] | None = None,
    refresh: Sequence[bool] | None = None,
    always_both: bool = False,
) -> Denoise:
    """Binds labels and classifier-free guidance (Ho and Salimans, 2022) to a network: the only place that doubles rows.

    Guided channels become null + scale * (conditional - null); all others keep the conditional values.

    Args:
        network: anything with the contract's forward.
        y: (N,) int64 labels.
        y_null: the null class, as a number or an (N,) tensor; not used at scale 1.
        scale: 1 is the plain conditional forward, evaluated on N rows.
        channels: how many leading channels of x are guided; None guides all. 3 reproduces the official DiT releases.
        interval: guide only at times strictly between these bounds, compared in float32 (Kynkaanniemi et al., 2024).
        times: the sampler's times; needed with an interval.
        refresh: the refresh schedule in use, if any. State made on N rows cannot serve 2 N rows, so within a reuse
            window (a refresh up to the next) both halves run if any evaluation of the window is guided.
        always_both: run both halves whatever the interval, so that all states are of the same rows.

    Returns:
        A `Denoise` of N rows whose `state` belongs to the rows that were evaluated.

    Raises:
        ValueError: if an interval is empty or comes without times, or guidance without a null class.
    """
    if scale == 1:
        return lambda x, t, state=None, /: network(x, t, y, state)
    if y_null is None:
        raise ValueError(f"guidance scale {scale} needs a null class")
    if interval is not None and not interval[0] < interval[1]:
        raise ValueError(f"the guidance interval ({interval[0]:g}, {interval[1]:g}) is empty")
    if interval is not None and times is None:
        raise ValueError("a guidance interval needs the sampler's times")
    both_halves = None if interval is None or always_both else _halves_by_evaluation(times or (), interval, refresh)

    def runs_both(t: float | Tensor, fresh: bool) -> bool:
        if both_halves is None:
            return True
        if isinstance(t, Tensor) or (t, fresh) not in both_halves:
            raise ValueError(f"guidance with an interval was prepared for the sampler's own times, not for {t}")
        return both_halves[t, fresh]

    labels = torch.cat([y, torch.as_tensor(y_null, device=y.device).expand_as(y)])

    def denoise(x: Tensor, t: float | Tensor, state: Any = None, /) -> ModelOutput:
        if not runs_both(t, state is None):
            return network(x, t, y, state)
        rows = torch.cat([t, t]) if isinstance(t, Tensor) else t
        out = network(torch.cat([x, x]), rows, labels, state)
        if interval is not None and not _inside(float(t), interval):
            return out._replace(sample=out.sample[: len(x)])
        conditional, null = out.sample.to(x.dtype).chunk(2)  # a scale multiplies half-precision rounding
        count = x.shape[-3] if channels is None else min(channels, x.shape[-3])
        kept = conditional.narrow(-3, count, conditional.shape[-3] - count)
        conditional, null = conditional.narrow(-3, 0, count), null.narrow(-3, 0, count)
        mixed = torch.add(null, conditional - null, alpha=scale)
        return out._replace(sample=torch.cat([mixed, kept], dim=-3) if kept.shape[-3] else mixed)

    return denoise


def _inside(t: float, interval: tuple[float, float]) -> bool:
    """Strict bounds in float32: the arithmetic of the released samplers decides about evaluations on a bound."""
    low, high = (np.float32(bound) for bound in interval)
    return bool(low < np.float32(t) < high)


def _halves_by_evaluation(
    times: Sequence[float], interval: tuple[float, float], refresh: Sequence[bool] | None
) -> dict[tuple[float, bool], bool]:
    """Whether both halves run, by (time, does the evaluation start from nothing).

    The pair tells evaluations apart even where a sampler visits a time twice in a row: of two visits either one is the
    refresh, or both lie in the same window, or each is a window of its own with the same time.
    """
    check_refresh(refresh, len(times))
    fresh = [True] * len(times) if refresh is None else list(refresh)
    starts = [i for i, flag in enumerate(fresh) if flag] + [len(times)]
    halves: dict[tuple[float, bool], bool] = {}
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        both = any(_inside(t, interval) for t in times[start:stop])
        for i in range(start, stop):
            halves[times[i], fresh[i]] = both
            # A network that keeps no state starts every evaluation from nothing, whatever the schedule says.
            halves.setdefault((times[i], True), _inside(times[i], interval))
    return halves


class ImageNoise:
    """Noise of numbered images: image i gets the same numbers in any batch, on any rank, at any world size.

    Draws come from a generator of the image's own, on the device of the samples, several steps at a time.

    Args:
        seed: of the whole job.
        indices: absolute image numbers of this batch, each in [0, 2^32).
        shape: (C, H, W) of one image.
        device: where x lives. CPU and CUDA generators give different numbers.
    """

    STEPS_PER_DRAW = 16  # part of the format: another number would deal the same generator's numbers out differently

    def __init__(
        self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        device = torch.device(device)
        self._generators = [torch.Generator(device).manual_seed(image_seed(seed, i)) for i in indices]
        self._buffer = torch.empty(len(indices), self.STEPS_PER_DRAW, *shape, device=device)
        self._used = self.STEPS_PER_DRAW

    def initial(self) -> Tensor:
        """The starting noise x_T, (N, C, H, W) float32; to be called first, and once."""
        shape = self._buffer.shape[2:]
        return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in self._generators])

    def __call__(self, x: Tensor) -> Tensor:
        """The next step's noise, like x, valid until the next call; a `noise_fn` for `sample_loop`."""
        if self._used == self.STEPS_PER_DRAW:
            for row, generator in zip(self._buffer, self._generators, strict=True):
                row.normal_(generator=generator)
            self._used = 0
        self._used += 1
        return self._buffer[:, self._used - 1]
