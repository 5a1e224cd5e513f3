"""Prediction types against each other in closed form."""

from typing import get_args

import numpy as np
import pytest

from diffusion.predictions import Prediction, conversion, target_weights

TYPES: tuple[Prediction, ...] = get_args(Prediction)
LEVELS = [(np.sqrt(abar), np.sqrt(1 - abar)) for abar in (0.999, 0.5, 1e-3)] + [(t, 1 - t) for t in (0.01, 0.5, 0.99)]


def test_targets_are_those_of_the_papers() -> None:
    assert target_weights("epsilon", 0.6, 0.8) == (0, 1)
    assert target_weights("x_start", 0.6, 0.8) == (1, 0)
    assert target_weights("v", 0.6, 0.8) == (-0.8, 0.6)
    assert target_weights("velocity", 0.6, 0.8) == (1, -1)


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
def test_every_type_is_computed_from_every_other(source: Prediction, target: Prediction) -> None:
    x_start, noise = np.random.default_rng(0).normal(size=(2, 100))
    for alpha, sigma in LEVELS:
        outputs = {}
        for kind in (source, target):
            a, b = target_weights(kind, alpha, sigma)
            outputs[kind] = a * x_start + b * noise
        by_x, by_output = conversion(source, target, alpha, sigma)
        converted = by_x * (alpha * x_start + sigma * noise) + by_output * outputs[source]
        np.testing.assert_allclose(converted, outputs[target], rtol=1e-9, atol=1e-9)


def test_what_is_predicted_needs_no_conversion() -> None:
    """Also where the coefficients of another one would be infinite."""
    for kind in TYPES:
        assert conversion(kind, kind, 0.0, 0.0) == (0, 1)
