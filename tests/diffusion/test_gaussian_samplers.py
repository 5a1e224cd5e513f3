"""Gaussian samplers: recorded trajectories, a distribution in closed form, diffusers' schedulers, a cost in steps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffusion import (
    AncestralSampler,
    DDIMSampler,
    DEISSampler,
    DPMSolverSampler,
    EDMSampler,
    Evaluation,
    ImageNoise,
    UniPCSampler,
    create_diffusion,
    evaluations,
    guided,
    sample_loop,
)
from diffusion.gaussian import GaussianDiffusion
from diffusion.sampling import Denoiser, NoiseFn, Sampler
from models import ModelOutput
from tests.dispatch_trace import DispatchTrace
from tests.golden_data import arrays, assert_close, tiny_dit
from tests.toys import DEVIATION, MEAN, Toy, exact_prediction

# ----------------------------------------------------------------------------------------------------------------------
# Recorded trajectories: fixture -> network, step spec, process options, sampler and its settings

TRAJECTORIES: dict[str, tuple[str, str, dict[str, bool], Callable[..., Any], dict[str, Any]]] = {
    "p_sample_50": ("tiny_p2", "50", {}, AncestralSampler, {}),
    "p_sample_50_clip": ("tiny_p2", "50", {}, AncestralSampler, {"clip_denoised": True}),
    "p_sample_50_cfg": ("tiny_p2", "50", {}, AncestralSampler, {}),
    "p_sample_fixed_large_10": ("tiny_p4_nosigma", "10", {"learn_sigma": False}, AncestralSampler, {}),
    "ddim25_eta0": ("tiny_p2", "ddim25", {}, DDIMSampler, {}),
    "ddim25_eta1": ("tiny_p2", "ddim25", {}, DDIMSampler, {"eta": 1.0}),
}


def recorded_run(name: str) -> tuple[dict[str, Tensor], Any, Denoiser, tuple[Evaluation, ...]]:
    """A fixture, cut to the rows that guidance keeps, and what is needed to repeat it."""
    network, spec, options, make, settings = TRAJECTORIES[name]
    golden, sampler = arrays(f"dit/diffusion/traj_{name}"), make(create_diffusion(**options), spec, **settings)
    scale, cond, null = 1.0, {"y": golden["y"]}, None
    if "cfg_scale" in golden:
        # The official loop carries the unconditional half along and drops it at the end.
        scale, (y, y_null) = golden["cfg_scale"].item(), golden["y"].chunk(2)
        cond, null = {"y": y}, {"y": y_null}
        rows = {"x_T": 0, "final": 0, "pred_xstart_last": 0, "noises": 1, "samples": 1}
        golden.update({key: golden[key].chunk(2, dim)[0] for key, dim in rows.items()})
    denoise = guided(tiny_dit(network), cond, null, channels=3)
    return golden, sampler, denoise, evaluations(sampler.times, scale)


def replay(noises: Tensor) -> NoiseFn:
    """A `noise_fn` that deals out recorded noise, one draw a call."""
    remaining = iter(noises)
    return lambda x: next(remaining)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_sampling_repeats_the_recorded_trajectory(name: str) -> None:
    golden, sampler, denoise, run = recorded_run(name)
    path: list[Tensor] = []
    outputs: list[Tensor] = []

    def on_step(i: int, x: Tensor, out: ModelOutput) -> None:
        assert i == len(path)
        path.append(x)
        outputs.append(out.sample)

    final = sample_loop(denoise, sampler, golden["x_T"], run, noise_fn=replay(golden["noises"]), on_step=on_step)
    assert len(path) == len(sampler.times) == len(golden["noises"])
    for i, reference in zip(golden["step_index"].tolist(), golden["samples"], strict=True):
        assert_close(path[i], reference)
    assert_close(final, golden["final"])
    last = sampler.process.pred_xstart(outputs[-1], path[-2], 0, clip_denoised=name.endswith("clip"))
    assert_close(last, golden["pred_xstart_last"])


@torch.no_grad()
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_every_recorded_stretch_is_repeated_on_its_own(name: str) -> None:
    """Starting from what was recorded, so that no error of one stretch can hide in, or make up for, another's."""
    golden, sampler, denoise, run = recorded_run(name)
    ends = golden["step_index"].tolist()
    starts = [0, *(i + 1 for i in ends[:-1])]
    for start, end, x, reference in zip(
        starts, ends, [golden["x_T"], *golden["samples"][:-1]], golden["samples"], strict=True
    ):
        for i in range(start, end + 1):
            noise = golden["noises"][i]
            x = sampler.step(i, x, denoise(x, run[i], None).sample, lambda x, noise=noise: noise)
        assert_close(x, reference)


