"""Likelihood terms against recorded values and against the distributions they stand for."""

import math

import pytest
import torch

from diffusion.gaussian_likelihood import approx_standard_normal_cdf, discretized_gaussian_log_likelihood, normal_kl
from tests.golden_data import arrays, assert_close_elementwise

GOLDEN = arrays("dit/diffusion/losses_learned_range")


def test_discretized_likelihood_equals_the_recorded_one() -> None:
    value = discretized_gaussian_log_likelihood(GOLDEN["dgll_x"], GOLDEN["dgll_means"], GOLDEN["dgll_log_scales"])
    assert_close_elementwise(value, GOLDEN["dgll"])


def test_cdf_equals_the_recorded_one_and_is_near_the_true_one() -> None:
    x = 4 * GOLDEN["dgll_x"]
    assert_close_elementwise(approx_standard_normal_cdf(x), GOLDEN["cdf_approx"])
    assert (approx_standard_normal_cdf(x) - torch.special.ndtr(x)).abs().max() < 5e-4


def test_kl_equals_the_recorded_one() -> None:
    first, second = (GOLDEN["kl_m1"], GOLDEN["kl_lv1"]), (GOLDEN["kl_m2"], GOLDEN["kl_lv2"])
    assert_close_elementwise(normal_kl(*first, *second), GOLDEN["kl"])
    assert_close_elementwise(normal_kl(*first, 0.0, 0.0), GOLDEN["kl_scalar"])


def test_kl_equals_torchs() -> None:
    m1, lv1, m2, lv2 = torch.randn(4, 50, dtype=torch.float64)
    normal = torch.distributions.Normal
    reference = torch.distributions.kl_divergence(normal(m1, (lv1 / 2).exp()), normal(m2, (lv2 / 2).exp()))
    torch.testing.assert_close(normal_kl(m1, lv1, m2, lv2), reference)


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, -2.0), (0.9, -1.0), (-1.2, -3.0)])
def test_probabilities_of_all_256_levels_sum_to_one(mean: float, log_scale: float) -> None:
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_mass = discretized_gaussian_log_likelihood(levels, torch.full_like(levels, mean), log_scale)
    assert log_mass.exp().sum().item() == pytest.approx(1.0, abs=1e-9)


def test_likelihood_far_from_the_mean_is_bounded_and_differentiable() -> None:
    means = torch.tensor([50.0, -50.0, 0.0], requires_grad=True)
    value = discretized_gaussian_log_likelihood(torch.zeros(3), means, -4.0)
    value.sum().backward()
    assert value[0].item() == pytest.approx(math.log(1e-12))
    assert means.grad is not None and means.grad.isfinite().all()
