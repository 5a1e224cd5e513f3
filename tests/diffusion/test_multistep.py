"""Multistep solvers and Heun's method: their order, few evaluations, and diffusers' schedulers step by step."""

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from diffusion import (
    SAMPLERS,
    DDIMSampler,
    DEISSampler,
    DPMSolverSampler,
    EDMSampler,
    UniPCSampler,
    create_diffusion,
    evaluations,
    make_sampler,
    sample_loop,
)
from diffusion.gaussian import GaussianDiffusion
from diffusion.multistep import exponential_weights, midpoint
from diffusion.sampling import Evaluation, Sampler
from diffusion.time_grids import TimeGrid
from models import ModelOutput

MIXTURES = {  # means, deviations, weights
    "three": ((-0.7, 0.2, 0.9), (0.1, 0.12, 0.06), (0.35, 0.4, 0.25)),
    "two": ((-1.0, 1.0), (0.05, 0.05), (0.5, 0.5)),
    "wide": ((-0.5, 0.6), (0.3, 0.2), (0.3, 0.7)),
    "five": ((-1.0, -0.5, 0.0, 0.6, 1.1), (0.04, 0.1, 0.05, 0.08, 0.03), (0.1, 0.2, 0.3, 0.2, 0.2)),
}
SOLVERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "2M": (DPMSolverSampler, {}),
    "3M": (DPMSolverSampler, {"order": 3}),
    "UniPC-2": (UniPCSampler, {}),
    "UniPC-3": (UniPCSampler, {"order": 3}),
    "DEIS-2": (DEISSampler, {}),
    "DEIS-3": (DEISSampler, {"order": 3}),
}
PROCESS = create_diffusion(learn_sigma=False)


def mixture_noise(name: str, x: Tensor, alpha: float, sigma: float) -> Tensor:
    """epsilon at x, from the score of a mixture of Gaussians."""
    mean, deviation, weight = (torch.tensor(values, dtype=torch.float64) for values in MIXTURES[name])
    variance = (alpha * deviation) ** 2 + sigma**2
    distance = x[..., None] - alpha * mean
    log_density = weight.log() - variance.log() / 2 - distance**2 / variance / 2
    return sigma * (log_density.softmax(-1) * distance / variance).sum(-1)


def levels(process: GaussianDiffusion, t: float) -> tuple[float, float]:
    """alpha and sigma at an original timestep."""
    abar = process.tables["alphas_cumprod"][process.timesteps.index(t)]
    return abar**0.5, (1 - abar) ** 0.5


def path(sampler: Any, mixture: str, count: int = 256) -> list[Tensor]:
    """Points of a trajectory on a mixture, (count,) float64 each, from the same noise every time."""
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal(count)).view(-1, 1, 1, 1)
    visited = [noise]

    def denoise(x: Tensor, evaluation: Evaluation, state: object = None, /) -> ModelOutput:
        return ModelOutput(mixture_noise(mixture, x, *levels(sampler.process, float(evaluation.t))))

    sample_loop(denoise, sampler, noise, evaluations(sampler.times), on_step=lambda i, x, out: visited.append(x))
    return [x.flatten() for x in visited]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# ----------------------------------------------------------------------------------------------------------------------
# Order of convergence, and few evaluations


@cache
def exact_end(low: int) -> Tensor:
    """End of the ODE from timestep 999 to `low`, by the solver of the highest order in many steps."""
    return path(UniPCSampler(PROCESS.restricted(quadratic(low, 1024)), order=3), "three")[-2]


def quadratic(low: int, steps: int) -> list[float]:
    """The solvers' default grid, down to a timestep above 0."""
    return (np.linspace(low**0.5, 999**0.5, steps + 1) ** 2).clip(low, 999).tolist()


