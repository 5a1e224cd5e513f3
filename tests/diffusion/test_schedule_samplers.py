"""Which timesteps are trained on: recorded draws, and the importance weights that keep the loss unbiased."""

import numpy as np
import pytest

from tests.golden_data import table
from tests.official_schedules import LossSecondMomentSampler, UniformSampler

GOLDEN = table("dit/diffusion/schedule_samplers")


def fed(updates: list[tuple[int, float]], **options: float) -> LossSecondMomentSampler:
    sampler = LossSecondMomentSampler(GOLDEN["num_timesteps"], **options)
    for t, loss in updates:
        sampler.update([t], [loss])
    return sampler


@pytest.mark.parametrize("row", GOLDEN["weights_after_updates"], ids=lambda row: row["count"])
def test_weights_equal_the_recorded_ones(row: dict[str, list[float]]) -> None:
    sampler = fed(GOLDEN["updates"][: row["count"]], history_per_term=10, uniform_prob=GOLDEN["uniform_prob"])
    np.testing.assert_allclose(sampler.weights(), row["weights"], rtol=1e-12)


@pytest.mark.parametrize("kind", ["uniform", "second_moment"])
def test_draws_equal_the_recorded_ones(kind: str) -> None:
    golden = GOLDEN[f"{kind}_sample"]
    sampler = UniformSampler(GOLDEN["num_timesteps"]) if kind == "uniform" else fed(GOLDEN["updates"])
    rng = np.random.RandomState(golden["numpy_global_seed"])
    indices, weights = sampler.sample(golden["batch"], rng)
    assert indices.tolist() == golden["indices"]
    np.testing.assert_allclose(weights, golden["importance_weights"])
    assert weights.dtype == np.float32


def test_draws_stay_uniform_until_every_timestep_has_a_full_history() -> None:
    updates = [(t, 100.0 if t else 1.0) for t in range(6) for _ in range(10)]
    assert not fed(updates[1:]).warmed_up
    assert (fed(updates[1:]).weights() == 1).all()
    assert fed(updates).warmed_up
    assert fed(updates).weights()[0] < fed(updates).weights()[1]


def test_warm_weights_are_the_root_mean_square_of_the_latest_losses() -> None:
    latest = np.random.default_rng(0).uniform(0.1, 4.0, size=(6, 3))
    # Two older losses per timestep must be forgotten.
    updates = [(t, loss) for t in range(6) for loss in (1e6, 1e6, *latest[t])]
    rms = np.sqrt((latest**2).mean(axis=1))
    expected = rms / rms.sum() * 0.9 + 0.1 / 6
    weights = fed(updates, history_per_term=3, uniform_prob=0.1).weights()
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert weights.sum() == pytest.approx(1)


def test_importance_weights_keep_the_expected_loss() -> None:
    updates = [(t, float(t + 1)) for t in range(6) for _ in range(10)]
    sampler, losses = fed(updates), np.arange(6) ** 2
    indices, weights = sampler.sample(200_000, np.random.default_rng(0))
    assert (losses[indices] * weights).mean() == pytest.approx(losses.mean(), rel=0.02)
    assert losses[indices].mean() > 1.2 * losses.mean()
