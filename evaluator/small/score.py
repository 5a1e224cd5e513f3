"""All scores of a set of generated images, with those of real held-out ones for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from evaluator.metrics import frechet_distance_from_features, inception_score, precision_recall
from evaluator.small.classifier import IndependentClassifier
from evaluator.small.network import compute_features
from evaluator.small.sets import DIGITS, NUM_CLASSES, LabelledImages, SmallSet, check_labels


@dataclass(frozen=True)
class SmallScores:
    """Scores of one sample set, against the training split (precision and recall: that of `SmallSet.manifold`).

    Attributes:
        num_samples: Number of images; distances of fewer images come out larger.
        accuracy: Share of samples that the independent classifier takes for the requested class; None without labels.
        frechet_distance: Distance of samples and training images, in the feature network's features; 0 is best.
        frechet_distance_of_test: The same for test images; samples of a good model stay below it.
        inception_score: Inception Score in [1, 10], by the feature network's probabilities.
        precision: Share of samples inside the manifold of the reference images.
        recall: Share of reference images inside the manifold of the samples.
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


class SmallScorer:
    """Scores of images of one set, with what they share kept for the next samples."""

    def __init__(self, train: LabelledImages, test: LabelledImages, of: SmallSet = DIGITS) -> None:
        """Keep the real images.

        Args:
            train: Images (N, H, W, 1) uint8 and labels (N,) int64 of the training split.
            test: The same of the held-out split.
            of: The set that they belong to.
        """
        self.of, self.train, self.test = of, train, test

    def score(self, samples: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64] | None) -> SmallScores:
        """Score generated images against the real ones.

        Args:
            samples: (N, H, W, 1) uint8, N >= 4.
            labels: (N,) integers in [0, 10), the classes that were asked for; None for unconditional samples.

        Raises:
            ValueError: For other shapes, dtypes or labels, too few samples, or splits that overlap.
        """
        self.of.check_images(samples, "samples")
        features, probabilities = compute_features(samples, self.of)
        reference = self.train_features if self.of.manifold == "train" else self.test_features
        manifold = precision_recall(reference, features, precision="float32")
        return SmallScores(
            num_samples=len(samples),
            accuracy=None if labels is None else self.accuracy(samples, labels),
            frechet_distance=frechet_distance_from_features(self.train_features, features),
            frechet_distance_of_test=self.frechet_distance_of_test,
            inception_score=inception_score(probabilities),
            precision=manifold.precision,
            recall=manifold.recall,
            nearest_ratio=self._nearest(samples) / self.nearest_of_test,
        )

    def labels_in_turn(self, count: int) -> npt.NDArray[np.int64]:
        """Labels (count,) of all classes in turn."""
        return np.arange(count) % NUM_CLASSES

    def accuracy(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> float:
        """Share of images that the independent classifier gives their labels."""
        check_labels(labels, len(images))
        return float(np.mean(self.classifier.predict(images) == labels))

    @cached_property
    def classifier(self) -> IndependentClassifier:
        """The independent classifier."""
        return IndependentClassifier(*self.train, self.of)

    @cached_property
    def train_features(self) -> npt.NDArray[np.float32]:
        """Features (N, 64) of the training split."""
        return compute_features(self.train[0], self.of)[0]

    @cached_property
    def test_features(self) -> npt.NDArray[np.float32]:
        """Features (N, 64) of the test split."""
        return compute_features(self.test[0], self.of)[0]

    @cached_property
    def frechet_distance_of_test(self) -> float:
        """Frechet distance of the test split to the training split."""
        return frechet_distance_from_features(self.train_features, self.test_features)

    @cached_property
    def nearest_of_test(self) -> float:
        """Median pixel distance of a test image to its nearest training image; a ValueError if it is 0."""
        if (distance := self._nearest(self.test[0])) == 0:
            raise ValueError("most test images are training images too: the splits overlap")
        return distance

    def _nearest(self, images: npt.NDArray[np.uint8]) -> float:
        return float(np.median(_nearest_distances(images[: self.of.max_nearest], self.train[0])))


def _nearest_distances(images: npt.NDArray[np.uint8], train: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return the Euclidean distance, in grey levels, from each image to its nearest training image, (N,)."""
    points, others = (torch.tensor(array).flatten(start_dim=1).double() for array in (images, train))
    return torch.cdist(points, others).amin(dim=1).numpy()  # sums of integers: exact, so 0 for a copy