@pytest.mark.parametrize(
    ("name", "order"),
    [("2M", 2), ("3M", 3), ("UniPC-2", 2), ("UniPC-3", 3), ("DEIS-2", 2), ("DEIS-3", 3), ("edm", 2), ("ddim", 1)],
)
def test_errors_fall_with_the_order_of_the_solver(name: str, order: int) -> None:
    make, settings = {**SOLVERS, "edm": (EDMSampler, {}), "ddim": (DDIMSampler, {})}[name]
    errors = []
    for steps in (32, 64, 128):
        points = path(make(PROCESS.restricted(quadratic(100, steps)), **settings), "three")
        errors.append(rms(points[-2] - exact_end(100)))
    observed = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert observed[-1] > order - 0.2 and observed[0] > order - 0.4, observed


def test_the_published_weight_of_the_second_difference_is_not_of_third_order() -> None:
    """The formula of other implementations, as a control of ours."""

    class Published(DPMSolverSampler):
        def row(self, i: int, levels: Any) -> Any:
            exact = super().row(i, levels)
            return exact._replace(weights=published(exact.weights, levels, i)) if len(exact.weights) == 3 else exact

    errors = []
    for steps in (128, 256):
        points = path(Published(PROCESS.restricted(quadratic(100, steps)), order=3), "three")
        errors.append(rms(points[-2] - exact_end(100)))
    assert math.log2(errors[0] / errors[1]) < 2.6


def published(weights: tuple[float, ...], levels: Any, i: int) -> tuple[float, ...]:
    """Weights of 3M with half of the second divided difference's share."""
    (a, b, c), h = levels.log_snr[i - 2 : i + 1][::-1], levels.log_snr[i + 1] - levels.log_snr[i]
    share = levels.alpha[i + 1] * ((math.expm1(-h) + h) / h**2 - 0.5) * h**2  # of the second divided difference
    second = np.array([1 / (a - b), -1 / (a - b) - 1 / (b - c), 1 / (b - c)]) / (a - c)
    return tuple((np.array(weights) + share * second).tolist())


@cache
def reference_end(mixture: str) -> Tensor:
    return path(DDIMSampler(PROCESS), mixture)[-1]


@cache
def ddim_error(mixture: str, steps: int) -> float:
    return rms(path(DDIMSampler(PROCESS, str(steps)), mixture)[-1] - reference_end(mixture))


@pytest.mark.parametrize("steps", [5, 8, 10, 20])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", SOLVERS)
def test_few_evaluations_are_far_better_than_ddims(name: str, mixture: str, steps: int) -> None:
    make, settings = SOLVERS[name]
    error = rms(path(make(PROCESS, str(steps), **settings), mixture)[-1] - reference_end(mixture))
    limit = 1.5 if steps > 5 else 1.0
    assert error < ddim_error(mixture, steps) / limit


@pytest.mark.parametrize("grid", get_args(TimeGrid))
@pytest.mark.parametrize("name", [*(n for n, row in SAMPLERS.items() if row.process == "gaussian")])
def test_every_solver_takes_every_grid(name: str, grid: Any) -> None:
    settings = SAMPLERS[name].settings(grid=grid)
    sampler: Any = make_sampler(name, PROCESS, "12", settings)
    end = path(sampler, "three", 64)[-1]
    assert len(set(sampler.process.timesteps)) == 12
    assert 0.4 < rms(end) < 0.9  # the mixture's is 0.633


@pytest.mark.parametrize("steps", ["10", "20"])
@pytest.mark.parametrize("name", [n for n, row in SAMPLERS.items() if row.process == "gaussian"])
def test_defaults_reach_the_mixture_in_few_steps(name: str, steps: str) -> None:
    end = path(make_sampler(name, PROCESS, steps), "three", 2048)[-1]
    limit = 0.15 if name in ("ddpm", "ddim", "edm") else 0.05  # the uniform grid ends, and edm's begins, in long steps
    assert abs(float(end.mean()) - 0.06) < 0.06 and abs(rms(end) - 0.633) < limit


def test_the_stochastic_solver_reaches_the_moments() -> None:
    end = path(DPMSolverSampler(PROCESS, "50", kind="sde"), "three", 8192)[-1]
    assert abs(float(end.mean()) - 0.06) < 0.03 and abs(rms(end) - 0.633) < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# diffusers' schedulers, each on its own timesteps

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # of diffusers with NumPy 2
BETAS = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear"}


