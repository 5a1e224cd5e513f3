"""Moving digits: the 3-D feature network, its training, and a Frechet distance that sees the order of frames."""

import hashlib

import numpy as np
import pytest
import torch

from data.array_images import array_digest
from data.small import load_moving_digits, load_small
from evaluator.metrics import frechet_distance_from_features
from evaluator.small import MOVING_DIGITS, compute_features, load_feature_network
from evaluator.small import train as training
from runtime.tensor_file import read_tensors


@pytest.fixture(scope="module")
def train():
    return load_moving_digits("train")


@pytest.fixture(scope="module")
def test():
    return load_moving_digits("test")


def shuffled(clips, seed=0):
    """The same frames, each clip in an order of its own."""
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(clips.shape[1]), (len(clips), 1)), axis=1)
    return np.take_along_axis(clips, order[:, :, None, None, None], axis=1)


# ----------------------------------------------------------------------------------------------------------------------
# Feature network


def test_committed_network_is_of_these_clips(train):
    assert MOVING_DIGITS.weights.stat().st_size < 400_000
    _, recorded = read_tensors(MOVING_DIGITS.weights, "training")
    content = hashlib.sha256(train[0].tobytes() + train[1].tobytes()).hexdigest()
    assert recorded["data"] == array_digest(*train) == content


def test_features_of_clips(test):
    clips, labels = test[0][:64], test[1][:64]
    features, probabilities = compute_features(clips, MOVING_DIGITS)
    assert features.shape == (64, 64) and features.min() == 0 < features.max()
    assert probabilities.shape == (64, 10) and np.allclose(probabilities.sum(axis=1), 1)
    alone, _ = compute_features(clips[5:6], MOVING_DIGITS)
    np.testing.assert_allclose(alone[0], features[5], atol=1e-4)
    network = load_feature_network(MOVING_DIGITS)
    assert training.measure_accuracy(network, clips, labels, MOVING_DIGITS) >= 0.8  # class, direction and speed
    assert sum(each.numel() for each in network.parameters()) < 100_000


def test_features_see_the_order_of_frames(train):
    # five times is asked for; order is all that differs
    rows = np.random.default_rng(0).permutation(len(train[0]))[:4000]
    first, second = train[0][rows[:2000]], train[0][rows[2000:]]
    real, held_out, disordered = (
        compute_features(each, MOVING_DIGITS)[0] for each in (first, second, shuffled(second))
    )
    of_halves = frechet_distance_from_features(real, held_out, biased=True)
    of_shuffled = frechet_distance_from_features(real, disordered, biased=True)
    print(f"halves {of_halves:.3f}, shuffled frames {of_shuffled:.3f}, ratio {of_shuffled / of_halves:.1f}")
    assert of_shuffled >= 5 * of_halves


def test_training_on_clips_is_deterministic(train):
    few = train[0][:100], train[1][:100]
    first, second = (training.train_network(MOVING_DIGITS, few, seed=3, num_steps=2) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(parameter.grad is not None for parameter in first.parameters())


def test_labels_are_class_direction_and_speed(test):
    clips, labels = test
    assert clips.shape == (4000, 8, 16, 16, 1) and clips.dtype == np.uint8
    assert labels.shape == (4000, 3) and [len(np.unique(column)) for column in labels.T] == [10, 4, 2]
    weights = clips[..., 0] / clips.sum(axis=(2, 3, 4))[..., None, None]  # centres of mass move steadily
    places = np.arange(16)
    centres = np.stack([(weights.sum(axis=3) * places).sum(axis=2), (weights.sum(axis=2) * places).sum(axis=2)], axis=2)
    steps = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])[labels[:, 1]]
    pixels = np.array([[3], [7]])[labels[:, 2]]  # in seven steps
    np.testing.assert_allclose(centres[:, -1] - centres[:, 0], steps * pixels, atol=1e-9)
    assert np.array_equal(load_small("moving-digits", "test", None)[0], clips)
