"""Scores of clips of one moving digit, from what is seen in them: which digit it is, and how it moves.

A digit is followed by its centre of mass. Its picture is the mean of all frames around that centre, which an
independent classifier judges; its motion is right where it is that of a real clip: in the direction of its class,
steadily, at one of the speeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from operator import eq
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from data.digits import NUM_CLASSES
from data.moving_digits import DIRECTIONS, SPEEDS, MovingDigits
from evaluator.metrics import frechet_distance_from_features
from evaluator.small import MOVING_DIGITS, compute_features

if TYPE_CHECKING:
    from sklearn.svm import SVC

Clips = npt.NDArray[np.uint8]  # (N, F, S, S, 1)
Numbers = npt.NDArray[np.float64]
Features = npt.NDArray[np.float32]  # (N, 64)

REACH = 5  # pixels around the centre
TOLERANCE = 1.0  # pixels between a centre and a steady path; a faint pixel far away moves it by tenths
NEAREST = 500  # clips that are compared with all training clips; there are as many held-out digits


@dataclass(frozen=True)
class ClipScores:
    """Scores of one set of clips.

    Attributes:
        num_samples: Number of clips.
        accuracy: Share of clips in which the independent classifier finds the requested digit.
        motion: Share of clips that move as real ones do, whatever their direction.
        direction: Share that moves as real ones do in the requested direction.
        nearest_ratio: Median distance in grey levels to the nearest training clip, over that of held-out clips.
        frechet_ratio: Frechet distance to the training clips on the small 3-D network, over that of sets of as many
            held-out clips; None for sizes that the network was not made for, and for a single clip.
    """

    num_samples: int
    accuracy: float
    motion: float
    direction: float
    nearest_ratio: float
    frechet_ratio: float | None


class ClipScorer:
    """Scores of clips of moving digits, with what they share kept for the next ones.

    Args:
        train: Training clips.
        test: Held-out clips of the same size.
    """

    def __init__(self, train: MovingDigits, test: MovingDigits) -> None:
        self.train, self.test = train, test
        self.kinds = len(DIRECTIONS) * len(SPEEDS)

    def score(self, clips: Clips, labels: npt.NDArray[np.int64]) -> ClipScores:
        """Score generated clips.

        Args:
            clips: (N, F, S, S, 1) uint8, N >= 1.
            labels: (N,) int64, the classes that were asked for.

        Raises:
            ValueError: For clips of another size.
        """
        frames, channels, side, _ = self.test.image_shape
        if clips.shape[1:] != (frames, side, side, channels) or not len(clips) == len(labels) > 0:
            raise ValueError(
                f"clips of shape {clips.shape} with {len(labels)} labels; these are {self.test.image_shape}"
            )
        found = [direction_of(path, frames) for path in centres(clips)]
        wanted = [list(DIRECTIONS)[label % len(DIRECTIONS)] for label in labels]
        return ClipScores(
            num_samples=len(clips),
            accuracy=self.accuracy(clips, labels),
            motion=1 - found.count(None) / len(clips),
            direction=sum(map(eq, found, wanted)) / len(clips),
            nearest_ratio=self._nearest(clips) / self.nearest_of_test,
            frechet_ratio=self._frechet_ratio(clips[:NEAREST]),
        )

    def accuracy(self, clips: Clips, labels: npt.NDArray[np.int64]) -> float:
        """Share of clips in which the classifier finds the digits of these classes."""
        return float(np.mean(self.classifier.predict(vectors(clips)) == labels // len(DIRECTIONS)))

    def labels_in_turn(self, count: int) -> npt.NDArray[np.int64]:
        """Classes (count,) in which the digit changes fastest: the first ten are a picture of each."""
        number = np.arange(count)
        digit, direction = number % NUM_CLASSES, number + number // NUM_CLASSES
        return digit * len(DIRECTIONS) + direction % len(DIRECTIONS)

    def real(self, data: MovingDigits, count: int | None = None) -> tuple[Clips, npt.NDArray[np.int64]]:
        """Clips and labels of a split, one of each digit, in every direction and at every speed in turn."""
        digits = len(data) // self.kinds
        indices = [digit * self.kinds + digit % self.kinds for digit in range(min(digits, count or digits))]
        clips = np.stack([data.clip(i) for i in indices])[..., None]
        return clips, np.array([data.label(i) for i in indices])

    @cached_property
    def classifier(self) -> SVC:
        """Support vector machine on pictures of the digits in real training clips, fitted at first use."""
        clips, labels = self.real(self.train)
        return fit_classifier(clips, labels // len(DIRECTIONS))

    @cached_property
    def nearest_of_test(self) -> float:
        """Median distance of a held-out clip to its nearest training clip."""
        return self._nearest(self.real(self.test)[0])

    @cached_property
    def _references(self) -> torch.Tensor:
        clips = np.stack([self.train.clip(i) for i in range(len(self.train))])
        return torch.from_numpy(clips).flatten(1).float()

    @cached_property
    def _features(self) -> tuple[Features, Features]:
        """Features of all training and all held-out clips."""
        train, test = (
            compute_features(np.stack([data.clip(i) for i in range(len(data))])[..., None], MOVING_DIGITS)[0]
            for data in (self.train, self.test)
        )
        return train, test

    def _frechet_ratio(self, clips: Clips) -> float | None:
        if clips.shape[1:] != MOVING_DIGITS.shape or len(clips) < 2:
            return None
        train, test = self._features
        # from fewer clips a distance is larger, and varies: several sets of as many held-out clips, of different digits
        random, digits = np.random.default_rng(0), len(test) // self.kinds
        orders = [random.permutation(digits)[: len(clips)] for _ in range(self.kinds)]
        sets = [test[order * self.kinds + (order + first) % self.kinds] for first, order in enumerate(orders)]
        own, *others = (
            frechet_distance_from_features(train, each, biased=True)
            for each in (compute_features(clips, MOVING_DIGITS)[0], *sets)
        )
        return own / float(np.mean(others))

    def _nearest(self, clips: Clips) -> float:
        points = torch.from_numpy(clips[:NEAREST]).flatten(1).float()
        return float(torch.cdist(points, self._references).amin(1).median())


def without_noise(clips: Clips) -> Numbers:
    """Clips with faint pixels set to 0: far from the digit they would pull its centre, and add to its size."""
    return np.where(clips < 64, 0.0, clips.astype(np.float64))


def centres(clips: Clips) -> Numbers:
    """Centre of mass of every frame, (N, F, 2): row, column; the middle of an empty one."""
    weights = without_noise(clips[..., 0])
    total = weights.sum((2, 3))
    rows, columns = np.arange(weights.shape[2]), np.arange(weights.shape[3])
    row, column = (weights.sum(3) * rows).sum(2), (weights.sum(2) * columns).sum(2)
    middle = (np.array(weights.shape[2:]) - 1) / 2
    place = np.stack([row, column], axis=-1) / np.maximum(total, 1)[..., None]
    return np.where(total[..., None] > 0, place, middle)


def direction_of(path: Numbers, frames: int) -> str | None:
    """Direction in which centres (F, 2) move, if they stay near the path of a real clip; else None."""
    for name, step in DIRECTIONS.items():
        for speed in SPEEDS:
            steady = np.floor(speed * np.arange(frames))[:, None] * np.array(step)
            off = path - path.mean(0) - (steady - steady.mean(0))
            if np.abs(off).max() <= TOLERANCE:
                return name
    return None


def pictures(clips: Clips, reach: int = REACH) -> Numbers:
    """Mean of all frames around their centres, (N, 2 R, 2 R) in [0, 255], with `reach` R pixels on each side."""
    padded = np.pad(clips[..., 0].astype(np.float64), ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    corners = np.rint(centres(clips) + 0.5).astype(np.int64)  # of a window centred there, in the padded frame
    result = np.zeros((len(clips), 2 * reach, 2 * reach))
    for clip, places, picture in zip(padded, corners, result, strict=True):
        for frame, (row, column) in zip(clip, places, strict=True):
            picture += frame[row : row + 2 * reach, column : column + 2 * reach] / len(clip)
    return result


def vectors(clips: Clips, reach: int = REACH) -> Numbers:
    """Inputs of the classifier, (N, 4 R R)."""
    return pictures(clips, reach).reshape(len(clips), -1) / 255.0 - 0.5


def fit_classifier(clips: Clips, digits: npt.NDArray[np.int64], reach: int = REACH) -> SVC:
    """Fit a support vector machine to pictures of the digits (N,) int64 of real clips."""
    from sklearn.svm import SVC  # takes most of a second to import

    return SVC(gamma=0.02, C=10.0).fit(vectors(clips, reach), digits)
