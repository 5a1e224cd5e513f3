"""Every process with every sampler of the registry: clips, guidance, prediction types, repeatability, settings."""

import dataclasses
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from diffusion import PREVIEW_SAMPLER, PROCESSES, SAMPLERS, ImageNoise, evaluations, guided, make_sampler, sample_loop
from diffusion.caching import every_nth
from diffusion.gaussian_samplers import DDIMSettings
from diffusion.predictions import Prediction
from tests.golden_data import assert_close
from tests.toys import CLIP, TextToy, Toy, true_prediction

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
# Every prediction type of every process; a flow has none of the noise.
PROCESS_PREDICTIONS = [(p, kind) for p in PROCESSES for kind in PREDICTIONS if (p, kind) != ("flow", "epsilon")]
CASES = [(name, kind) for name, row in SAMPLERS.items() for p, kind in PROCESS_PREDICTIONS if p == row.process]
PLAIN = {"gaussian": "epsilon", "flow": "velocity"}
# Settings that make a sampler stochastic, multistep, or evaluate more often.
VARIED = {
    "ddim": {"eta": 0.5},
    "euler": {"kind": "sde"},
    "heun": {"exact": True},
    "adams": {"order": 4},
    "flow-unipc": {"order": 3},
}


def sampler_of(name: str, prediction: str | None = None, steps: str = "6", *, varied: bool = False) -> Any:
    row = SAMPLERS[name]
    settings: Any = {"prediction": prediction or PLAIN[row.process]}
    process = PROCESSES[row.process](**settings).make(learn_sigma=False)
    return make_sampler(name, process, steps, row.settings(**VARIED.get(name, {}) if varied else {}))


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_clip_is_sampled_with_guidance_and_reuse_the_same_twice(sampler: str, varied: bool) -> None:
    """By the same objects, and whichever clips are in the batch."""
    steps, network = sampler_of(sampler, varied=varied), Toy()
    low, high = sorted((steps.times[1], steps.times[-2]))
    run = evaluations(steps.times, 2.0, (low, high), every_nth(len(steps.times), 2))
    y = torch.tensor([1, 2, 3])

    def sampled(clips: list[int]) -> Tensor:
        noise = ImageNoise(0, clips, CLIP)
        cond, null = {"y": y[clips]}, network.null_conditioning(len(clips))
        denoise = guided(network, cond, null, times=steps.time_convention)
        return sample_loop(denoise, steps, noise.initial(), run, noise_fn=noise)

    first = sampled([0, 1, 2])
    assert first.shape == (3, *CLIP) and first.isfinite().all() and first.dtype == torch.float32
    assert torch.equal(first, sampled([0, 1, 2]))
    assert_close(torch.cat([sampled([0]), sampled([1, 2])]), first)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("length", [3, 7])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_conditions_every_sampler(sampler: str, length: int) -> None:
    steps, network = sampler_of(sampler), TextToy()
    ones, noise = torch.ones(2, length), ImageNoise(0, [0, 1], CLIP)
    x, ends = noise.initial(), []
    for scale in (1.0, 3.0):
        cond = {"text": torch.full((2, length, 4), 0.5), "text_mask": ones}
        null = {"text": torch.zeros(2, length, 4), "text_mask": ones}
        denoise = guided(network, cond, null, times=steps.time_convention)
        ends.append(sample_loop(denoise, steps, x, evaluations(steps.times, scale), noise_fn=torch.zeros_like))
    assert not torch.equal(*ends) and torch.stack(ends).isfinite().all()


@pytest.mark.parametrize(("sampler", "prediction"), CASES)
def test_a_step_does_not_depend_on_the_prediction_type(sampler: str, prediction: Prediction) -> None:
    """Fed with outputs that mean the same, every evaluation of a run moves x alike; also if predictions are clipped."""
    for clip in (False, True) if SAMPLERS[sampler].process == "gaussian" else (False,):
        runs = [sampler_of(sampler, kind, "4") for kind in (prediction, None)]
        if clip:
            runs = [type(run)(run.process, clip_denoised=True) for run in runs]
        x, x_start, noise = torch.randn(3, 2, *CLIP, dtype=torch.float64)
        for i, t in enumerate(runs[0].times):
            alpha, sigma = levels(runs[0], t)
            x_t, ends = alpha * x_start + sigma * noise, []
            for run in runs:
                output = true_prediction(run.process.prediction, x_start, noise, alpha, sigma)
                ends.append(run.step(i, x_t, output, lambda x, noise=x: noise))
            torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddpm"])  # DDPM's steps are a posterior's
