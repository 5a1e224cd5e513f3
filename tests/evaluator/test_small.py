"""The feature network, classifier and scores: good sets score well, every kind of bad set is told apart."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.digits import load_digits
from evaluator.small import (
    DIGITS,
    SETS,
    FeatureNetwork,
    IndependentClassifier,
    SmallScorer,
    compute_features,
    load_feature_network,
)
from evaluator.small import train as training
from evaluator.small.network import IMAGES_PER_BATCH
from runtime.errors import UserError
from runtime.tensor_file import read_tensors

ROOT = Path(__file__).parents[2]
TRAIN, TEST = load_digits("train"), load_digits("test")
FRECHET_DISTANCE_OF_TEST = 5.6475


def score(samples, labels=None):
    return SmallScorer(TRAIN, TEST).score(samples, labels)


# ----------------------------------------------------------------------------------------------------------------------
# Feature network


def test_committed_network_is_small_and_says_how_it_was_made():
    for images in SETS.values():
        assert images.weights.stat().st_size < 400_000
        _, recorded = read_tensors(images.weights, "training")
        assert (recorded["seed"], recorded["steps"]) == (0, images.num_steps)
        assert recorded["test_accuracy"] >= images.min_accuracy
    measured = training.measure_accuracy(load_feature_network(), *TEST)
    _, recorded = read_tensors(DIGITS.weights, "training")
    assert recorded["test_accuracy"] == measured >= DIGITS.min_accuracy >= 0.975


def test_features_and_probabilities():
    features, probabilities = compute_features(TEST[0])
    assert features.shape == (500, 64) and features.dtype == np.float32
    assert features.min() == 0 < features.max()
    assert probabilities.shape == (500, 10) and probabilities.dtype == np.float64
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    assert np.mean(probabilities.argmax(axis=1) == TEST[1]) >= 0.975


def test_features_do_not_depend_on_the_batch():
    images = np.resize(TEST[0], (IMAGES_PER_BATCH + 3, 8, 8, 1))
    features, probabilities = compute_features(images)
    for i in (0, 7, IMAGES_PER_BATCH - 1, IMAGES_PER_BATCH + 2):
        alone, probability = compute_features(images[i : i + 1])
        np.testing.assert_allclose(alone[0], features[i], atol=1e-4)
        np.testing.assert_allclose(probability[0], probabilities[i], atol=1e-5)


def test_pixels_are_scaled_inside():
    network, seen = load_feature_network(), []
    network.convolutions.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    images = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1) * 4
    images[0, 7, 7] = 255
    network(torch.from_numpy(images))
    (pixels,) = seen
    assert pixels.shape == (1, 1, 8, 8)
    assert pixels.min() == -1 and pixels.max() == 1
    assert pixels[0, 0, 2, 3] == pytest.approx((2 * 8 + 3) * 4 / 127.5 - 1)


def test_loading_draws_no_random_numbers():
    state = torch.get_rng_state()
    load_feature_network()
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_are_missing_or_foreign(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_feature_network(path=tmp_path / "nowhere.safetensors")
    network = FeatureNetwork()
    network.head = torch.nn.Linear(64, 11)
    training.write_weights(network, tmp_path / "foreign.safetensors", {})
    with pytest.raises(RuntimeError, match="head.weight"):
        load_feature_network(path=tmp_path / "foreign.safetensors")


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 8, 8, 1), np.float32),
        np.zeros((3, 1, 8, 8), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((0, 8, 8, 1), np.uint8),
    ],
    ids=["float", "channels first", "no batch", "empty"],
)
def test_images_that_cannot_be(images):
    calls = (
        lambda: compute_features(images),
        lambda: IndependentClassifier(images, np.zeros(len(images), np.int64)),
        lambda: IndependentClassifier(*TRAIN).predict(images),
        lambda: score(images),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"must be \(N, 8, 8, 1\) uint8 with N >= 1, not \("):
            call()


def test_every_set_has_its_scores():
    generator = np.random.default_rng(0)
    for images in SETS.values():
        few = dataclasses.replace(images, max_fitted=20)
        shape = (30, *images.shape)
        train, test = ((generator.integers(0, 256, shape, dtype=np.uint8), np.arange(30) % 10) for _ in range(2))
        scorer = SmallScorer(train, test, few)
        scores = scorer.score(*train)
        assert scores.frechet_distance == pytest.approx(0, abs=1e-3) and scores.nearest_ratio == 0
        assert scorer.score(*test).frechet_distance == scores.frechet_distance_of_test > 0
        assert scorer.accuracy(train[0][:20], train[1][:20]) == 1  # of those that it was fitted to
        with pytest.raises(ValueError, match="samples must be"):
            scorer.score(train[0][:, :-1], None)


# ----------------------------------------------------------------------------------------------------------------------
# Its training


def weights(network):
    return torch.cat([parameter.flatten() for parameter in network.parameters()])


def test_training_is_deterministic_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    first = weights(training.train_network(DIGITS, TRAIN, seed=3, num_steps=5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(weights(training.train_network(DIGITS, TRAIN, seed=3, num_steps=5)), first)
    assert not torch.equal(weights(training.train_network(DIGITS, TRAIN, seed=4, num_steps=5)), first)


def test_written_weights_are_read_back(tmp_path):
    network = training.train_network(DIGITS, TRAIN, seed=0, num_steps=1)
    assert not network.training
    training.write_weights(network, tmp_path / "network.safetensors", {"seed": 0})
    assert torch.equal(weights(load_feature_network(path=tmp_path / "network.safetensors")), weights(network))
    assert [path.name for path in tmp_path.iterdir()] == ["network.safetensors"]


def test_a_poor_network_is_not_written(tmp_path):
    with pytest.raises(UserError, match="--num-steps 1: test accuracy 0.* is below 0.975"):
        training.main(["--num-steps", "1", "--output", str(tmp_path / "network.safetensors")])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="--num-steps 0: must be at least 1"):
        training.main(["--num-steps", "0"])
    with pytest.raises(UserError, match="--data-path None: needed for --set fashion"):
        training.main(["--set", "fashion"])


@pytest.mark.slow
def test_training_reaches_its_accuracy(tmp_path):
    path = tmp_path / "network.safetensors"
    training.main(["--output", str(path)])
    assert training.measure_accuracy(load_feature_network(path=path), *TEST) >= 0.975


# ----------------------------------------------------------------------------------------------------------------------
# Classifier


def test_classifier_knows_held_out_digits():
    first, second = (IndependentClassifier(*TRAIN).predict(TEST[0]) for _ in range(2))
    assert first.shape == (500,) and first.dtype == np.int64
    assert np.mean(first == TEST[1]) == pytest.approx(0.992, abs=0.0021)  # pixels in [-1, 1] would give 0.996
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(9, np.int64), r"must be \(10,\) integers, one an image, not \(9,\) int64"),
        (np.zeros((10, 1), np.int64), r"not \(10, 1\) int64"),
        (np.zeros(10), r"not \(10,\) float64"),
        (np.arange(1, 11), r"must be in \[0, 10\), not in \[1, 10\]"),
        (np.arange(10) - 1, r"not in \[-1, 8\]"),
    ],
)
def test_labels_that_cannot_be(labels, message):
    with pytest.raises(ValueError, match=message):
        IndependentClassifier(TRAIN[0][:10], labels)
    with pytest.raises(ValueError, match=message):
        score(TRAIN[0][:10], labels)


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def test_real_held_out_digits_are_the_yardstick():
    scores = score(*TEST)
    assert scores.num_samples == 500
    assert scores.accuracy >= 0.985
    # the committed weights fix the scale; another processor may round, no more
    assert scores.frechet_distance == scores.frechet_distance_of_test
    assert scores.frechet_distance == pytest.approx(FRECHET_DISTANCE_OF_TEST, rel=1e-3)
    assert 9.5 < scores.inception_score < 10
    assert scores.precision > 0.85
    assert scores.recall > 0.85
    assert scores.nearest_ratio == 1


def test_copies_are_caught():
    scores = score(TRAIN[0][:1000], TRAIN[1][:1000])
    assert scores.frechet_distance < FRECHET_DISTANCE_OF_TEST / 3
    assert scores.frechet_distance_of_test == pytest.approx(FRECHET_DISTANCE_OF_TEST, rel=1e-3)
    assert scores.precision == 1
    assert scores.nearest_ratio == 0


def test_copies_with_a_little_noise_are_caught():
    noise = np.random.default_rng(0).normal(scale=16, size=(1000, 8, 8, 1))
    scores = score(np.clip(TRAIN[0][:1000] + noise, 0, 255).astype(np.uint8))
    assert scores.frechet_distance < FRECHET_DISTANCE_OF_TEST
    assert 0 < scores.nearest_ratio < 0.8


def test_noise_is_bad_at_everything_but_originality():
    scores = score(np.random.default_rng(0).integers(0, 256, (500, 8, 8, 1), dtype=np.uint8))
    assert scores.frechet_distance > 50 * FRECHET_DISTANCE_OF_TEST
    assert scores.inception_score < 6
    assert scores.precision < 0.1
    assert scores.recall < 0.1
    assert scores.nearest_ratio > 2


def test_a_single_class_is_precise_but_recalls_little():
    scores = score(TEST[0][TEST[1] == 3])
    assert scores.frechet_distance > 20 * FRECHET_DISTANCE_OF_TEST
    assert scores.inception_score < 1.5
    assert scores.precision > 0.8
    assert scores.recall < 0.2


def test_accuracy_is_against_the_digits_asked_for():
    images, labels = TEST
    assert score(images, (labels + 1) % 10).accuracy < 0.02
    half = np.where(np.arange(500) < 250, labels, (labels + 1) % 10)
    assert score(images, half).accuracy == pytest.approx(0.5, abs=0.02)
    assert score(images, None).accuracy is None


def test_too_few_samples():
    with pytest.raises(ValueError, match="4 rows of features, not 3"):
        score(TEST[0][:3])


def test_splits_that_overlap():
    with pytest.raises(ValueError, match="the splits overlap"):
        SmallScorer(TRAIN, TRAIN).score(TEST[0], None)


def test_importing_the_scores_loads_neither_the_data_nor_anything_heavy():
    unwanted = {"data", "torchvision", "timm", "diffusers", "tensorflow", "sklearn", "scipy", "matplotlib"}
    program = f"import sys, evaluator.small; print(*(sys.modules.keys() & {unwanted}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
