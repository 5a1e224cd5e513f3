"""Flow matching: recorded losses, the path, its times, and the way between velocity, image and noise."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusion.flow_matching import LossWeight
from torch import Tensor

from diffusion import Batch, Draws, FlowMatching, Objective, create_diffusion
from diffusion.schedules import shift_time, unit_grid, unit_to_network
from tests.golden_data import arrays, assert_close
from tests.golden_ddt import LOSS, assert_within, golden_ddt
from tests.networks import debug_network

SHAPE = (4, 8, 8)
DISTRIBUTIONS: list[Any] = ["logit_normal", "uniform"]


def recorded(golden: dict[str, Tensor], prefix: str = "") -> tuple[Batch, Draws]:
    """A fixture's batch and draws."""
    noise, t = golden[f"{prefix}noise"], golden[f"{prefix}t"]
    dropped = golden.get("drop_mask", torch.zeros(len(t), dtype=torch.bool))
    batch = Batch(golden["x"], golden["y"], torch.arange(len(t)), golden.get("raw"))
    return batch, Draws(t, noise, torch.zeros_like(noise), dropped[None])


# ----------------------------------------------------------------------------------------------------------------------
# Recorded losses


@torch.no_grad()
@pytest.mark.parametrize(
    ("prefix", "name"),
    [("fm_uniform.", "loss"), ("fm_lognorm.", "loss"), ("cos.", "fm_loss"), ("disperse.", "fm_loss")],
)
def test_injected_draws_give_the_recorded_loss(prefix: str, name: str) -> None:
    golden = arrays("ddt/train/idit_plain")
    losses = Objective(golden_ddt("idit"), FlowMatching())(*_with_step(recorded(golden, prefix)))
    assert_within(losses["loss"].mean(), golden[prefix + name], LOSS)
    assert torch.equal(losses["loss"], losses["mse"])


@torch.no_grad()
def test_the_loss_of_directions_is_the_recorded_one() -> None:
    golden = arrays("ddt/train/idit_plain")
    losses = Objective(golden_ddt("idit"), FlowMatching(direction=1.0))(*_with_step(recorded(golden, "cos.")))
    assert_within(losses["direction"].mean(), golden["cos.cos_loss"], LOSS)
    assert_within(losses["loss"].mean(), golden["cos.loss"], LOSS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddt_a_repa", "ddt_a_repa_resize_down", "ddt_a_repa_resize_up", "idit_repa"])
def test_dropped_labels_give_the_recorded_flow_loss(name: str) -> None:
    golden, network = arrays(f"ddt/train/{name}"), golden_ddt(name.split("_repa")[0])
    assert torch.equal(torch.where(golden["drop_mask"], network.null_class, golden["y"]), golden["y_used"])
    losses = Objective(network, FlowMatching())(*_with_step(recorded(golden)))
    assert_within(losses["loss"].mean(), golden["fm_loss"], LOSS)


def _with_step(batch_and_draws: tuple[Batch, Draws]) -> tuple[Batch, int, Draws]:
    batch, draws = batch_and_draws
    return batch, 0, draws


# ----------------------------------------------------------------------------------------------------------------------
# Times


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_shifted_times_are_the_recorded_ones(shift: float) -> None:
    golden = arrays("ddt/misc")[f"shift.{shift}"]
    assert_within(shift_time(torch.linspace(0, 1, 9), shift), golden, 1e-6)
    # Eight steps of a grid and its end are the same nine times.
    assert_within(torch.tensor(unit_grid(8, shift)), golden, 1e-6)


def draw(process: FlowMatching, count: int = 40_000) -> Tensor:
    return process.draw_times(count, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("times", "quartiles"), [("uniform", (0.25, 0.5, 0.75)), ("logit_normal", (0.337, 0.5, 0.663))]
)
def test_times_have_their_distribution(times: Any, quartiles: tuple[float, ...]) -> None:
    t = draw(FlowMatching(times=times))
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    assert t.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist() == pytest.approx(quartiles, abs=0.01)
    if times == "logit_normal":
        logits = t.double().logit()
        assert abs(logits.mean()) < 0.02 and abs(logits.std() - 1) < 0.02


@pytest.mark.parametrize("times", DISTRIBUTIONS)
def test_a_shift_moves_the_drawn_times_towards_noise(times: Any) -> None:
    t, shifted = draw(FlowMatching(times=times)), draw(FlowMatching(times=times, shift=2.0))
    assert_close(shifted, t / (t + (1 - t) * 2), 1e-6)


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("times", DISTRIBUTIONS)
def test_stratified_times_stay_in_their_parts_with_the_distribution_they_have_there(times: Any, shift: float) -> None:
    process = FlowMatching(times=times, shift=shift)
    t = process.stratified_times(40_000, 4, torch.Generator().manual_seed(0)).view(-1, 4)
    free = draw(process, 400_000)
    for part in range(4):
        low, high = 1 - (part + 1) / 4, 1 - part / 4  # part 0 is the cleanest
        assert low <= t[:, part].min() and t[:, part].max() <= high
        inside = free[(low < free) & (free < high)]
        levels = torch.tensor([0.1, 0.5, 0.9])
        assert t[:, part].quantile(levels).tolist() == pytest.approx(inside.quantile(levels).tolist(), abs=0.01)


def test_times_are_told_in_the_networks_units() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    assert FlowMatching().network_times(t, "unit") is t
    assert FlowMatching().network_times(t, "index").tolist() == [1000, 750, 0]
    assert unit_to_network(0.3, "index") == 700


def test_draws_of_a_step_are_flow_times() -> None:
    objective = Objective(debug_network("DDT"), FlowMatching(), seed=3)
    draws = objective.draw(5, 64, SHAPE)
    assert draws.t.dtype == torch.float32 and 0 < draws.t.min() and draws.t.max() < 1
    assert torch.equal(draws.t, Objective(debug_network("DDT"), FlowMatching(), seed=3).draw(5, 64, SHAPE).t)


# ----------------------------------------------------------------------------------------------------------------------
# The path, and what can be said at a point of it


def test_the_path_runs_from_noise_to_data_at_constant_velocity() -> None:
    flow, (x_start, noise) = FlowMatching(), torch.randn(2, 3, *SHAPE)
    assert torch.equal(flow.q_sample(x_start, torch.zeros(3), noise), noise)
    assert torch.equal(flow.q_sample(x_start, torch.ones(3), noise), x_start)
    t = torch.tensor([0.1, 0.4, 0.8])
    moved = flow.q_sample(x_start, t + 0.1, noise) - flow.q_sample(x_start, t, noise)
    assert_close(moved, 0.1 * (x_start - noise), 1e-5)


@pytest.mark.parametrize("t", [0.3, torch.tensor([0.1, 0.4, 0.8])])
def test_velocity_image_and_noise_give_each_other(t: float | Tensor) -> None:
    flow, (x_start, noise) = FlowMatching(), torch.randn(2, 3, *SHAPE)
    x_t, velocity = flow.q_sample(x_start, torch.as_tensor(t).expand(3), noise), x_start - noise
    assert_close(flow.pred_xstart(velocity, x_t, t), x_start)
    assert_close(flow.pred_noise(velocity, x_t, t), noise)
    assert_close(flow.velocity_from_xstart(x_start, x_t, t), velocity)
    assert_close(flow.velocity_from_noise(noise, x_t, t), velocity)


# ----------------------------------------------------------------------------------------------------------------------
# Weights of the loss

RATIO: dict[LossWeight, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "inverse_variance": lambda t: 1 / (1 - t) ** 2,
    "ratio": lambda t: t / (1 - t),
    "ratio_at_least_5": lambda t: max(5.0, t / (1 - t)),
    "ratio_at_most_5": lambda t: min(5.0, t / (1 - t)),
}


@pytest.mark.parametrize("weight", RATIO)
def test_the_squared_error_is_weighted_by_time(weight: LossWeight) -> None:
    t = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.99])
    sample, x_start, noise = torch.randn(3, 5, *SHAPE)
    flow = FlowMatching(weight=weight)
    losses = flow.losses(sample, x_start, flow.q_sample(x_start, t, noise), t, noise)
    mse = (sample - x_start + noise).square().flatten(1).mean(dim=1)
    assert_close(losses["mse"], mse, 1e-6)
    assert_close(losses["loss"], mse * torch.tensor([RATIO[weight](value) for value in t.tolist()]), 1e-5)