def test_exact_predictions_lead_along_the_path(sampler: str) -> None:
    """With a network that knows the clean image, every step leads to the same mixture at its own level."""
    run, (x_start, noise) = sampler_of(sampler, steps="5"), torch.randn(2, 2, *CLIP, dtype=torch.float64)
    for i, t in enumerate(run.times):
        alpha, sigma = levels(run, t)
        output = true_prediction(run.process.prediction, x_start, noise, alpha, sigma)
        end = run.step(i, alpha * x_start + sigma * noise, output, torch.randn_like)
        alpha, sigma = levels(run, run.times[i + 1]) if i + 1 < len(run.times) else (1.0, 0.0)
        torch.testing.assert_close(end, alpha * x_start + sigma * noise, rtol=1e-6, atol=1e-6)


def levels(sampler: Any, t: float) -> tuple[float, float]:
    """alpha and sigma at a process time."""
    if sampler.time_convention == "unit":
        return t, 1 - t
    abar = sampler.process.tables["alphas_cumprod"][sampler.process.timesteps.index(t)]
    return float(abar**0.5), float((1 - abar) ** 0.5)


# ----------------------------------------------------------------------------------------------------------------------
# Rows


def test_every_process_is_found_by_its_name_and_has_a_preview_sampler() -> None:
    for name, settings in PROCESSES.items():
        assert dataclasses.is_dataclass(settings)
        process = settings().make(learn_sigma=False)
        assert process.name == name
        assert settings.has_variance == (name == "gaussian")
        assert SAMPLERS[PREVIEW_SAMPLER[name]].process == name
        assert make_sampler(PREVIEW_SAMPLER[name], process, "3").time_convention == process.time_convention


@pytest.mark.parametrize("name", SAMPLERS)
def test_defaults_of_a_row_make_its_sampler(name: str) -> None:
    row = SAMPLERS[name]
    sampler: Any = make_sampler(name, PROCESSES[row.process]().make(False))
    assert type(sampler) is row.sampler and len(sampler.times) in (20, 49, 50, 250)
    assert all(field.metadata["help"] for field in dataclasses.fields(row.settings))


def test_settings_reach_the_sampler() -> None:
    ddim: Any = make_sampler("ddim", PROCESSES["gaussian"]().make(False), "10", DDIMSettings(eta=0.3))
    assert ddim.eta == 0.3


@pytest.mark.parametrize(
    ("clip_denoised", "pixels", "clips"), [(None, False, False), (None, True, True), (False, True, False)]
)
@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if row.process == "gaussian"])
def test_predictions_are_clipped_for_pixels_unless_said_otherwise(
    name: str, clip_denoised: bool | None, pixels: bool, clips: bool
) -> None:
    settings, process = SAMPLERS[name].settings(clip_denoised=clip_denoised), PROCESSES["gaussian"]().make(False)
    sampler = make_sampler(name, process, "3", settings, pixels=pixels)
    last = len(sampler.times) - 1
    end = sampler.step(last, torch.full((1, 1, 1, 1), 50.0), torch.zeros(1, 1, 1, 1), torch.zeros_like)
    assert (end.max() <= 1) == clips


@pytest.mark.parametrize(
    ("name", "process", "steps", "message"),
    [
        ("odd", "flow", "5", "unknown sampler 'odd'; known: ddpm, ddim, "),
        (
            "ddim",
            "flow",
            "5",
            r"sampler 'ddim' is of process 'gaussian', not 'flow'; choose from euler, heun, adams, flow-unipc",
        ),
        ("ddpm", "gaussian", "fast", "step spec 'fast' is not understood"),
        ("heun", "flow", "ddim50", "step spec 'ddim50': a flow is sampled in a number of steps"),
    ],
)
def test_samplers_that_cannot_be_made_are_named(name: str, process: str, steps: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(name, PROCESSES[process]().make(False), steps)
