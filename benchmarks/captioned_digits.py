"""Scores of pictures and clips of captioned digits, from what is seen in them: which digit, how large, and where.

A support vector machine, fitted to real training data, judges the digit; the size follows from the sum of the pixels,
place and motion from the centre of mass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from benchmarks.moving_digits import Clips, Numbers, centres, fit_classifier, vectors, without_noise
from data.captioned_digits import KINDS, SIZES, CaptionedDigits, Content
from data.moving_digits import DIRECTIONS

if TYPE_CHECKING:
    from sklearn.svm import SVC

REACH = 7  # pixels around the centre, so that large digits fit
LEAST = 1.0  # pixels that a digit moves, or is off the middle; less is in no direction


@dataclass(frozen=True)
class TextScores:
    """Shares of samples that show what their captions say."""

    digit: float
    size: float
    direction: float


class TextScorer:
    """Scores of samples of one number of frames.

    Args:
        train: Training data, to which the classifier is fitted.
    """

    def __init__(self, train: CaptionedDigits) -> None:
        self.train = train

    def score(self, samples: Clips, contents: list[Content]) -> TextScores:
        """Score samples (N, F, S, S, 1) uint8, of F = 1 pictures, against what was asked for."""
        digits = np.array([content.digit for content in contents])
        sizes, directions = self.sizes(samples), self.directions(samples)
        return TextScores(
            digit=float(np.mean(self.digits(samples) == digits)),
            size=float(np.mean([size == content.size for size, content in zip(sizes, contents, strict=True)])),
            direction=float(np.mean([d == content.direction for d, content in zip(directions, contents, strict=True)])),
        )

    def digits(self, samples: Clips) -> npt.NDArray[np.int64]:
        """Digits that the classifier finds, (N,)."""
        found: npt.NDArray[np.int64] = self._classifier.predict(vectors(samples, REACH))
        return found

    def sizes(self, samples: Clips) -> list[str]:
        """Sizes by the sum of the pixels of a frame: small below the geometric mean of both sizes."""
        small, large = SIZES
        return [large if mass > self._middle else small for mass in _masses(samples)]

    def directions(self, samples: Clips) -> list[str | None]:
        """Directions in which digits move or, in pictures, are off the middle; None for hardly any way."""
        places = centres(samples)
        middle = (np.array(samples.shape[2:4]) - 1) / 2
        ways = places[:, 0] - middle if samples.shape[1] == 1 else places[:, -1] - places[:, 0]
        steps = np.array(list(DIRECTIONS.values()))
        along = ways @ steps.T
        return [list(DIRECTIONS)[row.argmax()] if row.max() >= LEAST else None for row in along]

    def real(self, data: CaptionedDigits, count: int | None = None) -> tuple[Clips, list[Content]]:
        """Samples of a data set, one of each digit, in every size and direction in turn, and what is in them."""
        digits = min(len(data) // KINDS, count or len(data))
        indices = [digit * KINDS + digit % KINDS for digit in range(digits)]
        return np.stack([data.clip(i) for i in indices])[..., None], [data.content(i) for i in indices]

    @cached_property
    def _classifier(self) -> SVC:
        kinds = [(digit, size) for digit in range(len(self.train) // KINDS) for size in range(len(SIZES))]
        indices = [digit * KINDS + size * len(DIRECTIONS) + digit % len(DIRECTIONS) for digit, size in kinds]
        samples = np.stack([self.train.clip(i) for i in indices])[..., None]
        return fit_classifier(samples, np.array([self.train.content(i).digit for i in indices]), REACH)

    @cached_property
    def _middle(self) -> float:
        samples, contents = self.real(self.train)
        masses, large = _masses(samples), np.array([content.size == "large" for content in contents])
        return float(np.sqrt(masses[large].mean() * masses[~large].mean()))


def _masses(samples: Clips) -> Numbers:
    """Mean sum of the pixels of a frame, (N,); faint noise does not count."""
    masses: Numbers = without_noise(samples).sum((2, 3, 4)).mean(1)
    return masses
