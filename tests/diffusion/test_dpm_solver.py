"""DPM-Solver++(2M) by its order of accuracy, its history, and its cost; against diffusers in test_against_diffusers."""

import numpy as np
import pytest
import torch
from diffusion.gaussian_diffusion import GaussianDiffusion
from torch import Tensor

from diffusion import create_diffusion, guided, sample_loop
from diffusion.sampling import Sampler
from models import ModelOutput
from tests.dispatch_trace import DispatchTrace
from tests.golden_data import assert_close
from tests.networks import debug_network

MEAN, DEVIATION = 0.7, 0.25  # of the data whose exact score is known


def noise_of(process: GaussianDiffusion, x: Tensor, t: float) -> Tensor:
    """The exact prediction at x for data N(MEAN, DEVIATION^2)."""
    abar = process.tables["alphas_cumprod"][process.timesteps.index(int(t))]
    return (1 - abar) ** 0.5 * (x - abar**0.5 * MEAN) / (abar * DEVIATION**2 + 1 - abar)


def before_the_last_step(process: GaussianDiffusion, sampler: Sampler) -> Tensor:
    """Where two points arrive at the process's cleanest level; the step from there does not depend on the sampler."""
    x = torch.tensor([-1.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1)
    path: list[Tensor] = []
    sample_loop(
        lambda x, t, state: ModelOutput(noise_of(process, x, t)), sampler, x, on_step=lambda i, x, out: path.append(x)
    )
    return path[-2]


def errors(make: str, steps: list[int]) -> list[float]:
    """Distance from the exact solution, for each number of steps.

    The flow keeps every point at the same number of standard deviations from the mean.
    """
    found = []
    for count in steps:
        process = create_diffusion(str(count), learn_sigma=False)
        first, last = (process.tables["alphas_cumprod"][k] for k in (-1, 0))
        start = (torch.tensor([-1.0, 2.0]) - first**0.5 * MEAN) / (first * DEVIATION**2 + 1 - first) ** 0.5
        exact = last**0.5 * MEAN + start * (last * DEVIATION**2 + 1 - last) ** 0.5
        end = before_the_last_step(process, getattr(process, make)())
        found.append(float((end.flatten() - exact).abs().max()))
    return found


def test_it_is_of_second_order_where_ddim_is_of_first() -> None:
    coarse, fine = errors("dpm_solver", [160, 640])
    ddim_coarse, ddim_fine = errors("ddim", [160, 640])
    assert coarse / fine > 10  # 16 in the limit
    assert 3 < ddim_coarse / ddim_fine < 6  # 4 in the limit
    assert fine < ddim_fine / 3


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("spec", ["1", "2", "20", "10,5,5", "ddim50"])
def test_the_last_step_returns_the_predicted_clean_image(spec: str, learn_sigma: bool) -> None:
    process = create_diffusion(spec, learn_sigma=learn_sigma)
    sampler, last = process.dpm_solver(), process.num_timesteps - 1
    assert sampler.times == process.ddim().times
    x, sample = torch.randn(2, 4, 8, 8), torch.randn(2, process.output_channels(4), 8, 8)
    for i in range(last + 1):
        moved = sampler.step(i, x, sample, torch.randn_like)
    assert_close(moved, process.pred_xstart(sample, x, 0), 1e-6)


def test_the_first_step_is_ddim_s() -> None:
    process, (x, sample) = create_diffusion("20", learn_sigma=False), torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    theirs = process.ddim().step(0, x, sample, torch.randn_like)
    torch.testing.assert_close(process.dpm_solver().step(0, x, sample, torch.randn_like), theirs)


def test_history_is_forgotten_at_the_start_of_every_run() -> None:
    process, x = create_diffusion("6", learn_sigma=False), torch.randn(2, 1, 2, 2)
    used = process.dpm_solver()
    used.step(0, 9 * x, x, torch.randn_like)
    used.step(1, 9 * x, x, torch.randn_like)  # a run that was left in the middle

    def run(sampler: Sampler) -> Tensor:
        return sample_loop(lambda x, t, state: ModelOutput(torch.tanh(x)), sampler, x)

    assert torch.equal(run(used), run(process.dpm_solver()))


def test_it_draws_nothing_and_leaves_its_arguments_alone() -> None:
    sampler = create_diffusion("5", predict_xstart=True, learn_sigma=False).dpm_solver()
    x, sample = torch.randn(2, 2, 4, 8, 8)
    copies = x.clone(), sample.clone()

    def no_noise(x: Tensor) -> Tensor:
        raise AssertionError("drew noise")

    for i in range(5):
        moved = sampler.step(i, x, sample, no_noise)
        assert moved.data_ptr() not in (x.data_ptr(), sample.data_ptr())
    assert torch.equal(x, copies[0]) and torch.equal(sample, copies[1])


def test_clipping_acts_on_every_predicted_image() -> None:
    process = create_diffusion("5", learn_sigma=False)
    x = 50 * torch.randn(2, 4, 8, 8)
    ends = [
        sample_loop(lambda x, t, state: ModelOutput(torch.zeros_like(x)), process.dpm_solver(clip), x)
        for clip in (True, False)
    ]
    assert ends[0].abs().max() <= 1 < ends[1].abs().max()


def test_a_half_precision_output_is_used_in_float32() -> None:
    sampler, x, half = create_diffusion("5").dpm_solver(), torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8).bfloat16()
    moved, reference = (sampler.step(0, x, sample, torch.zeros_like) for sample in (half, half.float()))
    assert moved.dtype == torch.float32 and torch.equal(moved, reference)


@pytest.mark.parametrize("spec", ["1", "2", "ddim25", "1000"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_coefficients_are_finite(spec: str, schedule: str) -> None:
    with np.errstate(all="raise"):
        sampler = create_diffusion(spec, schedule).dpm_solver()
    assert np.isfinite(sampler._coefficients).all() and len(sampler._coefficients) == len(sampler.times)


def test_operations_per_step() -> None:
    steps, network = 32, debug_network("DiT")
    run = create_diffusion(str(steps)).dpm_solver()
    x, trace = torch.randn(2, 4, 8, 8), DispatchTrace()
    denoise = guided(trace.watch(network.for_sampling(run.times)), torch.tensor([1, 2]), network.null_class, 4.0, 3)
    with trace:
        sample_loop(denoise, run, x)
    assert trace.count(inside=False) / steps <= 9, trace.names(inside=False)
    assert trace.waits() == []
