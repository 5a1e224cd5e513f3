"""The sampling loop, its table of evaluations, reuse of state, and noise that belongs to an image.

There is one loop. It knows no family, sampler or accelerator: a sampler has the times of the evaluations and moves x by
a raw output; the table (`evaluations`) has the guidance scale of each and what it may reuse; `diffusion.guidance`
evaluates the network. All of it is host numbers made before the run, so the loop never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from models.contract import ModelOutput, State, TimeConvention
from runtime.devices import float64_device
from runtime.seeds import image_seed

NoiseFn = Callable[[Tensor], Tensor]
Model = Callable[..., ModelOutput]  # called as model(x, t, state=state, **conditioning)
StepHook = Callable[[int, Tensor, ModelOutput], Tensor | None]


class Evaluation(NamedTuple):
    """One row of a sampling run: what happens before step i of the sampler.

    Attributes:
        t: Process time, a host number (or (N,), which samplers do not use).
        scale: Guidance scale; 1 is the plain conditional output, and 0 without `guided` an output of zeros.
        guided: The unconditional rows are evaluated too.
        refresh: State is computed anew, instead of reused.
        call: The network is called at all; False is a forecast.
    """

    t: float | Tensor
    scale: float = 1.0
    guided: bool = False
    refresh: bool = True
    call: bool = True


class Denoiser(Protocol):
    """A network with its conditioning and guidance bound."""

    def __call__(self, x: Tensor, evaluation: Evaluation, state: State = None, /) -> ModelOutput:
        """Evaluate at x (N, ..., C, H, W), reusing `state` unless it is None."""


class Sampler(Protocol):
    """Times of the evaluations, and how each moves x."""

    times: tuple[float, ...]
    """One host number per network evaluation, in the process's time."""

    @property
    def time_convention(self) -> TimeConvention:
        """The process's."""

    def step(self, i: int, x: Tensor, sample: Tensor, noise_fn: NoiseFn) -> Tensor:
        """Move x after evaluation i; returns a new tensor. Stochastic samplers call `noise_fn` once."""


def evaluations(
    times: Sequence[float],
    scale: float | Sequence[float] = 1.0,
    interval: tuple[float, float] | None = None,
    refresh: Sequence[bool] | None = None,
    *,
    always_both: bool = False,
) -> tuple[Evaluation, ...]:
    """Make the table of a sampling run.

    Args:
        times: The sampler's.
        scale: Guidance scale, or one for each time; at 1 the unconditional rows are never evaluated.
        interval: Guide only at process times strictly between these bounds, in either order (Kynkaanniemi et al., 2024,
            arXiv 2404.07724); the scale is 1 outside.
        refresh: One flag per evaluation, whether state is computed anew; the first must be True. None: always.
        always_both: Evaluate the unconditional rows outside the interval too, so that all states have the same rows.

    Raises:
        ValueError: If `refresh` does not fit the times, or the interval is empty.
    """
    fresh = [True] * len(times) if refresh is None else [bool(flag) for flag in refresh]
    if len(fresh) != len(times):
        raise ValueError(f"the refresh schedule has {len(fresh)} flags for {len(times)} evaluations")
    if fresh and not fresh[0]:
        raise ValueError("the first evaluation of a refresh schedule must be a refresh: there is no state to reuse")
    wanted = [scale] * len(times) if isinstance(scale, int | float) else list(scale)
    scales = [
        value if interval is None or inside_interval(t, interval) else 1.0
        for t, value in zip(times, wanted, strict=True)
    ]
    # State made on N rows cannot serve 2 N rows: within a reuse window (a refresh up to the next), all or none.
    window = np.cumsum(fresh)
    with_both = {
        w
        for w, value in zip(window, scales, strict=True)
        if value != 1 or (always_both and any(each != 1 for each in wanted))
    }
    return tuple(
        Evaluation(t, value, bool(w in with_both), flag)
        for t, value, w, flag in zip(times, scales, window, fresh, strict=True)
    )


def inside_interval(t: float, interval: tuple[float, float]) -> bool:
    """True if an evaluation at time t is guided; a ValueError for an empty interval."""
    # Strict bounds in float32: the released samplers compare so, and evaluations fall on bounds.
    low, high = sorted(np.float32(bound) for bound in interval)
    if not low < high:
        raise ValueError(f"the guidance interval ({interval[0]:g}, {interval[1]:g}) is empty")
    return bool(low < np.float32(t) < high)


