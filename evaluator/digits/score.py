"""All scores of a set of generated digits, with those of real held-out digits for comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from evaluator.digits.classifier import IndependentClassifier, check_labels
from evaluator.digits.network import check_images, digits_features
from evaluator.metrics import frechet_distance_from_features, inception_score, precision_recall

LabelledImages = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class DigitsScores:
    """Scores of one sample set; the reference is always the training split.

    Attributes:
        num_samples: Number of images; distances of fewer images come out larger.
        accuracy: Share of samples that the independent classifier takes for the requested digit; None without labels.
        frechet_distance: Distance of samples and training images, in the feature network's features; 0 is best.
        frechet_distance_of_test: The same for test images; samples of a good model stay below it.
        inception_score: Inception Score in [1, 10], by the feature network's probabilities.
        precision: Share of samples inside the manifold of the training images.
        recall: Share of training images inside the manifold of the samples.
        nearest_ratio: Median pixel distance of a sample to its nearest training image, over that of a test image;
            0 for copies, about 1 for new images.
    """

    num_samples: int
    accuracy: float | None
    frechet_distance: float
    frechet_distance_of_test: float
    inception_score: float
    precision: float
    recall: float
    nearest_ratio: float


def score_digits(
    samples: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64] | None,
    *,
    train: LabelledImages,
    test: LabelledImages,
) -> DigitsScores:
    """Score generated digits against the real ones.

    Args:
        samples: (N, 8, 8, 1) uint8, N >= 4.
        labels: (N,) integers in [0, 10), the digits that were asked for; None for unconditional samples.
        train: Images (N, 8, 8, 1) uint8 and labels (N,) int64 of the training split.
        test: The same of the held-out split.

    Returns:
        The scores.

    Raises:
        ValueError: For other shapes, dtypes or labels, too few samples, or splits that overlap.
    """
    check_images(samples, "samples")
    train_features, _ = digits_features(train[0])
    test_features, _ = digits_features(test[0])
    features, probabilities = digits_features(samples)
    manifold = precision_recall(train_features, features, precision="float32")
    return DigitsScores(
        num_samples=len(samples),
        accuracy=None if labels is None else _accuracy(samples, labels, train),
        frechet_distance=frechet_distance_from_features(train_features, features),
        frechet_distance_of_test=frechet_distance_from_features(train_features, test_features),
        inception_score=inception_score(probabilities),
        precision=manifold.precision,
        recall=manifold.recall,
        nearest_ratio=_nearest_ratio(samples, train[0], test[0]),
    )


def _accuracy(samples: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], train: LabelledImages) -> float:
    check_labels(labels, len(samples))
    return float(np.mean(IndependentClassifier(*train).predict(samples) == labels))


def _nearest_ratio(samples: npt.NDArray[np.uint8], train: npt.NDArray[np.uint8], test: npt.NDArray[np.uint8]) -> float:
    of_test = np.median(_nearest_distances(test, train))
    if of_test == 0:
        raise ValueError("most test images are training images too: the splits overlap")
    return float(np.median(_nearest_distances(samples, train)) / of_test)


def _nearest_distances(images: npt.NDArray[np.uint8], train: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return the Euclidean distance, in grey levels, from each image to its nearest training image, (N,)."""
    points, others = (torch.tensor(array).flatten(start_dim=1).double() for array in (images, train))
    return torch.cdist(points, others).amin(dim=1).numpy()  # sums of integers: exact, so 0 for a copy
