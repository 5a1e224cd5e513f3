"""UniPC on flows: written out step by step, its order, mixtures in few evaluations, and wrong settings."""

from functools import cache, partial
from itertools import pairwise
from math import log2
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import AdamsSampler, EulerSampler, FlowMatching, FlowUniPCSampler, evaluations, sample_loop
from diffusion.flow_multistep import mean_weights
from models import ModelOutput
from tests.diffusion.test_multistep import MIXTURES, mixture_noise, rms

FLOW = FlowMatching()
euler, adams, unipc = (partial(kind, FLOW) for kind in (EulerSampler, AdamsSampler, FlowUniPCSampler))


def velocity(mixture: str, x: Tensor, t: float) -> Tensor:
    """Velocity at x of the flow to a mixture of Gaussians; at t = 0 the mean of the data less the noise."""
    if t == 0:
        mean, _, weight = (torch.tensor(values, dtype=torch.float64) for values in MIXTURES[mixture])
        return (weight * mean).sum() - x
    noise = mixture_noise(mixture, x, t, 1 - t)
    return (x - (1 - t) * noise) / t - noise


def noise(count: int = 128) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(count)).view(-1, 1, 1, 1)


def end(sampler: Any, mixture: str) -> Tensor:
    def denoise(x: Tensor, evaluation: Any, state: object = None, /) -> ModelOutput:
        return ModelOutput(velocity(mixture, x, float(evaluation.t)))

    return sample_loop(denoise, sampler, noise(), evaluations(sampler.times))


@cache
def solution(mixture: str) -> Tensor:
    return end(unipc(300), mixture)


@pytest.mark.parametrize("grid", ["uniform", "chebyshev"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_run_is_that_of_a_predictor_and_a_corrector_that_takes_the_step_again(order: int, grid: Any) -> None:
    sampler, mixture = unipc(9, order=order, grid=grid), "three"
    points, x = sampler.points, noise()
    velocities: list[Tensor] = []  # at the points where the network was evaluated
    start, first = x, 0
    for i, t in enumerate(sampler.times):
        velocities.append(velocity(mixture, x, t))
        if i:
            weights = mean_weights(points[first : i + 1], points[i - 1], t)
            x = start + (t - points[i - 1]) * sum(w * v for w, v in zip(weights, velocities[first:], strict=True))
        left = len(sampler.times) - i if grid == "chebyshev" else order  # there the last steps are of lower order
        start, first = x, max(0, i + 1 - min(order, left))
        weights = mean_weights(points[first : i + 1], t, points[i + 1])
        x = x + (points[i + 1] - t) * sum(w * v for w, v in zip(weights, velocities[first:], strict=True))
    assert torch.allclose(end(sampler, mixture), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_errors_fall_with_one_order_more_than_the_predictors(order: int) -> None:
    """Up to the third: the first step, from noise alone, is of second order with its correction."""
    errors = [rms(end(unipc(n, order=order, grid="uniform"), "wide") - solution("wide")) for n in (32, 64, 128)]
    observed = [log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert observed[-1] > min(order + 1, 3) - 0.2, observed


@pytest.mark.parametrize(("order", "steps"), [(2, 10), (2, 20), (3, 20)])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_few_evaluations_are_far_better_than_eulers(order: int, steps: int, mixture: str) -> None:
    errors = [rms(end(sampler, mixture) - solution(mixture)) for sampler in (unipc(steps, order=order), euler(steps))]
    assert errors[0] < errors[1] / 1.5


def test_mixtures_are_closer_than_by_the_predictor_alone() -> None:
    ratios = [
        rms(end(unipc(steps), mixture) - solution(mixture)) / rms(end(adams(steps), mixture) - solution(mixture))
        for mixture in MIXTURES
        for steps in (8, 10, 15)
    ]
    assert np.median(ratios) < 0.7, ratios


def test_a_run_can_start_at_a_later_step_and_forgets_the_one_before() -> None:
    part = unipc(40, order=3, start=10)
    x = torch.lerp(noise(), torch.full((), 0.3, dtype=torch.float64), part.times[0])

    def run() -> Tensor:
        def denoise(x: Tensor, evaluation: Any, state: object = None, /) -> ModelOutput:
            return ModelOutput(velocity("three", x, float(evaluation.t)))

        return sample_loop(denoise, part, x, evaluations(part.times))

    first = run()
    part.step(0, x, x, torch.zeros_like)  # a run that was broken off
    assert torch.equal(run(), first) and part.points == unipc(40).points[10:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: unipc(2, order=3), "a solver of order 3 needs at least 3 evaluations, not 2"),
        (lambda: unipc(10, order=4), r"the solver's order must be in 1\.\.3, not 4"),
        (lambda: unipc(10, grid="karras"), "unknown time grid 'karras' of a flow; choose from uniform, chebyshev"),
        (lambda: unipc(10, last_step=0.04), "a last step of 0.04 needs equal steps before it: the uniform grid"),
    ],
)
def test_settings_that_make_no_sampler_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
