"""The embedded data set: scikit-learn's handwritten digits, 8 x 8 pixels, 10 classes, with a fixed split.

Training, the feature network and the scores use the same 1,297 training and 500 test images, so that numbers from
different machines can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from data.array_images import ArrayImages
from data.dataset import DatasetSettings

NUM_CLASSES = 10
IMAGE_SIZE = 8
TEST_SIZE = 500
SPLIT_SEED = 0

Split = Literal["train", "test"]


def load_digits(split: Split) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Load one split of the digits; a ValueError for another name.

    Returns:
        Images (N, 8, 8, 1) uint8 in [0, 255] and labels (N,) int64 in [0, 10).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    table = _table()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(table))
    chosen = table[order[:TEST_SIZE] if split == "test" else order[TEST_SIZE:]]
    # 17 grey levels, 0..16, are spread over the 8-bit range
    images = np.rint(chosen[:, :-1] * (255.0 / 16.0)).astype(np.uint8)
    return images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 1), chosen[:, -1].astype(np.int64)


def _table() -> npt.NDArray[np.float64]:
    """All digits, a row each: 64 grey levels, and the label."""
    package = find_spec("sklearn")
    if package is not None and package.origin is not None:  # the import takes two seconds
        file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits as load_sklearn_digits

    return np.column_stack(load_sklearn_digits(return_X_y=True))


def open_digits(split: Split, *, flip: bool = False, seed: int = 0) -> ArrayImages:
    """Open a split of the digits as a data set."""
    images, labels = load_digits(split)
    return ArrayImages(images, labels, list(map(str, range(NUM_CLASSES))), flip=flip, seed=seed)


def write_digits(folder: Path, classes: Sequence[int]) -> None:
    """Write the training images of some classes as PNG, a folder a class, as photos of few classes lie on disks."""
    images, labels = load_digits("train")
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        if label in classes:
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(folder / str(label) / f"{i:04d}.png")


def open_training_digits(settings: DatasetSettings) -> ArrayImages:
    """Open the training split of the digits, not mirrored by default; a ValueError for another size."""
    if settings.size not in (None, (IMAGE_SIZE, IMAGE_SIZE)):
        raise ValueError(f"the digits are {IMAGE_SIZE} pixels wide, not {settings.size[-1]}")
    return open_digits("train", flip=bool(settings.flip), seed=settings.seed)