class Reuse:
    """Reuse of the last state, as by Skip-Cache and encoder sharing. A subclass may reuse something else."""

    def __init__(self) -> None:
        self._state: State = None

    def clear(self) -> None:
        """Forget the state, at the start of a run."""
        self._state = None

    def get(self, evaluation: Evaluation, /) -> State:
        """State for an evaluation; None to compute it anew."""
        return None if evaluation.refresh else self._state

    def put(self, evaluation: Evaluation, output: ModelOutput, /) -> None:
        """Remember an evaluation's state."""
        self._state = output.state


@torch.no_grad()
def sample_loop(
    denoise: Denoiser,
    sampler: Sampler,
    x: Tensor,
    run: Sequence[Evaluation],
    *,
    cache: Reuse | None = None,
    noise_fn: NoiseFn = torch.randn_like,
    on_step: StepHook | None = None,
) -> Tensor:
    """Carry x through all evaluations of a sampler.

    Args:
        denoise: From `guided`, perhaps in a `Forecast`, or any function of its kind.
        sampler: Such as `DDIMSampler(create_diffusion(), "ddim50")`.
        x: (N, ..., C, H, W) float32 starting noise (for a reverse sampler: samples).
        run: From `evaluations(sampler.times, ...)`.
        cache: State between evaluations; None reuses the last one where `run` has no refresh.
        noise_fn: Returns noise like x; called once a step in order by stochastic samplers.
        on_step: Called as on_step(i, x, out) after each step; a tensor it returns replaces x.

    Returns:
        The samples, like x.

    Raises:
        ValueError: If the run, the sampler and `denoise` do not fit.
    """
    _check_run(denoise, sampler, run)
    cache = Reuse() if cache is None else cache
    forget: Callable[[], object] = getattr(denoise, "clear", lambda: None)  # of outputs that a forecast goes through
    cache.clear()
    forget()
    for i, evaluation in enumerate(run):
        out = denoise(x, evaluation, cache.get(evaluation))
        cache.put(evaluation, out)
        x = sampler.step(i, x, out.sample, noise_fn)
        replaced = None if on_step is None else on_step(i, x, out)
        if replaced is not None:
            x = replaced
            forget()
    return x


def _check_run(denoise: Denoiser, sampler: Sampler, run: Sequence[Evaluation]) -> None:
    if len(run) != len(sampler.times):
        raise ValueError(f"the run has {len(run)} evaluations, the sampler {len(sampler.times)}")
    if run and not run[0].refresh:
        raise ValueError("the first evaluation of a run must be a refresh: there is no state to reuse")
    own, convention = (getattr(part, "time_convention", None) for part in (sampler, denoise))
    if None not in (own, convention) and own != convention:
        raise ValueError(
            f"the sampler's times are in {own!r} and `denoise` expects {convention!r}; "
            "give guided(..., times=sampler.time_convention)"
        )


class ImageNoise:
    """Noise of numbered images or clips: number i has the same noise in any batch, on any rank, at any world size.

    There is one generator per image, on the device of the samples, read several steps at a time.

    Args:
        seed: Seed of the whole job.
        indices: Absolute image numbers of this batch, each in [0, 2^32).
        shape: (..., C, H, W) of one image or clip.
        device: Device of x. CPU and CUDA generators give different numbers; on MPS they are the CPU's.
    """

    STEPS_PER_DRAW = 16  # part of the format: with another number the same generator gives other noise to a step

    def __init__(
        self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        self._target, device = device, float64_device(device)
        self._generators = [torch.Generator(device).manual_seed(image_seed(seed, i)) for i in indices]
        self._buffer = torch.empty(len(indices), self.STEPS_PER_DRAW, *shape, device=device)
        self._used = self.STEPS_PER_DRAW

    def initial(self) -> Tensor:
        """Starting noise x_T, (N, ..., C, H, W) float32; to be called first, and once."""
        shape = self._buffer.shape[2:]
        noise = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in self._generators])
        return noise.to(self._target)

    def __call__(self, x: Tensor) -> Tensor:
        """Noise of the next step, like x, valid until the next call; a `noise_fn` for `sample_loop`."""
        if self._used == self.STEPS_PER_DRAW:
            for row, generator in zip(self._buffer, self._generators, strict=True):
                row.normal_(generator=generator)
            self._used = 0
        self._used += 1
        return self._buffer[:, self._used - 1].to(self._target)
