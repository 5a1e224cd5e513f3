"""Samplers against recorded trajectories, against a distribution known in closed form, and against a cost in steps."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusion.gaussian_diffusion import GaussianDiffusion
from torch import Tensor

from diffusion import ImageNoise, create_diffusion, guided, sample_loop
from diffusion.sampling import Denoise, NoiseFn, Sampler
from models import ModelOutput
from tests.dispatch_trace import DispatchTrace
from tests.golden_data import arrays, assert_close, tiny_dit
from tests.networks import debug_network

# ----------------------------------------------------------------------------------------------------------------------
# Recorded trajectories: fixture -> network, step spec, process options, sampler

TRAJECTORIES: dict[str, tuple[str, str, dict[str, bool], Callable[[GaussianDiffusion], Sampler]]] = {
    "p_sample_50": ("tiny_p2", "50", {}, lambda process: process.ancestral()),
    "p_sample_50_clip": ("tiny_p2", "50", {}, lambda process: process.ancestral(clip_denoised=True)),
    "p_sample_50_cfg": ("tiny_p2", "50", {}, lambda process: process.ancestral()),
    "p_sample_fixed_large_10": ("tiny_p4_nosigma", "10", {"learn_sigma": False}, lambda process: process.ancestral()),
    "ddim25_eta0": ("tiny_p2", "ddim25", {}, lambda process: process.ddim()),
    "ddim25_eta1": ("tiny_p2", "ddim25", {}, lambda process: process.ddim(eta=1.0)),
}


def recorded_run(name: str) -> tuple[dict[str, Tensor], GaussianDiffusion, Sampler, Denoise]:
    """A fixture, cut to the rows that guidance keeps, and what is needed to repeat it."""
    network, spec, options, make_sampler = TRAJECTORIES[name]
    golden, process = arrays(f"dit/diffusion/traj_{name}"), create_diffusion(spec, **options)
    scale, y, y_null = 1.0, golden["y"], None
    if "cfg_scale" in golden:
        # The official loop carries the unconditional half along and drops it at the end.
        scale, (y, y_null) = golden["cfg_scale"].item(), golden["y"].chunk(2)
        rows = {"x_T": 0, "final": 0, "pred_xstart_last": 0, "noises": 1, "samples": 1}
        golden.update({key: golden[key].chunk(2, dim)[0] for key, dim in rows.items()})
    return golden, process, make_sampler(process), guided(tiny_dit(network), y, y_null, scale, channels=3)


def replay(noises: Tensor) -> NoiseFn:
    """A `noise_fn` that deals out recorded noise, one draw a call."""
    remaining = iter(noises)
    return lambda x: next(remaining)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_sampling_repeats_the_recorded_trajectory(name: str) -> None:
    golden, process, sampler, denoise = recorded_run(name)
    path: list[Tensor] = []
    outputs: list[Tensor] = []

    def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
        assert i == len(path)
        path.append(x)
        outputs.append(out.sample)

    final = sample_loop(denoise, sampler, golden["x_T"], noise_fn=replay(golden["noises"]), on_step=on_step)
    assert len(path) == process.num_timesteps == len(golden["noises"])
    for i, reference in zip(golden["step_index"].tolist(), golden["samples"], strict=True):
        assert_close(path[i], reference)
    assert_close(final, golden["final"])
    last = process.pred_xstart(outputs[-1], path[-2], 0, clip_denoised=name.endswith("clip"))
    assert_close(last, golden["pred_xstart_last"])


@torch.no_grad()
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_every_recorded_stretch_is_repeated_on_its_own(name: str) -> None:
    """Starting from what was recorded, so that no error of one stretch can hide in, or make up for, another's."""
    golden, _, sampler, denoise = recorded_run(name)
    ends = golden["step_index"].tolist()
    starts = [0, *(i + 1 for i in ends[:-1])]
    for start, end, x, reference in zip(
        starts, ends, [golden["x_T"], *golden["samples"][:-1]], golden["samples"], strict=True
    ):
        for i in range(start, end + 1):
            noise = golden["noises"][i]
            x = sampler.step(i, x, denoise(x, sampler.times[i], None).sample, lambda x, noise=noise: noise)
        assert_close(x, reference)


def test_ddim_in_reverse_repeats_the_recorded_trajectory() -> None:
    golden, process = arrays("dit/diffusion/traj_ddim25_reverse"), create_diffusion("ddim25")
    path: list[Tensor] = []
    sample_loop(
        guided(tiny_dit("tiny_p2"), golden["y"], None, 1.0),
        process.ddim_reverse(),
        golden["x_0"],
        on_step=lambda i, x, out: path.append(x),
    )
    for i, reference in zip(range(0, 24, 4), golden["samples"], strict=True):
        assert_close(path[i], reference)
    assert_close(path[golden["last_index"]], golden["before_last"])
    assert_close(path[-1], golden["last_step"])


