"""Distances in TensorFlow's float16, as ADM's precision and recall take them, against our emulation.

The two agree where published features are. Where squared norms are so large that float16 cannot tell the distances of
neighbours, TensorFlow's own numbers depend on the processor's vector units, and the evaluator warns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from evaluator.metrics import float16_noise, precision_recall

pytestmark = pytest.mark.tf

WIDTH = 2048
NOISE = 0.01  # from which the evaluator warns
Features = npt.NDArray[np.float32]


def features(norm: float, distance: float, count: int, seed: int) -> Features:
    """Rows (N, 2048) of a mean squared norm, and of a mean squared distance to each other."""
    random = np.random.default_rng(seed)
    centre = np.random.default_rng(0).random(WIDTH)  # all features are positive, as behind a ReLU
    centre *= np.sqrt((norm - distance / 2) / np.square(centre).sum())
    spread = random.standard_normal((count, 12)) @ np.random.default_rng(1).standard_normal((12, WIDTH))
    return (centre + spread * np.sqrt(distance / 2 / WIDTH / 12)).astype(np.float32)


def tensorflow_distances(u: Features, v: Features) -> Features:
    import tensorflow as tf

    a, b = tf.constant(u, tf.float16), tf.constant(v, tf.float16)
    norms = [tf.reduce_sum(tf.square(rows), 1) for rows in (a, b)]
    products = tf.matmul(a, b, transpose_b=True)
    found = tf.maximum(norms[0][:, None] - 2 * products + norms[1][None, :], 0)
    assert np.isfinite(found.numpy()).all()
    return found.numpy().astype(np.float32)


def tensorflow_precision_recall(reference: Features, samples: Features) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., 2019) with k = 3, over those distances."""
    radii = [np.sort(tensorflow_distances(rows, rows), axis=1)[:, 3] for rows in (reference, samples)]
    between = tensorflow_distances(reference, samples)
    return (between <= radii[0][:, None]).any(axis=0).mean(), (between <= radii[1][None]).any(axis=1).mean()


@pytest.mark.parametrize(("norm", "distance"), [(120.0, 80.0), (400.0, 300.0)])
def test_features_of_usual_norms_have_tensorflows_numbers(norm: float, distance: float) -> None:
    """Those of Inception have squared norms of some hundreds."""
    reference, samples = (features(norm, distance, 300, seed) for seed in (2, 3))
    expected = tensorflow_precision_recall(reference, samples)
    ours = precision_recall(reference, samples, precision="adm")
    exact = precision_recall(reference, samples, precision="float32")
    assert float16_noise(reference, samples) < NOISE
    assert np.abs(np.subtract(ours, expected)).max() <= 2.5 / 300, (ours, expected)
    assert np.abs(np.subtract(exact, expected)).max() <= 0.03, (exact, expected)


def test_features_of_large_norms_are_rounding_noise_and_said_to_be() -> None:
    """As reported: a mean squared norm of 16,580, precision and recall .81 and .42, exactly .30 and .00."""
    reference, samples = (features(16_580, distance, 300, seed) for distance, seed in ((60.0, 2), (120.0, 3)))
    expected = tensorflow_precision_recall(reference, samples)
    ours = precision_recall(reference, samples, precision="adm")
    exact = precision_recall(reference, samples, precision="float32")
    assert float16_noise(reference, samples) > 10 * NOISE
    assert np.abs(np.subtract(exact, expected)).max() > 0.1
    assert np.abs(np.subtract(ours, expected)).max() < 0.1