def test_ddim_in_reverse_repeats_the_recorded_trajectory() -> None:
    golden, sampler = (
        arrays("dit/diffusion/traj_ddim25_reverse"),
        DDIMSampler(create_diffusion(), "ddim25", reverse=True),
    )
    path: list[Tensor] = []
    sample_loop(
        guided(tiny_dit("tiny_p2"), {"y": golden["y"]}),
        sampler,
        golden["x_0"],
        evaluations(sampler.times),
        on_step=lambda i, x, out: path.append(x),
    )
    for i, reference in zip(range(0, 24, 4), golden["samples"], strict=True):
        assert_close(path[i], reference)
    assert_close(path[golden["last_index"]], golden["before_last"])
    assert_close(path[-1], golden["last_step"])


# ----------------------------------------------------------------------------------------------------------------------
# A distribution known in closed form


def levels(process: GaussianDiffusion, t: float) -> tuple[float, float]:
    """alpha and sigma at an original timestep."""
    abar = process.tables["alphas_cumprod"][process.timesteps.index(int(t))]
    return abar**0.5, (1 - abar) ** 0.5


def sampled_moments(sampler: Any) -> tuple[float, float]:
    """Mean and standard deviation that a sampler reaches, from N(0, 1), for data N(MEAN, DEVIATION^2).

    With the exact score every step is affine in x and noise, so three probes give its coefficients and the moments
    follow without drawing anything.
    """
    mean, variance = 0.0, 1.0
    probe_x, probe_noise = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64).view(2, 3, 1, 1, 1)
    for i, t in enumerate(sampler.times):
        eps = exact_prediction("epsilon", probe_x, *levels(sampler.process, t))
        shift, by_x, by_noise = sampler.step(i, probe_x, eps, lambda x: probe_noise).flatten().tolist()
        mean = shift + (by_x - shift) * mean
        variance = (by_x - shift) ** 2 * variance + (by_noise - shift) ** 2
    return mean, variance**0.5


SAMPLERS: dict[str, Callable[..., Any]] = {
    "ancestral": AncestralSampler,
    "ddim": DDIMSampler,
    "ddim_eta_0.5": lambda *args: DDIMSampler(*args, eta=0.5),
    "ddim_eta_1": lambda *args: DDIMSampler(*args, eta=1.0),
    "dpm++": DPMSolverSampler,
    "dpm++_sde": lambda *args: DPMSolverSampler(*args, kind="sde"),
    "unipc": UniPCSampler,
    "deis": DEISSampler,
    "edm": EDMSampler,
}


@pytest.mark.parametrize("sigma_small", [True, False])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "ddim_eta_0.5", "ddim_eta_1"])  # the others keep a history
def test_samplers_reach_the_distribution_that_the_score_belongs_to(sampler: str, sigma_small: bool) -> None:
    process, errors = create_diffusion(learn_sigma=False, sigma_small=sigma_small), []
    for steps in ("100", "1000"):
        mean, deviation = sampled_moments(SAMPLERS[sampler](process, steps))
        errors.append(max(abs(mean / MEAN - 1), abs(deviation / DEVIATION - 1)))
    assert errors[1] < 0.02
    assert errors[1] < errors[0]  # what remains is the step size