def compare(scheduler: Any, make: Callable[[GaussianDiffusion], Any], steps: int, **extra: Any) -> list[float]:
    """Largest relative difference of each step, made from the same point with the same history."""
    scheduler.set_timesteps(steps)
    times = [int(t) for t in scheduler.timesteps]
    sampler, generator = make(PROCESS.restricted(times)), torch.Generator().manual_seed(0)
    x, worst = torch.randn(2, 4, 8, 8, generator=generator), []
    for i, t in enumerate(times):
        noise, eps = torch.randn(2, *x.shape, generator=generator)
        eps = torch.tanh(0.3 * x) + 0.1 * eps
        more = {"variance_noise": noise} if "variance_noise" in extra else {}
        theirs = scheduler.step(eps, t, x, **more).prev_sample
        ours = sampler.step(i, x, eps, lambda x, noise=noise: noise)
        worst.append(float((ours - theirs).abs().max() / theirs.abs().max()))
        x = theirs
    return worst


@pytest.mark.parametrize(("steps", "spacing"), [(10, "trailing"), (14, "linspace"), (3, "trailing")])
@pytest.mark.parametrize("order", [2, 3])
def test_every_unipc_step_is_diffusers(order: int, steps: int, spacing: str) -> None:
    options = {**BETAS, "solver_order": order, "timestep_spacing": spacing, "final_sigmas_type": "zero"}
    assert max(compare(UniPCMultistepScheduler(**options), lambda p: UniPCSampler(p, order=order), steps)) < 1e-6


@pytest.mark.parametrize(("steps", "spacing"), [(10, "trailing"), (14, "linspace"), (3, "trailing")])
@pytest.mark.parametrize("order", [2, 3])
def test_every_deis_step_is_diffusers(order: int, steps: int, spacing: str) -> None:
    scheduler = DEISMultistepScheduler(**BETAS, solver_order=order, timestep_spacing=spacing)
    worst = compare(scheduler, lambda p: DEISSampler(p, order=order), steps)
    assert max(worst[:-1]) < 2e-6, "its last step ends at a level above 0"


@pytest.mark.parametrize(("steps", "spacing"), [(10, "trailing"), (20, "linspace"), (2, "trailing"), (1, "trailing")])
@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_every_step_of_2m_is_diffusers(kind: Any, steps: int, spacing: str) -> None:
    algorithm = {"ode": "dpmsolver++", "sde": "sde-dpmsolver++"}[kind]
    options = {**BETAS, "timestep_spacing": spacing, "final_sigmas_type": "zero", "algorithm_type": algorithm}
    extra = {"variance_noise": True} if kind == "sde" else {}
    scheduler = DPMSolverMultistepScheduler(**options)
    assert max(compare(scheduler, lambda p: DPMSolverSampler(p, kind=kind), steps, **extra)) < 1e-6


def test_every_step_of_3m_is_diffusers_but_for_the_weight_of_the_second_difference() -> None:
    class Published(DPMSolverSampler):
        def row(self, i: int, levels: Any) -> Any:
            exact = super().row(i, levels)
            return exact._replace(weights=published(exact.weights, levels, i)) if len(exact.weights) == 3 else exact

    options = {**BETAS, "timestep_spacing": "trailing", "final_sigmas_type": "zero", "solver_order": 3}
    assert max(compare(DPMSolverMultistepScheduler(**options), lambda p: Published(p, order=3), 10)) < 1e-6
    ours = compare(DPMSolverMultistepScheduler(**options), lambda p: DPMSolverSampler(p, order=3), 10)
    assert 1e-5 < max(ours) < 1e-2


# ----------------------------------------------------------------------------------------------------------------------
# Details


def test_weights_integrate_polynomials_exactly() -> None:
    """Against the closed form of the integral of exp(lambda - b) lambda^k."""
    nodes, start, end = [0.3, -0.5, -1.1], 0.3, 1.9
    h = end - start
    moments = [-math.expm1(-h), h + math.expm1(-h), h**2 - 2 * (h + math.expm1(-h))]  # of (lambda - start)^k
    weights = exponential_weights(nodes, start, end, rate=1.0)
    for power, moment in enumerate(moments):
        actual = sum(w * (node - start) ** power for w, node in zip(weights, nodes, strict=True))
        assert actual == pytest.approx(moment, rel=1e-12)
    assert sum(exponential_weights(nodes, start, end, rate=-1.0)) == pytest.approx(math.expm1(h))