def test_directions_that_agree_cost_nothing_and_opposite_ones_two() -> None:
    x_start, noise = torch.randn(2, 3, *SHAPE)
    t, flow = torch.full((3,), 0.5), FlowMatching(direction=0.5)
    for factor, cost in ((3.0, 0.0), (-0.1, 2.0)):
        losses = flow.losses(factor * (x_start - noise), x_start, x_start, t, noise)
        assert losses["direction"].tolist() == pytest.approx([cost] * 3, abs=1e-5)
        assert_close(losses["loss"], losses["mse"] + 0.5 * cost, 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Both processes with both kinds of network


@pytest.mark.parametrize("family", ["DiT", "DDT"])
@pytest.mark.parametrize("process", ["gaussian", "flow"])
def test_networks_of_either_time_train_under_either_process(family: str, process: str) -> None:
    network = debug_network(family, **({"learn_sigma": False} if family == "DiT" else {}))
    processes = {"flow": FlowMatching(), "gaussian": create_diffusion(learn_sigma=False)}
    told: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, arguments: told.append(arguments[1]))
    objective = Objective(network, processes[process])
    batch = Batch(torch.randn(64, *SHAPE), torch.arange(64) % 10, torch.arange(64))
    objective(batch, 0)["loss"].mean().backward()
    highest = {"unit": 1.0, "index": 1000.0}[network.time_convention]
    assert 0 <= told[0].min() < 0.3 * highest and 0.7 * highest < told[0].max() <= highest
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_a_network_that_predicts_a_variance_is_refused() -> None:
    with pytest.raises(ValueError, match="the network puts out 8 channels, but the process needs 4 for 4 input"):
        Objective(debug_network("DiT"), FlowMatching())
    with pytest.raises(ValueError, match="the network puts out 8 channels; a velocity has 4"):
        FlowMatching().losses(
            torch.randn(1, 8, 8, 8), *torch.randn(2, 1, 4, 8, 8), torch.ones(1), torch.ones(1, *SHAPE)
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": "normal"}, "'normal' is none of logit_normal, uniform"),
        ({"weight": "min_snr"}, "'min_snr' is none of constant, inverse_variance"),
        ({"shift": 0.0}, "the time shift must be positive and finite, not 0.0"),
        ({"shift": math.inf}, "the time shift must be positive and finite, not inf"),
        ({"direction": -1.0}, "the weight of the direction must not be negative, and finite, not -1.0"),
    ],
)
def test_settings_without_a_meaning_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatching(**settings)
