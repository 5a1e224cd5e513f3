"""Schedules against recorded arrays, conversions of times, and error messages."""

from typing import Any

import numpy as np
import pytest
import torch

from diffusion.schedules import append_dims, convert_time, named_betas, shift_time, space_timesteps
from tests.golden_data import arrays, table
from tests.official_schedules import endpoint_betas

CASES = table("dit/diffusion/space_timesteps")
BETAS = arrays("dit/diffusion/named_betas")


@pytest.mark.parametrize("key", [key for key in BETAS if not key.startswith("legacy")])
def test_named_betas_equal_the_recorded_ones(key: str) -> None:
    name = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[key.split("_")[0]]
    betas = named_betas(name, int(key.split("_")[-1]))
    np.testing.assert_allclose(betas, BETAS[key].numpy(), rtol=1e-12, atol=0)
    assert betas.dtype == np.float64


@pytest.mark.parametrize("key", [key for key in BETAS if key.startswith("legacy")])
def test_endpoint_betas_equal_the_recorded_ones(key: str) -> None:
    betas = endpoint_betas(key.split("_")[1], 1e-4, 2e-2, 200)
    np.testing.assert_allclose(betas, BETAS[key].numpy(), rtol=1e-12, atol=0)


def test_the_older_linear_schedule_is_the_scaled_one_at_1000_steps() -> None:
    np.testing.assert_allclose(endpoint_betas("linear", 1e-4, 2e-2, 1000), named_betas("linear", 1000), rtol=1e-12)


def test_unknown_schedules_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown noise schedule 'cosine'; known: linear, squaredcos_cap_v2"):
        named_betas("cosine", 1000)
    with pytest.raises(ValueError, match="unknown noise schedule 'cubic'; known: quad, linear, .*jsd"):
        endpoint_betas("cubic", 1e-4, 2e-2, 1000)


def test_betas_above_one_are_refused() -> None:
    assert named_betas("linear", 20).max() == 1.0
    with pytest.raises(ValueError, match=r"betas must be in \(0, 1\], but range over"):
        named_betas("linear", 19)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['num_timesteps']}-{case['section_counts']}")
def test_space_timesteps_equals_the_recorded_choice(case: dict[str, Any]) -> None:
    if "error" in case:
        with pytest.raises(ValueError, match="step spec"):
            space_timesteps(case["num_timesteps"], case["section_counts"])
    else:
        assert space_timesteps(case["num_timesteps"], case["section_counts"]) == case["result"]


def test_an_empty_spec_keeps_all_timesteps() -> None:
    assert space_timesteps(7, "") == list(range(7))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ddim999", "step spec 'ddim999': no integer stride through 1000 timesteps makes 999 steps"),
        ("ddim0", "step spec 'ddim0': no integer stride through 1000 timesteps makes 0 steps"),
        ("ddim", "step spec 'ddim' is not understood; examples: '250', '10,15,20', 'ddim50'"),
        ("fast", "step spec 'fast' is not understood"),
        ("10,,5", "step spec '10,,5' is not understood"),
        ("0", "step spec '0' keeps no timestep; give a positive count such as '250'"),
        ("-5", "step spec '-5' keeps no timestep"),
        ([], r"step spec \[\] keeps no timestep"),
        ("1001", "step spec '1001' asks for 1001 of the 1000 timesteps of section 1"),
        ("300,600", "step spec '300,600' asks for 600 of the 500 timesteps of section 2"),
    ],
)
def test_specs_that_cannot_be_met_are_named(spec: str | list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space_timesteps(1000, spec)


def test_shift_moves_time_towards_noise_and_keeps_the_ends() -> None:
    assert [shift_time(t, 3.0) for t in (0.0, 0.5, 1.0)] == [0.0, 0.25, 1.0]
    assert shift_time(0.3, 1.0) == 0.3
    # Two shifts compose to their product.
    assert shift_time(shift_time(0.7, 2.0), 3.0) == pytest.approx(shift_time(0.7, 6.0))


# ----------------------------------------------------------------------------------------------------------------------
# Conversions and broadcasting


def test_a_timestep_becomes_a_flow_time_and_back() -> None:
    assert convert_time(250.0, "index", "unit") == 0.75  # 1 is data, 0 is noise
    assert convert_time(0.3, "unit", "index") == 700
    ends = convert_time(torch.tensor([0.0, 1000.0]), "index", "unit")
    assert ends.tolist() == [1.0, 0.0]
    for index in range(1001):
        assert convert_time(convert_time(float(index), "index", "unit"), "unit", "index") == pytest.approx(index)


def test_a_time_of_the_same_convention_is_the_same_object() -> None:
    t = torch.rand(3)
    assert convert_time(t, "unit", "unit") is t and convert_time(t, "index", "index") is t


@pytest.mark.parametrize("conventions", [("sigma", "unit"), ("unit", "sigma"), ("sigma", "sigma")])
def test_an_unknown_convention_is_answered_with_the_known_ones(conventions: Any) -> None:
    with pytest.raises(ValueError, match="unknown time convention 'sigma'; known: index, unit"):
        convert_time(0.5, *conventions)


@pytest.mark.parametrize("shape", [(2,), (2, 7), (2, 4, 8, 8), (2, 2, 4, 8, 8)])
def test_coefficients_of_rows_broadcast_over_any_rank(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    scaled = append_dims(torch.tensor([2.0, 3.0]), x) * x
    assert scaled.shape == x.shape and (scaled[0] == 2).all() and (scaled[1] == 3).all()
    assert append_dims(0.5, x) == 0.5
