"""Flow matching: recorded losses, the path, its times, and the way between velocity, image and noise."""

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from diffusion import Batch, DiffusionLoss, Draws, FlowMatching
from diffusion.flow import FlowPrediction, FlowWeight
from diffusion.predictions import Prediction
from diffusion.schedules import shift_time, unit_grid
from tests.golden_data import arrays, assert_close
from tests.golden_ddt import LOSS, assert_within, golden_ddt
from tests.toys import CLIP, true_prediction

SHAPE = (4, 8, 8)
PREDICTIONS: tuple[FlowPrediction, ...] = get_args(FlowPrediction)
DISTRIBUTIONS: list[Any] = ["logit_normal", "uniform"]


def recorded_losses(
    network: str, process: FlowMatching, golden: dict[str, Tensor], prefix: str = ""
) -> dict[str, Tensor]:
    """Losses for a fixture's batch and draws."""
    t, dropped = golden[f"{prefix}t"], golden.get("drop_mask")
    batch = Batch(golden["x"], {"y": golden["y"]}, torch.arange(len(t)), golden.get("raw"))
    draws = Draws(t, golden[f"{prefix}noise"], None if dropped is None else dropped[None])
    return DiffusionLoss(golden_ddt(network), process)(batch, draws, 0, {})


# ----------------------------------------------------------------------------------------------------------------------
# Recorded losses


@torch.no_grad()
@pytest.mark.parametrize(
    ("prefix", "name"),
    [("fm_uniform.", "loss"), ("fm_lognorm.", "loss"), ("cos.", "fm_loss"), ("disperse.", "fm_loss")],
)
def test_injected_draws_give_the_recorded_loss(prefix: str, name: str) -> None:
    golden = arrays("ddt/train/idit_plain")
    losses = recorded_losses("idit", FlowMatching(), golden, prefix)
    assert_within(losses["loss"].mean(), golden[prefix + name], LOSS)
    assert torch.equal(losses["loss"], losses["mse"])


