"""Our DDIM and DPM-Solver++ against diffusers' schedulers, step by step.

What diffusers' own DiT pipeline does around its scheduler is not compared: it guides all latent channels, where the
official samplers guide three, and drops the variance half of the network's output, as both do here.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from diffusion import create_diffusion
from tests.golden_data import assert_close


def scheduler_for(steps: int, *, clip: bool) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=clip
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [10, 25, 50])
def test_both_visit_the_same_timesteps(steps: int) -> None:
    times = create_diffusion(f"ddim{steps}").ddim().times
    assert list(times) == scheduler_for(steps, clip=False).timesteps.tolist()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_every_step_is_the_same(eta: float, clip: bool, learn_sigma: bool) -> None:
    scheduler, process = scheduler_for(25, clip=clip), create_diffusion("ddim25", learn_sigma=learn_sigma)
    sampler = process.ddim(eta=eta, clip_denoised=clip)
    x = torch.randn(2, 4, 8, 8)
    for i, t in enumerate(sampler.times):
        noise, sample = torch.randn_like(x), torch.randn(2, process.output_channels(4), 8, 8)
        eps = sample[:, :4]
        # With clipping, diffusers keeps the network's epsilon unless asked to follow the clipped image, as we do.
        theirs = scheduler.step(eps, t, x, eta=eta, variance_noise=noise, use_clipped_model_output=clip).prev_sample
        assert_close(sampler.step(i, x, sample, lambda x, noise=noise: noise), theirs)
        x = theirs


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("spec", ["1", "2", "3", "20", "10,5,5", "ddim50"])
def test_every_step_of_dpm_solver_is_the_same(spec: str, learn_sigma: bool) -> None:
    process = create_diffusion(spec, learn_sigma=learn_sigma)
    sampler = process.dpm_solver()
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=2e-2, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(timesteps=list(sampler.times))
    x = torch.randn(2, 4, 8, 8)
    for i, t in enumerate(sampler.times):
        sample = torch.randn(2, process.output_channels(4), 8, 8)
        theirs = scheduler.step(sample[:, :4], t, x).prev_sample
        assert_close(sampler.step(i, x, sample, torch.randn_like), theirs)
        x = theirs
