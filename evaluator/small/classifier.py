"""An independent classifier: a support vector machine on raw pixels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evaluator.small.sets import DIGITS, SmallSet, check_labels


class IndependentClassifier:
    """Support vector machine with a radial kernel; right about 99 % of held-out digits, 87 % of clothes."""

    def __init__(self, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], of: SmallSet = DIGITS) -> None:
        """Fit the classifier; deterministic, a tenth of a second for the digits.

        Args:
            images: (N, H, W, 1) uint8, the training split, of which the first `of.max_fitted` are used.
            labels: (N,) integers in [0, 10).
            of: The set that they belong to.

        Raises:
            ValueError: For other shapes, dtypes or labels.
        """
        from sklearn.svm import SVC  # takes most of a second to import, and only the fit needs it

        of.check_images(images, "images")
        check_labels(labels, len(images))
        self._of, rows = of, slice(of.max_fitted)
        self._machine = SVC(gamma=of.kernel_width, C=10.0).fit(_to_vectors(images[rows]), labels[rows])

    def predict(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Predict the classes.

        Args:
            images: (N, H, W, 1) uint8, N >= 1.

        Returns:
            (N,) int64 in [0, 10).

        Raises:
            ValueError: For another shape or dtype.
        """
        self._of.check_images(images, "images")
        return np.asarray(self._machine.predict(_to_vectors(images)), dtype=np.int64)


def _to_vectors(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    # half of [-1, 1], the range in which the kernel widths were chosen
    return images.reshape(len(images), -1) / 255.0 - 0.5
