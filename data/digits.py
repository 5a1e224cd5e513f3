"""The embedded data set: scikit-learn's handwritten digits, 8 x 8 pixels, 10 classes, split once and for all.

Everything downstream (training, the feature network, the scores) sees the same 1,297 training and 500 test images,
so that a number printed on one machine can be compared with a number printed on another.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

NUM_CLASSES = 10
IMAGE_SIZE = 8
TEST_SIZE = 500
SPLIT_SEED = 0

Split = Literal["train", "test"]


def load_digits(split: Split) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Loads one split of the digits.

    Args:
        split: "train" (1,297 images) or "test" (500 images), disjoint and fixed.

    Returns:
        Images (N, 8, 8, 1) uint8 in [0, 255] and labels (N,) int64 in [0, 10).

    Raises:
        ValueError: for another split name.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    from sklearn.datasets import load_digits as load_sklearn_digits  # heavy: half a second, and only digits need it

    bunch = load_sklearn_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(bunch.target))
    chosen = order[:TEST_SIZE] if split == "test" else order[TEST_SIZE:]
    # 17 grey levels, 0..16, spread over the 8-bit range
    images = np.rint(bunch.images[chosen] * (255.0 / 16.0)).astype(np.uint8)[..., None]
    return images, bunch.target[chosen].astype(np.int64)
