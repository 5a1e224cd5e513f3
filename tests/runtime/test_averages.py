"""The share of the first weights in an average, against the average that training keeps."""

import pytest
import torch

from runtime.averages import average_warning, first_share
from training.optimization import EMA


@pytest.mark.parametrize("ramp", [False, True])
@pytest.mark.parametrize(("decay", "updates"), [(0.9999, 1), (0.99, 3), (0.9, 40), (0.998, 0)])
def test_the_share_is_that_of_the_average(decay: float, updates: int, ramp: bool) -> None:
    """First weights of 1, and 0 from the first update on: the average is the share."""
    network = torch.nn.Linear(1, 1).double()
    torch.nn.init.ones_(network.weight)
    average = EMA(network, decay, ramp=ramp)
    torch.nn.init.zeros_(network.weight)
    for _ in range(updates):
        average.update()
    assert first_share(decay, updates, ramp=ramp) == pytest.approx(average.network.weight.item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("ramp", [False, True])
def test_shares_of_parts_multiply(ramp: bool) -> None:
    parts = first_share(0.99, 5, ramp=ramp) * first_share(0.99, 7, ramp=ramp, start=5)
    assert parts == pytest.approx(first_share(0.99, 12, ramp=ramp), rel=1e-12)


def test_a_long_run_with_a_ramp_needs_no_long_sum() -> None:
    assert first_share(0.9999, 10**12, ramp=True) == 0


def test_only_a_share_that_is_seen_is_warned_of() -> None:
    options = {"ramp": False, "from_weights": False, "when": "at the end"}
    assert average_warning(0.9999, 30_000, **options) is None
    assert average_warning(0.9999, 200, **options) == (
        "at --ema-decay 0.9999 the average still holds 98% of the untrained weights at the end"
    )