# ----------------------------------------------------------------------------------------------------------------------
# A distribution known in closed form

MEAN, DEVIATION = 0.7, 0.25


def sampled_moments(process: GaussianDiffusion, sampler: Sampler) -> tuple[float, float]:
    """Mean and standard deviation that a sampler reaches, from N(0, 1), for data N(MEAN, DEVIATION^2).

    With the exact score every step is affine in x and noise, so three probes give its coefficients and the moments
    follow without drawing anything.
    """
    mean, variance = 0.0, 1.0
    probe_x, probe_noise = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64).view(2, 3, 1, 1, 1)
    for i, t in enumerate(sampler.times):
        abar = process.tables["alphas_cumprod"][process.timesteps.index(int(t))]
        total = abar * DEVIATION**2 + 1 - abar
        eps = (1 - abar) ** 0.5 * (probe_x - abar**0.5 * MEAN) / total
        shift, by_x, by_noise = sampler.step(i, probe_x, eps, lambda x: probe_noise).flatten().tolist()
        mean = shift + (by_x - shift) * mean
        variance = (by_x - shift) ** 2 * variance + (by_noise - shift) ** 2
    return mean, variance**0.5


SAMPLERS: dict[str, Callable[[GaussianDiffusion], Sampler]] = {
    "ancestral": lambda process: process.ancestral(),
    "ddim": lambda process: process.ddim(),
    "ddim_eta_0.5": lambda process: process.ddim(eta=0.5),
    "ddim_eta_1": lambda process: process.ddim(eta=1.0),
}