def errors_before_the_last_step(make: Callable[..., Any], steps: list[int]) -> list[float]:
    """Distance from the exact solution at the cleanest level, for each number of steps.

    The flow keeps every point at the same number of standard deviations from the mean. The step from the cleanest level
    does not depend on the sampler.
    """
    x, distances = torch.tensor([-1.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1), []
    for count in steps:
        sampler = make(create_diffusion(learn_sigma=False), str(count))
        ends: list[Tensor] = []

        def denoise(x: Tensor, evaluation: Evaluation, state: object = None, /, sampler: Any = sampler) -> ModelOutput:
            return ModelOutput(exact_prediction("epsilon", x, *levels(sampler.process, evaluation.t)))

        sample_loop(denoise, sampler, x, evaluations(sampler.times), on_step=lambda i, x, out, e=ends: e.append(x))
        (first, first_sigma), (last, last_sigma) = (levels(sampler.process, sampler.times[k]) for k in (0, -1))
        start = (x - first * MEAN) / ((first * DEVIATION) ** 2 + first_sigma**2) ** 0.5
        exact = last * MEAN + start * ((last * DEVIATION) ** 2 + last_sigma**2) ** 0.5
        distances.append(float((ends[-2] - exact).abs().max()))
    return distances


def test_ddim_is_of_first_order() -> None:
    coarse, fine = errors_before_the_last_step(DDIMSampler, [160, 640])
    assert 3 < coarse / fine < 6  # 4 in the limit


@pytest.mark.parametrize("predict_xstart", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_a_step_is_one_map_of_x_and_the_prediction(clip: bool, predict_xstart: bool) -> None:
    """The samplers' coefficients against the process's own posterior, which forms x_0 first."""
    process = create_diffusion("50", predict_xstart=predict_xstart)
    ancestral = AncestralSampler(process, clip_denoised=clip)
    x, noise = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    sample = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    for i in range(0, 49, 7):
        p = process.p_mean_variance(sample, x, 49 - i, clip_denoised=clip)
        expected = p.mean + torch.exp(0.5 * torch.as_tensor(p.log_variance)) * noise
        torch.testing.assert_close(ancestral.step(i, x, sample, lambda x: noise), expected)


def test_ddim_at_eta_one_is_the_ancestral_sampler_with_the_small_variance() -> None:
    process = create_diffusion("50", learn_sigma=False, sigma_small=True)
    ancestral, ddim = AncestralSampler(process), DDIMSampler(process, eta=1.0)
    x, sample, noise = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    assert ancestral.times == ddim.times
    for i in range(50):
        torch.testing.assert_close(
            ddim.step(i, x, sample, lambda x: noise), ancestral.step(i, x, sample, lambda x: noise)
        )


def test_a_learned_variance_lies_between_the_fixed_ones() -> None:
    """At value -1 a step is the one with the small variance, at +1 the one with beta."""
    learned = AncestralSampler(create_diffusion(), "50")
    x, eps, noise = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64)
    for value, sigma_small in ((-1.0, True), (1.0, False)):
        fixed = AncestralSampler(create_diffusion(learn_sigma=False, sigma_small=sigma_small), "50")
        sample = torch.cat([eps, torch.full_like(eps, value)], dim=1)
        for i in range(0, 48, 7):
            torch.testing.assert_close(
                learned.step(i, x, sample, lambda x: noise), fixed.step(i, x, eps, lambda x: noise)
            )


def test_ddim_returns_from_the_noise_that_reverse_ddim_found() -> None:
    process = create_diffusion(learn_sigma=False)
    x = MEAN + DEVIATION * torch.randn(1, 1, 4, 4, dtype=torch.float64)

    def denoise(x: Tensor, evaluation: Evaluation, state: object = None, /) -> ModelOutput:
        return ModelOutput(exact_prediction("epsilon", x, *levels(process, evaluation.t)))

    def path(sampler: Sampler, x: Tensor) -> list[Tensor]:
        visited: list[Tensor] = []
        sample_loop(denoise, sampler, x, evaluations(sampler.times), on_step=lambda i, x, out: visited.append(x))
        return visited

    there = path(DDIMSampler(process, reverse=True), x)
    # The last reverse step leads to pure noise, beyond the noisiest level that a forward step starts from.
    back = path(DDIMSampler(process), there[-2])
    assert (there[-2] - x).abs().max() > 0.1
    torch.testing.assert_close(back[-2], x, rtol=0, atol=0.04 * DEVIATION)


# ----------------------------------------------------------------------------------------------------------------------
# Against diffusers' schedulers, step by step. Its DiT pipeline guides all latent channels where the official samplers
# guide three, and is not compared.


def scheduler_for(steps: int, *, clip: bool) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear", clip_sample=clip
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("steps", [10, 25, 50])
def test_diffusers_visits_the_same_timesteps(steps: int) -> None:
    times = DDIMSampler(create_diffusion(), f"ddim{steps}").times
    assert list(times) == scheduler_for(steps, clip=False).timesteps.tolist()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_every_ddim_step_is_diffusers(eta: float, clip: bool, learn_sigma: bool) -> None:
    scheduler, process = scheduler_for(25, clip=clip), create_diffusion(learn_sigma=learn_sigma)
    sampler = DDIMSampler(process, "ddim25", eta=eta, clip_denoised=clip)
    x = torch.randn(2, 4, 8, 8)
    for i, t in enumerate(sampler.times):
        noise, sample = torch.randn_like(x), torch.randn(2, process.output_channels(4), 8, 8)
        eps = sample[:, :4]
        # With clipping, diffusers keeps the network's epsilon unless asked to follow the clipped image, as we do.
        theirs = scheduler.step(eps, int(t), x, eta=eta, variance_noise=noise, use_clipped_model_output=clip)
        assert_close(sampler.step(i, x, sample, lambda x, noise=noise: noise), theirs.prev_sample)
        x = theirs.prev_sample


# ----------------------------------------------------------------------------------------------------------------------
# Details


def test_times_are_the_original_timesteps_from_noise_to_data() -> None:
    process = create_diffusion()
    assert AncestralSampler(process, "ddim5").times == (800, 600, 400, 200, 0)
    assert DDIMSampler(process, "ddim5").times == (800, 600, 400, 200, 0)
    assert DDIMSampler(process, "ddim5", reverse=True).times == (0, 200, 400, 600, 800)
    assert AncestralSampler(create_diffusion("ddim5")).times == (800, 600, 400, 200, 0)  # the process as it is
    assert {make(process).time_convention for make in SAMPLERS.values()} == {"index"}


@pytest.mark.parametrize("make", [AncestralSampler, DDIMSampler])
def test_a_run_can_start_at_a_later_step(make: Callable[..., Any]) -> None:
    """As from a noised image; the steps are those of the whole run from there, with nothing before them."""
    process, (x, sample) = create_diffusion(learn_sigma=False), torch.randn(2, 2, 4, 8, 8)
    whole, part = make(process, "ddim5"), make(process, "ddim5", start=2)
    assert part.times == (400, 200, 0)
    assert_close(part.step(0, x, sample, torch.zeros_like), whole.step(2, x, sample, torch.zeros_like), 1e-6)
    x_t = part.process.q_sample(x, part.process.num_timesteps - 1, sample)
    assert torch.equal(x_t, whole.process.q_sample(x, 2, sample))


@pytest.mark.parametrize(
    ("sampler", "draws"),
    [("ancestral", 5), ("ddim", 0), ("ddim_eta_1", 5), ("dpm++", 0), ("dpm++_sde", 4), ("unipc", 0), ("deis", 0)],
)
def test_stochastic_samplers_draw_once_a_step_and_the_others_never(sampler: str, draws: int) -> None:
    drawn: list[Tensor] = []

    def noise_fn(x: Tensor) -> Tensor:
        drawn.append(x)
        return torch.zeros_like(x)

    run = SAMPLERS[sampler](create_diffusion(learn_sigma=False), "5")
    sample_loop(lambda x, e, s: ModelOutput(x), run, torch.randn(1, 4, 8, 8), evaluations(run.times), noise_fn=noise_fn)
    assert len(drawn) == draws


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_last_step_adds_no_noise(sampler: str) -> None:
    process = create_diffusion("5", learn_sigma=False)
    x, sample = torch.randn(2, 2, 4, 8, 8)
    last = len(SAMPLERS[sampler](process).times) - 1
    steps = [SAMPLERS[sampler](process).step(last, x, sample, lambda x, k=k: torch.full_like(x, k)) for k in (0.0, 9.0)]
    assert torch.equal(*steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_leaves_its_arguments_alone(sampler: str) -> None:
    x, sample = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8)
    copies, used = (x.clone(), sample.clone()), SAMPLERS[sampler](create_diffusion("5"))
    for i in range(5):
        assert used.step(i, x, sample, torch.randn_like).data_ptr() not in (x.data_ptr(), sample.data_ptr())
    assert torch.equal(x, copies[0]) and torch.equal(sample, copies[1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_half_precision_output_is_used_in_float32(sampler: str) -> None:
    process, x, half = create_diffusion("5"), torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8).bfloat16()
    end, reference = (SAMPLERS[sampler](process).step(2, x, s, torch.zeros_like) for s in (half, half.float()))
    assert end.dtype == torch.float32 and torch.equal(end, reference)


def test_clipping_acts_on_every_predicted_image() -> None:
    x, process = 50 * torch.randn(2, 4, 8, 8), create_diffusion(learn_sigma=False)
    for make in (AncestralSampler, DDIMSampler, DPMSolverSampler):
        samplers = [make(process, "5", clip_denoised=clip) for clip in (True, False)]
        clipped, free = (
            sample_loop(lambda x, e, s: ModelOutput(torch.zeros_like(x)), sampler, x, evaluations(sampler.times))
            for sampler in samplers
        )
        assert clipped.abs().max() <= 1 < free.abs().max()


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_an_eta_without_a_meaning_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=rf"eta must be in \[0, 1\], not {eta}"):
        DDIMSampler(create_diffusion(), "50", eta=eta)


@pytest.mark.parametrize("start", [-1, 5])
def test_a_start_after_the_last_step_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match=rf"the start must be in 0\.\.4, not {start}"):
        DDIMSampler(create_diffusion(), "5", start=start)