def test_the_midpoint_rule_extrapolates_a_line() -> None:
    weights = midpoint([1.0, 0.25], h=0.5)
    assert np.dot(weights, [2 * 1.0 + 3, 2 * 0.25 + 3]) == pytest.approx(2 * (1.0 + 0.25) + 3)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_last_step_returns_the_predicted_clean_image(name: str) -> None:
    make, settings = SOLVERS[name]
    process = create_diffusion()
    sampler = make(process, "6", **settings)
    x, sample = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8)
    for i in range(6):
        end = sampler.step(i, x, sample, torch.randn_like)
    torch.testing.assert_close(end, sampler.process.pred_xstart(sample, x, 0))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_first_step_is_ddims(name: str) -> None:
    make, settings = SOLVERS[name]
    process, (x, sample) = create_diffusion("20", learn_sigma=False), torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    first = make(process, **settings).step(0, x, sample, torch.randn_like)
    torch.testing.assert_close(first, DDIMSampler(process).step(0, x, sample, torch.randn_like))


@pytest.mark.parametrize("name", [*SOLVERS, "edm"])
def test_the_history_is_forgotten_at_the_start_of_every_run(name: str) -> None:
    make, settings = {**SOLVERS, "edm": (EDMSampler, {})}[name]
    process, x = create_diffusion("6", learn_sigma=False), torch.randn(2, 1, 2, 2)
    used = make(process, **settings)
    used.step(0, 9 * x, x, torch.randn_like)
    used.step(1, 9 * x, x, torch.randn_like)  # a run that was broken off

    def run(sampler: Sampler) -> Tensor:
        return sample_loop(lambda x, e, state: ModelOutput(torch.tanh(x)), sampler, x, evaluations(sampler.times))

    first = run(used)
    assert torch.equal(first, run(make(process, **settings))) and torch.equal(first, run(used))


def test_an_edit_of_x_between_steps_is_kept_by_the_corrector() -> None:
    """What a hook adds to x moves all later points of a linear process as it would without a corrector."""
    process, x = create_diffusion("8", learn_sigma=False), torch.randn(2, 1, 2, 2, dtype=torch.float64)

    def run(make: Callable[..., Any], edit: float) -> Tensor:
        def hook(i: int, x: Tensor, out: ModelOutput) -> Tensor:
            return x + edit * (i == 3)

        sampler = make(process)
        zero = lambda x, e, state: ModelOutput(torch.zeros_like(x))  # noqa: E731
        return sample_loop(zero, sampler, x, evaluations(sampler.times), on_step=hook)

    moved = [run(make, 1.0) - run(make, 0.0) for make in (UniPCSampler, DDIMSampler)]
    assert moved[0].min() > 0.5 * moved[1].max() > 0


@pytest.mark.parametrize(
    ("make", "steps", "settings", "message"),
    [
        (DPMSolverSampler, "10", {"order": 4}, r"order must be in 1\.\.3, not 4"),
        (UniPCSampler, "2", {"order": 3}, "order 3 needs at least 3 evaluations, not 2"),
        (DPMSolverSampler, "10", {"order": 3, "kind": "sde"}, "stochastic kind is of order 1 or 2, not 3"),
        (DPMSolverSampler, "10", {"kind": "magic"}, "'magic' is not one of ode, sde"),
        (DEISSampler, "ddim50", {}, "the time grid 'chebyshev' takes a number of evaluations, 1 to 1000"),
        (DEISSampler, "1001", {}, "takes a number of evaluations"),
        (DDIMSampler, "10", {"grid": "cubic"}, "unknown time grid 'cubic'; choose from uniform, trailing"),
    ],
)
def test_settings_without_a_meaning_are_refused(make: Any, steps: str, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(PROCESS, steps, **settings)
