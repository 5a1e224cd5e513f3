"""Schedules against recorded arrays, and what they say to a mistake."""

from typing import Any

import numpy as np
import pytest
import torch

from diffusion.schedules import (
    endpoint_betas,
    index_to_network,
    named_betas,
    network_to_index,
    shift_time,
    space_timesteps,
)
from tests.golden_data import arrays, table

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
    with pytest.raises(ValueError, match=r"betas must lie in \(0, 1\], but range over"):
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


def test_index_scale_in_the_networks_units() -> None:
    assert index_to_network(250, "index") == 250
    assert index_to_network(250, "unit") == 0.75  # 1 is data, 0 is noise
    torch.testing.assert_close(index_to_network(torch.tensor([0.0, 1000.0]), "unit"), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="unknown time convention 'sigma'; known: index, unit"):
        index_to_network(250, "sigma")


def test_a_network_s_time_on_the_index_scale_comes_back_as_it_was() -> None:
    for convention in ("index", "unit"):
        for index in range(1001):
            assert network_to_index(index_to_network(index, convention), convention) == index
    assert network_to_index(0.3333, "unit") == 666.7
    with pytest.raises(ValueError, match="unknown time convention 'sigma'; known: index, unit"):
        network_to_index(0.5, "sigma")