@pytest.mark.parametrize("sigma_small", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_reach_the_distribution_that_the_score_belongs_to(sampler: str, sigma_small: bool) -> None:
    errors = []
    for spec in ("100", "1000"):
        process = create_diffusion(spec, learn_sigma=False, sigma_small=sigma_small)
        mean, deviation = sampled_moments(process, SAMPLERS[sampler](process))
        errors.append(max(abs(mean / MEAN - 1), abs(deviation / DEVIATION - 1)))
    assert errors[1] < 0.02
    assert errors[1] < errors[0]  # what remains is the step size


@pytest.mark.parametrize("predict_xstart", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_a_step_is_one_map_of_x_and_the_prediction(clip: bool, predict_xstart: bool) -> None:
    """The samplers' coefficients against the process's own posterior, which forms x_0 first."""
    process = create_diffusion("50", predict_xstart=predict_xstart)
    ancestral = process.ancestral(clip)
    x, noise = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    sample = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    for i in range(0, 49, 7):
        p = process.p_mean_variance(sample, x, 49 - i, clip_denoised=clip)
        expected = p.mean + torch.exp(0.5 * torch.as_tensor(p.log_variance)) * noise
        torch.testing.assert_close(ancestral.step(i, x, sample, lambda x: noise), expected)


def test_ddim_at_eta_one_is_the_ancestral_sampler_with_the_small_variance() -> None:
    process = create_diffusion("50", learn_sigma=False, sigma_small=True)
    ancestral, ddim = process.ancestral(), process.ddim(eta=1.0)
    x, sample, noise = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    assert ancestral.times == ddim.times
    for i in range(50):
        torch.testing.assert_close(
            ddim.step(i, x, sample, lambda x: noise), ancestral.step(i, x, sample, lambda x: noise)
        )


def test_a_learned_variance_lies_between_the_fixed_ones() -> None:
    """At value -1 a step is the one with the small variance, at +1 the one with beta."""
    learned = create_diffusion("50").ancestral()
    x, eps, noise = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    for value, sigma_small in ((-1.0, True), (1.0, False)):
        fixed = create_diffusion("50", learn_sigma=False, sigma_small=sigma_small).ancestral()
        sample = torch.cat([eps, torch.full_like(eps, value)], dim=1)
        for i in range(0, 48, 7):
            torch.testing.assert_close(
                learned.step(i, x, sample, lambda x: noise), fixed.step(i, x, eps, lambda x: noise)
            )


def test_ddim_returns_from_the_noise_that_reverse_ddim_found() -> None:
    process = create_diffusion(learn_sigma=False)
    x = MEAN + DEVIATION * torch.randn(1, 1, 4, 4, dtype=torch.float64)

    def denoise(x: Tensor, t: float | Tensor, state: None = None, /) -> ModelOutput:
        abar = process.tables["alphas_cumprod"][process.timesteps.index(int(t))]
        return ModelOutput((1 - abar) ** 0.5 * (x - abar**0.5 * MEAN) / (abar * DEVIATION**2 + 1 - abar))

    there: list[Tensor] = []
    sample_loop(denoise, process.ddim_reverse(), x, on_step=lambda i, x, out: there.append(x))
    back: list[Tensor] = []
    # The last reverse step leads to pure noise, beyond the noisiest level that a forward step starts from.
    sample_loop(denoise, process.ddim(), there[-2], on_step=lambda i, x, out: back.append(x))
    assert (there[-2] - x).abs().max() > 0.1
    torch.testing.assert_close(back[-2], x, rtol=0, atol=0.04 * DEVIATION)


# ----------------------------------------------------------------------------------------------------------------------
# Details


def test_times_are_the_original_timesteps_from_noise_to_data() -> None:
    process = create_diffusion("ddim5")
    assert process.ancestral().times == (800, 600, 400, 200, 0)
    assert process.ddim().times == (800, 600, 400, 200, 0)
    assert process.ddim_reverse().times == (0, 200, 400, 600, 800)
    assert process.ddim(convention="unit").times == (1 - 0.8, 1 - 0.6, 1 - 0.4, 1 - 0.2, 1.0)


@pytest.mark.parametrize(("sampler", "draws"), [("ancestral", 5), ("ddim", 0), ("ddim_eta_1", 5)])
def test_stochastic_samplers_draw_once_a_step_and_the_others_never(sampler: str, draws: int) -> None:
    drawn: list[Tensor] = []

    def noise_fn(x: Tensor) -> Tensor:
        drawn.append(x)
        return torch.zeros_like(x)

    process = create_diffusion("5", learn_sigma=False)
    sample_loop(lambda x, t, s: ModelOutput(x), SAMPLERS[sampler](process), torch.randn(1, 4, 8, 8), noise_fn=noise_fn)
    assert len(drawn) == draws


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_last_step_adds_no_noise(sampler: str) -> None:
    process = create_diffusion("5", learn_sigma=False)
    x, sample = torch.randn(2, 2, 4, 8, 8)
    steps = [SAMPLERS[sampler](process).step(4, x, sample, lambda x, k=k: torch.full_like(x, k)) for k in (0.0, 9.0)]
    assert torch.equal(*steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_leaves_its_arguments_alone(sampler: str) -> None:
    x, sample = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8)
    copies = x.clone(), sample.clone()
    moved = SAMPLERS[sampler](create_diffusion("5")).step(2, x, sample, torch.randn_like)
    assert moved.data_ptr() != x.data_ptr()
    assert torch.equal(x, copies[0]) and torch.equal(sample, copies[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_half_precision_output_is_used_in_float32(sampler: str) -> None:
    process, x, half = create_diffusion("5"), torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8).bfloat16()
    moved, reference = (SAMPLERS[sampler](process).step(2, x, s, torch.zeros_like) for s in (half, half.float()))
    assert moved.dtype == torch.float32 and torch.equal(moved, reference)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_an_eta_without_a_meaning_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=rf"eta must lie in \[0, 1\], not {eta}"):
        create_diffusion("50").ddim(eta=eta)


@pytest.mark.parametrize("spec", ["1", "ddim25", "1000"])
def test_coefficients_are_finite(spec: str) -> None:
    with np.errstate(all="raise"):
        process = create_diffusion(spec)
        samplers = (process.ancestral(), process.ddim(eta=1.0), process.ddim_reverse())
    x, sample = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 8, 8)
    for sampler in samplers:
        for i in {0, len(sampler.times) // 2, len(sampler.times) - 1}:
            assert sampler.step(i, x, sample, torch.randn_like).isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Cost: tensor operations outside the network, per step


@pytest.mark.parametrize(("sampler", "budget"), [("ancestral", 10), ("ddim", 6), ("ddim_eta_1", 8)])
def test_operations_per_step(sampler: str, budget: int) -> None:
    steps, network = 32, debug_network("DiT")
    run = SAMPLERS[sampler](create_diffusion(str(steps)))
    noise = ImageNoise(0, [0, 1], (4, 8, 8))
    x, trace = noise.initial(), DispatchTrace()
    denoise = guided(trace.watch(network.for_sampling(run.times)), torch.tensor([1, 2]), network.null_class, 4.0, 3)
    with trace:
        sample_loop(denoise, run, x, noise_fn=noise)
    assert trace.count(inside=True) > 0
    assert trace.count(inside=False) / steps <= budget, trace.names(inside=False)
