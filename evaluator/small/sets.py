"""The sets of small images or clips that have scores, each with its feature network and the sizes that bound them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
LabelledImages = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]

NUM_CLASSES = 10


@dataclass(frozen=True)
class SmallSet:
    """A set of small grey images or clips of ten classes.

    Attributes:
        name: Name in commands.
        image_size: Height and width.
        stride: Stride of the feature network's first convolution.
        batch_size: Images of one step of the feature network's training.
        num_steps: Steps of it.
        min_accuracy: Accuracy on the test split below which its weights are not written.
        kernel_width: Gamma of the independent classifier, for pixels in [-0.5, 0.5].
        max_fitted: Training images that it is fitted to; its cost grows with their square.
        manifold: Split that precision and recall refer to.
        max_nearest: Images of a set for which the nearest training image is searched.
        digest: Digest that train.py records of the training split; empty where the shape tells the set.
        frames: Number of frames of a clip; 0 for images.
        targets: Numbers of values of the labels that the feature network learns, the class first.
    """

    name: str
    image_size: int
    stride: int
    batch_size: int
    num_steps: int
    min_accuracy: float
    kernel_width: float
    max_fitted: int
    manifold: Split
    max_nearest: int
    digest: str = ""
    frames: int = 0
    targets: tuple[int, ...] = (NUM_CLASSES,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image (H, W, 1) or a clip (F, H, W, 1)."""
        return (*[self.frames] * (self.frames > 0), self.image_size, self.image_size, 1)

    @property
    def weights(self) -> Path:
        """File of the committed feature network."""
        return Path(__file__).with_name(f"{self.name}.safetensors")

    def check_images(self, images: npt.NDArray[np.generic], name: str) -> None:
        """Check that an array is a batch of this set's images.

        Raises:
            ValueError: Unless it is (N, *shape) uint8 with N >= 1; the message starts with `name`.
        """
        if images.dtype != np.uint8 or images.shape[1:] != self.shape or len(images) == 0:
            expected = f"(N, {', '.join(map(str, self.shape))}) uint8 with N >= 1"
            raise ValueError(f"{name} must be {expected}, not {images.shape} {images.dtype}")


def check_labels(labels: npt.NDArray[np.int64], count: int) -> None:
    """Check that there is one class for each image.

    Raises:
        ValueError: Unless they are (count,) integers in [0, 10).
    """
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be ({count},) integers, one an image, not {labels.shape} {labels.dtype}")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise ValueError(f"labels must be in [0, {NUM_CLASSES}), not in [{labels.min()}, {labels.max()}]")


DIGITS = SmallSet("digits", 8, 1, 64, 1000, 0.975, 0.05, 1 << 30, "train", 1 << 30)
FASHION = SmallSet(
    "fashion", 28, 2, 128, 1500, 0.88, 0.02, 10_000, "test", 1000,
    "1f243a60b4b748a44c48b9a6f6907be2a08bee3e4e226f0e86fbde8e147b745a",
)  # fmt: skip
MOVING_DIGITS = SmallSet(
    "moving-digits", 16, 2, 32, 2500, 0.85, 0.1, 1 << 30, "train", 1000, frames=8, targets=(NUM_CLASSES, 4, 2)
)
SETS = {each.name: each for each in (DIGITS, FASHION, MOVING_DIGITS)}