@torch.no_grad()
def test_the_cosine_loss_is_the_recorded_one() -> None:
    golden = arrays("ddt/train/idit_plain")
    losses = recorded_losses("idit", FlowMatching(cosine=1.0), golden, "cos.")
    assert_within(losses["cosine"].mean(), golden["cos.cos_loss"], LOSS)
    assert_within(losses["loss"].mean(), golden["cos.loss"], LOSS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddt_a_repa", "ddt_a_repa_resize_down", "ddt_a_repa_resize_up", "idit_repa"])
def test_dropped_labels_give_the_recorded_flow_loss(name: str) -> None:
    golden, network = arrays(f"ddt/train/{name}"), name.split("_repa")[0]
    null = golden_ddt(network).null_conditioning(len(golden["y"]))["y"]
    assert torch.equal(torch.where(golden["drop_mask"], null, golden["y"]), golden["y_used"])
    losses = recorded_losses(network, FlowMatching(), golden)
    assert_within(losses["loss"].mean(), golden["fm_loss"], LOSS)


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


def test_drawn_times_are_process_times() -> None:
    t = draw(FlowMatching(), 3)
    assert FlowMatching().to_time(t) is t and FlowMatching.time_convention == "unit"


# ----------------------------------------------------------------------------------------------------------------------
# The path, and what can be said at a point of it


def test_the_path_runs_from_noise_to_data_at_constant_velocity() -> None:
    flow, (x_start, noise) = FlowMatching(), torch.randn(2, 3, *SHAPE)
    assert torch.equal(flow.q_sample(x_start, torch.zeros(3), noise), noise)
    assert torch.equal(flow.q_sample(x_start, torch.ones(3), noise), x_start)
    t = torch.tensor([0.1, 0.4, 0.8])
    difference = flow.q_sample(x_start, t + 0.1, noise) - flow.q_sample(x_start, t, noise)
    assert_close(difference, 0.1 * (x_start - noise), 1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [0.3, torch.tensor([0.1, 0.4, 0.8])])
def test_every_prediction_gives_velocity_image_and_noise(t: float | Tensor, prediction: FlowPrediction) -> None:
    flow, (x_start, noise) = FlowMatching(prediction=prediction), torch.randn(2, 3, *CLIP)
    times = torch.as_tensor(t).expand(3)
    x_t, rows = flow.q_sample(x_start, times, noise), times.view(3, 1, 1, 1, 1)
    output = true_prediction(prediction, x_start, noise, rows, 1 - rows)
    targets: tuple[Prediction, ...] = get_args(Prediction)
    for target in targets:
        assert_close(flow.convert(output, x_t, t, target), true_prediction(target, x_start, noise, rows, 1 - rows))
    assert flow.convert(output, x_t, t, prediction) is output


def test_a_clip_is_noised_row_by_row() -> None:
    """(2, 2, 4, 8, 8) has as many frames as rows: coefficients of the wrong axis would broadcast unseen."""
    x_start, noise = torch.randn(2, 2, 2, 4, 8, 8)
    x_t = FlowMatching().q_sample(x_start, torch.tensor([0.25, 1.0]), noise)
    assert_close(x_t[0], 0.25 * x_start[0] + 0.75 * noise[0], 1e-6)
    assert torch.equal(x_t[1], x_start[1])


# ----------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_at_the_true_target_is_zero(prediction: FlowPrediction) -> None:
    flow, (x_start, noise) = FlowMatching(prediction=prediction, cosine=1.0), torch.randn(2, 4, *CLIP)
    t = torch.tensor([0.0, 0.3, 0.9, 1.0])
    output = true_prediction(prediction, x_start, noise, t.view(4, 1, 1, 1, 1), 1 - t.view(4, 1, 1, 1, 1))
    losses = flow.losses(output, x_start, flow.q_sample(x_start, t, noise), t, noise)
    assert all(value.shape == (4,) and value.abs().max() < 1e-6 for value in losses.values())


RATIO: dict[FlowWeight, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "inverse_variance": lambda t: 1 / (1 - t) ** 2,
    "ratio": lambda t: t / (1 - t),
    "ratio_at_least_5": lambda t: max(5.0, t / (1 - t)),
    "ratio_at_most_5": lambda t: min(5.0, t / (1 - t)),
}


@pytest.mark.parametrize("weight", RATIO)
def test_the_squared_error_is_weighted_by_time(weight: FlowWeight) -> None:
    t = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.99])
    sample, x_start, noise = torch.randn(3, 5, *SHAPE)
    flow = FlowMatching(weight=weight)
    losses = flow.losses(sample, x_start, flow.q_sample(x_start, t, noise), t, noise)
    mse = (sample - x_start + noise).square().flatten(1).mean(dim=1)
    assert_close(losses["mse"], mse, 1e-6)
    assert_close(losses["loss"], mse * torch.tensor([RATIO[weight](value) for value in t.tolist()]), 1e-5)


def test_equal_directions_cost_nothing_and_opposite_ones_two() -> None:
    x_start, noise = torch.randn(2, 3, *SHAPE)
    t, flow = torch.full((3,), 0.5), FlowMatching(cosine=0.5)
    for factor, cost in ((3.0, 0.0), (-0.1, 2.0)):
        losses = flow.losses(factor * (x_start - noise), x_start, x_start, t, noise)
        assert losses["cosine"].tolist() == pytest.approx([cost] * 3, abs=1e-5)
        assert_close(losses["loss"], losses["mse"] + 0.5 * cost, 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Misfits


def test_a_network_that_predicts_a_variance_is_refused() -> None:
    message = r"the network's output has shape \(1, 8, 8, 8\); a flow's x has \(1, 4, 8, 8\)"
    with pytest.raises(ValueError, match=message):
        FlowMatching().losses(
            torch.randn(1, 8, 8, 8), *torch.randn(2, 1, 4, 8, 8), torch.ones(1), torch.ones(1, *SHAPE)
        )
    with pytest.raises(ValueError, match="a flow has no variance to predict, and the network predicts one"):
        FlowMatching().make(learn_sigma=True)
    assert FlowMatching().make(learn_sigma=False) == FlowMatching()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"times": "normal"}, "'normal' is not one of logit_normal, uniform"),
        ({"weight": "min_snr"}, "'min_snr' is not one of constant, inverse_variance"),
        ({"shift": 0.0}, "the time shift must be positive and finite, not 0.0"),
        ({"shift": math.inf}, "the time shift must be positive and finite, not inf"),
        ({"cosine": -1.0}, "the weight of the cosine loss must not be negative, and finite, not -1.0"),
        (
            {"prediction": "epsilon"},
            r"no prediction 'epsilon' \(.* singular at time 0\); choose from velocity, x_start, v",
        ),
    ],
)
def test_settings_without_a_meaning_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatching(**settings)