@pytest.mark.parametrize("spec", ["1", "2", "ddim25", "1000"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_coefficients_are_finite(spec: str, schedule: str) -> None:
    process = create_diffusion(spec, schedule)
    with np.errstate(all="raise"):
        samplers = [make(process) for make in SAMPLERS.values()]
        samplers.append(DDIMSampler(process, reverse=True))
    x, sample = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 8, 8)
    for sampler in samplers:
        for i in {0, len(sampler.times) // 2, len(sampler.times) - 1}:
            assert sampler.step(i, x, sample, torch.randn_like).isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Cost: tensor operations outside the network, per step


@pytest.mark.parametrize(
    ("sampler", "budget"),
    [
        ("ancestral", 9.5),
        ("ddim", 6),
        ("ddim_eta_1", 8),
        ("dpm++", 9),
        ("dpm++_sde", 11),
        ("unipc", 11),
        ("deis", 9),
        ("edm", 9),
    ],
)
def test_operations_per_step(sampler: str, budget: float) -> None:
    steps, network = 32, Toy((4, 8, 8), learn_sigma=True)
    run = SAMPLERS[sampler](create_diffusion(), str(steps))
    noise = ImageNoise(0, [0, 1], (4, 8, 8))
    x, trace = noise.initial(), DispatchTrace()
    denoise = guided(trace.watch(network), {"y": torch.tensor([1, 2])}, network.null_conditioning(2), channels=3)
    table = evaluations(run.times, 4.0)
    with trace:
        sample_loop(denoise, run, x, table, noise_fn=noise)
    assert trace.count(inside=True) > 0
    assert trace.count(inside=False) / len(run.times) <= budget, trace.names(inside=False)
    assert not [call for call in trace.waits() if not call.inside]
