"""The Gaussian process against recorded tables, posteriors, losses and gradients of the official implementation."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import AncestralSampler, GaussianDiffusion, create_diffusion, guided
from diffusion.gaussian import GaussianSettings
from diffusion.predictions import Prediction
from diffusion.schedules import named_betas
from models import DiT, ModelOutput
from tests.golden_data import arrays, assert_close, assert_close_elementwise, tiny_dit
from tests.toys import CLIP, true_prediction

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
LEARNED = arrays("dit/diffusion/losses_learned_range")
FIXED = arrays("dit/diffusion/losses_fixed_variance")


@pytest.fixture(scope="module")
def network() -> DiT:
    return tiny_dit("tiny_p2")


# ----------------------------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize(("fixture", "spec"), [("full", ""), ("250", "250"), ("50", "50"), ("ddim25", "ddim25")])
def test_tables_equal_the_recorded_ones(fixture: str, spec: str) -> None:
    golden, process = arrays(f"dit/diffusion/schedule_{fixture}"), create_diffusion(spec)
    assert list(process.timesteps) == golden.pop("timestep_map").tolist()
    for name, reference in golden.items():
        np.testing.assert_allclose(process.tables[name], reference.numpy(), rtol=1e-12, atol=1e-15, err_msg=name)


def test_respaced_process_keeps_the_noise_levels_of_the_original() -> None:
    full, short = create_diffusion(), create_diffusion("ddim25")
    kept = full.tables["alphas_cumprod"][list(short.timesteps)]
    np.testing.assert_allclose(short.tables["alphas_cumprod"], kept, rtol=1e-12)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_single_step_has_finite_tables(learn_sigma: bool) -> None:
    process = create_diffusion("1", learn_sigma=learn_sigma)
    for name in ("posterior_log_variance_clipped", "log_fixed_large"):
        assert process.tables[name] == pytest.approx(np.log(process.tables["betas"]))
    x = torch.randn(2, 4, 8, 8)
    sample = torch.randn(2, 8 if learn_sigma else 4, 8, 8)
    assert AncestralSampler(process).step(0, x, sample, torch.randn_like).isfinite().all()


@pytest.mark.parametrize("setting", ["prediction", "variance", "loss", "loss_weight"])
def test_unknown_choices_are_named(setting: str) -> None:
    with pytest.raises(ValueError, match="'odd' is not one of "):
        GaussianDiffusion(named_betas("linear", 100), **{setting: "odd"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": [3, 100]}, r"timesteps must be in 0 \.\. 99"),
        ({"min_snr_gamma": 0.0}, "the gamma of min-SNR must be positive and finite, not 0.0"),
        ({"loss_weight": "min_snr", "loss": "kl"}, "loss weight 'min_snr' has no effect on loss 'kl'"),
    ],
)
def test_settings_without_a_meaning_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(named_betas("linear", 100), **settings)


def test_a_respaced_process_keeps_its_settings_and_counts_original_timesteps() -> None:
    process = GaussianDiffusion(
        named_betas("linear", 1000), prediction="v", variance="fixed_small", loss_weight="min_snr", min_snr_gamma=2.0
    )
    short = process.respaced("250").respaced("ddim25")
    assert short.timesteps == tuple(range(0, 1000, 40))
    kept = ("prediction", "variance", "loss", "loss_weight", "min_snr_gamma")
    assert [getattr(short, name) for name in kept] == [getattr(process, name) for name in kept]


def test_settings_make_the_process_that_they_say() -> None:
    process = GaussianSettings(noise_schedule="squaredcos_cap_v2", prediction="v", loss_weight="min_snr").make(False)
    assert (process.prediction, process.variance, process.loss_weight) == ("v", "fixed_large", "min_snr")
    assert process.tables["betas"] == pytest.approx(named_betas("squaredcos_cap_v2", 1000), abs=1e-12)
    assert GaussianSettings().make(True).variance == "learned_range"
    with pytest.raises(ValueError, match="unknown noise schedule 'cosine'"):
        GaussianSettings(noise_schedule="cosine")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ("epsilon", "learned_range", "mse")),
        ({"predict_xstart": True}, ("x_start", "learned_range", "mse")),
        ({"prediction": "v"}, ("v", "learned_range", "mse")),
        ({"learn_sigma": False}, ("epsilon", "fixed_large", "mse")),
        ({"learn_sigma": False, "sigma_small": True}, ("epsilon", "fixed_small", "mse")),
        ({"rescale_learned_sigmas": True}, ("epsilon", "learned_range", "rescaled_mse")),
        ({"use_kl": True, "rescale_learned_sigmas": True}, ("epsilon", "learned_range", "rescaled_kl")),
    ],
)
def test_official_arguments_choose_as_officially(arguments: dict[str, Any], expected: tuple[str, ...]) -> None:
    process = create_diffusion(**arguments)
    assert (process.prediction, process.variance, process.loss) == expected
    assert process.num_timesteps == 1000


# ----------------------------------------------------------------------------------------------------------------------
# Times, and the network's output


def test_process_times_are_original_timesteps() -> None:
    process = create_diffusion("5")
    assert process.timesteps == (0, 250, 500, 749, 999)
    assert process.to_time(torch.tensor([4, 0, 3])).tolist() == [999, 0, 749]


def test_drawn_indices_cover_the_respaced_process() -> None:
    process = create_diffusion("5")
    drawn = process.draw_times(1000, torch.Generator().manual_seed(0))
    assert drawn.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(drawn, process.draw_times(1000, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 4), (False, 8)])
def test_a_raw_output_with_the_wrong_channels_is_refused(learn_sigma: bool, channels: int) -> None:
    process = create_diffusion(learn_sigma=learn_sigma)
    x, sample, t = torch.zeros(1, 4, 8, 8), torch.zeros(1, channels, 8, 8), torch.tensor([3])
    message = f"the network has {channels} output channels; variance '.*' needs {process.output_channels(4)}"
    with pytest.raises(ValueError, match=message):
        process.p_mean_variance(sample, x, t)
    with pytest.raises(ValueError, match=message):
        process.losses(sample, x, x, t, x)


def test_one_channel_is_not_broadcast_against_two() -> None:
    process = create_diffusion(learn_sigma=False)
    x, t = torch.zeros(1, 1, 8, 8), torch.tensor([3])
    with pytest.raises(ValueError, match="the network has 2 output channels; variance 'fixed_large' needs 1"):
        process.losses(torch.zeros(1, 2, 8, 8), x, x, t, x)
    with pytest.raises(ValueError, match=r"the network's output has shape \(1, 1, 1, 8\); x needs \(1, 1, 8, 8\)"):
        process.losses(torch.zeros(1, 1, 1, 8), x, x, t, x)


# ----------------------------------------------------------------------------------------------------------------------
# Forward process


def test_forward_process_equals_the_recorded_one() -> None:
    process, g = create_diffusion(), LEARNED
    assert_close(process.q_sample(g["x0"], g["t"], g["noise"]), g["q_sample"], 1e-6)
    q = process.q_mean_variance(g["x0"], g["t"])
    assert_close(q.mean, g["q_mean"], 1e-6)
    assert_close(q.log_variance.expand_as(q.mean), g["q_log_variance"], 1e-6)
    assert_close(q.log_variance.exp().expand_as(q.mean), g["q_variance"], 1e-6)


def test_posterior_equals_the_recorded_one() -> None:
    process, g = create_diffusion(), LEARNED
    q = process.q_posterior(g["x0"], g["q_sample"], g["t"])
    assert_close(q.mean, g["q_posterior_mean"], 1e-6)
    assert_close(q.log_variance.expand_as(q.mean), g["q_posterior_log_variance"], 1e-6)
    variance = process.device_tables(g["t"].device)["posterior_variance"][g["t"]].view(-1, 1, 1, 1)
    assert_close(variance.expand_as(q.mean), g["q_posterior_variance"], 1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("index", [0, 500, 999])
def test_every_prediction_gives_image_and_noise(index: int, prediction: Prediction) -> None:
    process = create_diffusion(learn_sigma=False, prediction=prediction)
    x_start, noise = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    x_t = process.q_sample(x_start, index, noise)
    abar = process.tables["alphas_cumprod"][index]
    output = true_prediction(prediction, x_start, noise, abar**0.5, (1 - abar) ** 0.5)
    torch.testing.assert_close(process.pred_xstart(output, x_t, index), x_start)
    torch.testing.assert_close(process.pred_noise(x_start, x_t, index), noise)


@pytest.mark.parametrize("t", [3, torch.tensor([999, 0])])
def test_a_clip_is_noised_row_by_row(t: int | Tensor) -> None:
    """(2, 2, 4, 8, 8) has as many frames as rows: coefficients of the wrong axis would broadcast unseen."""
    process, (x_start, noise) = create_diffusion(learn_sigma=False), torch.randn(2, 2, 2, 4, 8, 8)
    x_t = process.q_sample(x_start, t, noise)
    for row, index in enumerate(torch.as_tensor(t).expand(2).tolist()):
        abar = process.tables["alphas_cumprod"][index]
        assert_close(x_t[row], abar**0.5 * x_start[row] + (1 - abar) ** 0.5 * noise[row], 1e-6)
        assert_close(process.pred_xstart(noise, x_t, t)[row], x_start[row], 1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Reverse process


@pytest.mark.parametrize("clip", [0, 1])
def test_p_mean_variance_equals_the_recorded_one(clip: int) -> None:
    g = LEARNED
    p = create_diffusion().p_mean_variance(g["model_output"], g["q_sample"], g["t"], clip_denoised=bool(clip))
    assert_close(p.mean, g[f"p_mean_clip{clip}"])
    assert_close(p.log_variance, g[f"p_log_variance_clip{clip}"])
    assert_close(p.log_variance.exp(), g[f"p_variance_clip{clip}"])
    assert_close(p.pred_xstart, g[f"p_pred_xstart_clip{clip}"])


@pytest.mark.parametrize("variance", ["large", "small"])
def test_fixed_variances_equal_the_recorded_ones(variance: str) -> None:
    g, x_t, sample = FIXED, *fixed_variance_output()
    process = create_diffusion(learn_sigma=False, sigma_small=variance == "small")
    p = process.p_mean_variance(sample, x_t, g["t"])
    assert_close(p.mean, g[f"{variance}_p_mean"])
    assert_close(p.pred_xstart, g[f"{variance}_p_pred_xstart"])
    assert_close(p.log_variance.flatten(), g[f"{variance}_p_log_variance"], 1e-6)
    positive = g[f"{variance}_p_variance"] > 0  # fixed_small is 0 at index 0, where its logarithm is clipped
    assert_close(p.log_variance.exp().flatten()[positive], g[f"{variance}_p_variance"][positive])


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("sigma_small", [True, False])
def test_a_number_for_the_index_equals_a_tensor(learn_sigma: bool, sigma_small: bool) -> None:
    process = create_diffusion("50", learn_sigma=learn_sigma, sigma_small=sigma_small)
    x, sample = torch.randn(3, 4, 8, 8), torch.randn(3, process.output_channels(4), 8, 8)
    for index in (0, 1, 30, 49):
        number = process.p_mean_variance(sample, x, index)
        tensor = process.p_mean_variance(sample, x, torch.full((3,), index))
        assert_close(number.mean, tensor.mean, 1e-6)
        spread = torch.as_tensor(number.log_variance).expand_as(x)
        assert_close(spread, tensor.log_variance.expand_as(x), 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_at_the_true_target_is_zero(prediction: Prediction, learn_sigma: bool) -> None:
    process = create_diffusion("50", learn_sigma=learn_sigma, prediction=prediction)
    x_start, noise = torch.randn(2, 6, *CLIP)
    t = torch.tensor([0, 1, 20, 35, 48, 49])
    outputs = []
    for row, index in enumerate(t.tolist()):
        abar = process.tables["alphas_cumprod"][index]
        outputs.append(true_prediction(prediction, x_start[row], noise[row], abar**0.5, (1 - abar) ** 0.5))
    sample = torch.stack(outputs)
    sample = torch.cat([sample, -torch.ones_like(sample)], dim=-3) if learn_sigma else sample
    losses = process.losses(sample, x_start, process.q_sample(x_start, t, noise), t, noise)
    assert losses["mse"].shape == (6,) and losses["mse"].max() < 1e-12
    if learn_sigma:  # at the variance of the posterior, all but the last term of the bound are 0 too
        assert losses["vb"][1:].abs().max() < 1e-4


@pytest.mark.parametrize("gamma", [5.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_as_published(prediction: Prediction, gamma: float) -> None:
    """Hang et al., 2023: min(snr, gamma) / snr for epsilon, min(snr, gamma) for x_start, / (snr + 1) for v."""
    process = GaussianDiffusion(
        named_betas("linear", 1000),
        prediction=prediction,
        variance="fixed_large",
        loss_weight="min_snr",
        min_snr_gamma=gamma,
    )
    t = torch.tensor([0, 100, 300, 600, 999])
    snr = torch.from_numpy(1 / (1 / process.tables["alphas_cumprod"][t] - 1))
    clipped = snr.clamp(max=gamma)
    expected = {
        "epsilon": clipped / snr,
        "x_start": clipped,
        "v": clipped / (snr + 1),
        "velocity": clipped / (snr.sqrt() + 1) ** 2,  # its errors are (alpha + sigma) / sigma times those of x_start
    }[prediction]
    sample, x_start, noise = torch.randn(3, 5, 4, 8, 8)
    losses = process.losses(sample, x_start, process.q_sample(x_start, t, noise), t, noise)
    torch.testing.assert_close(losses["loss"] / losses["mse"], expected.float())


def test_min_snr_leaves_the_variational_term_alone() -> None:
    g, weighted = LEARNED, GaussianDiffusion(named_betas("linear", 1000), loss_weight="min_snr")
    losses = weighted.losses(g["model_output"], g["x0"], g["q_sample"], g["t"], g["noise"])
    plain = create_diffusion().losses(g["model_output"], g["x0"], g["q_sample"], g["t"], g["noise"])
    assert torch.equal(losses["vb"], plain["vb"]) and torch.equal(losses["mse"], plain["mse"])
    weight = weighted.device_tables(g["t"].device)["min_snr_weight"][g["t"]]
    torch.testing.assert_close(losses["loss"], weight * plain["mse"] + plain["vb"])


def fixed_variance_output() -> tuple[Tensor, Tensor]:
    """x_t and the raw output of the network without variance channels."""
    g = FIXED
    x_t = create_diffusion().q_sample(g["x0"], g["t"], g["noise"])
    with torch.no_grad():
        return x_t, tiny_dit("tiny_p4_nosigma")(x_t, g["t"], y=g["y"]).sample


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        ({}, {"mse": "loss_mse", "vb": "loss_vb", "loss": "loss"}),
        ({"rescale_learned_sigmas": True}, {"mse": "rescaled_mse", "vb": "rescaled_vb", "loss": "rescaled_loss"}),
        ({"use_kl": True}, {"loss": "kl_loss"}),
        ({"predict_xstart": True}, {"mse": "xstart_mse", "vb": "xstart_vb", "loss": "xstart_loss"}),
    ],
)
def test_losses_equal_the_recorded_ones(arguments: dict[str, bool], recorded: dict[str, str]) -> None:
    g = LEARNED
    losses = create_diffusion(**arguments).losses(g["model_output"], g["x0"], g["q_sample"], g["t"], g["noise"])
    assert losses.keys() == recorded.keys()
    for name, key in recorded.items():
        assert_close_elementwise(losses[name], g[key])


@torch.no_grad()
@pytest.mark.parametrize("rescaled", [False, True])
def test_losses_on_a_respaced_process_equal_the_recorded_ones(network: DiT, rescaled: bool) -> None:
    g, process = LEARNED, create_diffusion("50", rescale_learned_sigmas=rescaled)
    x_t = process.q_sample(g["x0"], g["t_respaced"], g["noise"])
    assert_close(x_t, g["respaced_q_sample"], 1e-6)
    sample = network(x_t, process.to_time(g["t_respaced"]), y=g["y"]).sample
    losses = process.losses(sample, g["x0"], x_t, g["t_respaced"], g["noise"])
    for name, value in losses.items():
        assert_close_elementwise(value, g[f"respaced_rescaled_{name}" if rescaled else f"respaced_{name}"])


@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("use_kl", [False, True])
def test_losses_with_a_fixed_variance_equal_the_recorded_ones(variance: str, use_kl: bool) -> None:
    g, x_t, sample = FIXED, *fixed_variance_output()
    process = create_diffusion(learn_sigma=False, sigma_small=variance == "small", use_kl=use_kl)
    losses = process.losses(sample, g["x0"], x_t, g["t"], g["noise"])
    recorded = {"loss": "kl_loss"} if use_kl else {"loss": "loss", "mse": "mse"}
    assert losses.keys() == recorded.keys()
    for name, key in recorded.items():
        assert_close_elementwise(losses[name], g[f"{variance}_{key}"])


@pytest.mark.parametrize("name", ["vb", "loss"])
def test_gradients_with_respect_to_the_raw_output_equal_the_recorded_ones(name: str) -> None:
    g, sample = LEARNED, LEARNED["model_output"].clone().requires_grad_()
    losses = create_diffusion().losses(sample, g["x0"], g["q_sample"], g["t"], g["noise"])
    losses[name].mean().backward()
    reference, decoder = g[f"grad_{name}_wrt_output"], g["t"] == 0
    assert_close(sample.grad[~decoder], reference[~decoder])
    # Differences of nearly equal bin edges: the tolerance of losses, as recorded with the fixture.
    assert_close(sample.grad[decoder], reference[decoder], 1e-4)


def test_the_variational_term_leaves_the_prediction_alone() -> None:
    g, sample = LEARNED, LEARNED["model_output"].clone().requires_grad_()
    create_diffusion().losses(sample, g["x0"], g["q_sample"], g["t"], g["noise"])["vb"].sum().backward()
    prediction, value = sample.grad.chunk(2, dim=1)
    assert not prediction.any() and value.any()


def test_losses_of_a_half_precision_output_are_computed_in_float32() -> None:
    g, half = LEARNED, LEARNED["model_output"].bfloat16()
    losses = create_diffusion().losses(half, g["x0"], g["q_sample"], g["t"], g["noise"])
    reference = create_diffusion().losses(half.float(), g["x0"], g["q_sample"], g["t"], g["noise"])
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, reference[name])


@pytest.mark.parametrize("clip", [0, 1])
def test_variational_bound_equals_the_recorded_one(clip: int) -> None:
    g = LEARNED
    value = create_diffusion().variational_bound(
        g["model_output"], g["x0"], g["q_sample"], g["t"], clip_denoised=bool(clip)
    )
    assert_close_elementwise(value, g[f"vb_terms_bpd_clip{clip}"])


def test_prior_equals_the_recorded_one() -> None:
    assert_close_elementwise(create_diffusion().prior_bpd(LEARNED["x0"]), LEARNED["prior_bpd"])


def test_bits_per_dimension_equal_the_recorded_ones(network: DiT) -> None:
    g = arrays("dit/diffusion/calc_bpd_10")
    noises = iter(g["noises"])
    result = create_diffusion("10").bits_per_dimension(
        guided(network, {"y": g["y"]}), g["x_0"], noise_fn=lambda x: next(noises)
    )
    for name in ("vb", "xstart_mse", "mse", "prior_bpd", "total_bpd"):
        assert_close_elementwise(result[name], g[name])
    assert next(noises, None) is None


def test_a_network_that_knows_the_noise_pays_for_the_prior_and_the_last_bin_only() -> None:
    process, x = create_diffusion("20", learn_sigma=False, sigma_small=True), torch.rand(2, 1, 8, 8) * 1.8 - 0.9
    drawn: list[Tensor] = []

    def noise_fn(x: Tensor) -> Tensor:
        drawn.append(torch.randn_like(x))
        return drawn[-1]

    def denoise(x_t: Tensor, evaluation: object, state: object = None, /) -> ModelOutput:
        return ModelOutput(drawn[-1])

    result = process.bits_per_dimension(denoise, x, noise_fn=noise_fn)
    assert result["vb"].shape == (2, 20)
    assert result["vb"][:, :-1].abs().max() < 1e-6
    assert result["mse"].max() < 1e-6 and result["xstart_mse"].max() < 1e-6
    # The decoder is centred on the right value: its cost is the mass outside that value's bin of half-width 1/255.
    deviation = math.exp(0.5 * process.tables["posterior_log_variance_clipped"][0])
    bits = -math.log2(math.erf(1 / 255 / deviation / math.sqrt(2)))
    torch.testing.assert_close(result["vb"][:, -1], torch.full((2,), bits), rtol=1e-3, atol=0)
    torch.testing.assert_close(result["total_bpd"], result["prior_bpd"] + result["vb"].sum(dim=1))
