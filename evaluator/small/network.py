"""The feature network: a small convolutional classifier with committed weights for each set, made by `train.py`.

The weights are committed so that a Frechet distance means the same on every machine.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from evaluator.small.sets import DIGITS, NUM_CLASSES, SmallSet
from runtime.tensor_file import read_tensors

NUM_FEATURES = 64

IMAGES_PER_BATCH = 2048  # bounds memory only


class FeatureNetwork(nn.Module):
    """Three convolutions and two linear layers; the features are the non-negative input of the last one."""

    def __init__(self, images: SmallSet = DIGITS) -> None:
        super().__init__()
        side = images.image_size // images.stride // 4  # after two poolings
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1, stride=images.stride),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (N, 32, 4, 4) of digits
            nn.Conv2d(32, 48, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (N, 48, 2, 2)
            nn.Flatten(),  # (N, 192)
        )
        self.penultimate = nn.Sequential(nn.Linear(48 * side * side, NUM_FEATURES), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images.

        Args:
            images: (N, H, W, 1) uint8, scaled to [-1, 1] here.

        Returns:
            Features (N, 64), float32 and >= 0, and logits (N, 10), float32.
        """
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # (N, 1, H, W)
        features = self.penultimate(self.convolutions(pixels))  # (N, 64)
        return features, self.head(self.dropout(features))


def load_feature_network(images: SmallSet = DIGITS, path: Path | None = None) -> FeatureNetwork:
    """Load a trained network, ready for evaluation.

    Args:
        images: The set.
        path: A safetensors file of `train.py`; by default the committed one.

    Returns:
        The network in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
        RuntimeError: If its tensors do not fit the network.
    """
    with torch.device("meta"):  # no initial weights, so the global random generator is not used
        network = FeatureNetwork(images)
    weights, _ = read_tensors(path or images.weights, "training")
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def compute_features(
    images: npt.NDArray[np.uint8], of: SmallSet = DIGITS
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Compute the committed network's features and class probabilities.

    Args:
        images: (N, H, W, 1) uint8, N >= 1.
        of: The set that they belong to.

    Returns:
        Features (N, 64) float32 >= 0 and probabilities (N, 10) float64.

    Raises:
        ValueError: For another shape or dtype.
    """
    of.check_images(images, "images")
    network = _committed_network(of)
    batches = [network(batch) for batch in torch.tensor(images).split(IMAGES_PER_BATCH)]
    features = torch.cat([features for features, _ in batches])
    logits = torch.cat([logits for _, logits in batches])
    return features.numpy(), logits.double().softmax(dim=1).numpy()


@cache
def _committed_network(images: SmallSet) -> FeatureNetwork:
    return load_feature_network(images)
