"""The feature network of the digits: a small convolutional classifier with committed weights, made by `train.py`.

The weights are committed so that a Frechet distance means the same on every machine.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from runtime.tensor_file import read_tensors

IMAGE_SHAPE = (8, 8, 1)
NUM_CLASSES = 10
NUM_FEATURES = 64
WEIGHTS_PATH = Path(__file__).with_name("feature_network.safetensors")

IMAGES_PER_BATCH = 2048  # bounds memory only


class DigitsFeatureNetwork(nn.Module):
    """Three convolutions and two linear layers; the features are the non-negative input of the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (N, 32, 4, 4)
            nn.Conv2d(32, 48, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (N, 48, 2, 2)
            nn.Flatten(),  # (N, 192)
        )
        self.penultimate = nn.Sequential(nn.Linear(48 * 2 * 2, NUM_FEATURES), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images.

        Args:
            images: (N, 8, 8, 1) uint8, scaled to [-1, 1] here.

        Returns:
            Features (N, 64), float32 and >= 0, and logits (N, 10), float32.
        """
        pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1  # (N, 1, 8, 8)
        features = self.penultimate(self.convolutions(pixels))  # (N, 64)
        return features, self.head(self.dropout(features))


def load_feature_network(path: Path = WEIGHTS_PATH) -> DigitsFeatureNetwork:
    """Load the trained network, ready for evaluation.

    Args:
        path: A safetensors file of `train.py`; by default the committed one.

    Returns:
        The network in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
        RuntimeError: If its tensors do not fit the network.
    """
    with torch.device("meta"):  # no initial weights, so the global random generator is not used
        network = DigitsFeatureNetwork()
    weights, _ = read_tensors(path, "training")
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def digits_features(images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """Compute the committed network's features and class probabilities.

    Args:
        images: (N, 8, 8, 1) uint8, N >= 1.

    Returns:
        Features (N, 64) float32 >= 0 and probabilities (N, 10) float64.

    Raises:
        ValueError: For another shape or dtype.
    """
    check_images(images, "images")
    network = _committed_network()
    batches = [network(batch) for batch in torch.tensor(images).split(IMAGES_PER_BATCH)]
    features = torch.cat([features for features, _ in batches])
    logits = torch.cat([logits for _, logits in batches])
    return features.numpy(), logits.double().softmax(dim=1).numpy()


@cache
def _committed_network() -> DigitsFeatureNetwork:
    return load_feature_network()


def check_images(images: npt.NDArray[np.generic], name: str) -> None:
    """Check that an array is a batch of 8-bit digits.

    Raises:
        ValueError: Unless it is (N, 8, 8, 1) uint8 with N >= 1; the message starts with `name`.
    """
    if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE or len(images) == 0:
        raise ValueError(f"{name} must be (N, 8, 8, 1) uint8 with N >= 1, not {images.shape} {images.dtype}")
