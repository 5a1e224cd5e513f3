"""The feature network: a small convolutional classifier with committed weights for each set, made by `train.py`.

The weights are committed so that a Frechet distance means the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from evaluator.small.sets import DIGITS, NUM_CLASSES, SmallSet
from runtime.tensor_file import read_tensors

NUM_FEATURES = 64

IMAGES_PER_BATCH = 256  # bounds memory, and stays in the caches: clips take a third less time than in thousands


class FeatureNetwork(nn.Module):
    """Three convolutions (of clips over time, too) and two linear layers; features are the input of the last one."""

    def __init__(self, images: SmallSet = DIGITS) -> None:
        super().__init__()
        side = images.image_size // images.stride // 4  # after two poolings
        convolution: Callable[..., nn.Module] = nn.Conv3d if images.frames else nn.Conv2d
        pooling: Callable[[int], nn.Module] = nn.MaxPool3d if images.frames else nn.MaxPool2d
        stride = (*[1] * (images.frames > 0), images.stride, images.stride)  # of space alone
        self.convolutions = nn.Sequential(
            convolution(1, 16, kernel_size=3, padding=1, stride=stride),
            nn.ReLU(),
            convolution(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            pooling(2),  # (N, 32, 4, 4) of digits
            convolution(32, 48, kernel_size=3, padding=1),
            nn.ReLU(),
            pooling(2),  # (N, 48, 2, 2)
            nn.Flatten(),  # (N, 192)
        )
        inputs = 48 * side * side * (images.frames // 4 or 1)
        self.penultimate = nn.Sequential(nn.Linear(inputs, NUM_FEATURES), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(NUM_FEATURES, sum(images.targets))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify images or clips.

        Args:
            images: (N, H, W, 1) or (N, F, H, W, 1) uint8, scaled to [-1, 1] here.

        Returns:
            Features (N, 64), float32 and >= 0, and logits (N, 10), float32, or those of all targets side by side.
        """
        pixels = images.movedim(-1, 1).float() / 127.5 - 1  # (N, 1, H, W)
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
        images: (N, H, W, 1) uint8, or clips (N, F, H, W, 1), N >= 1.
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
    logits = torch.cat([logits[:, :NUM_CLASSES] for _, logits in batches])
    return features.numpy(), logits.double().softmax(dim=1).numpy()


def predict_targets(images: npt.NDArray[np.uint8], of: SmallSet) -> npt.NDArray[np.int64]:
    """Predict the labels that the committed network was trained on: the class, and of clips the motion.

    Args:
        images: (N, H, W, 1) uint8, or clips (N, F, H, W, 1), N >= 1.
        of: The set that they belong to.

    Returns:
        (N, targets) int64.

    Raises:
        ValueError: For another shape or dtype.
    """
    of.check_images(images, "images")
    network = _committed_network(of)
    logits = torch.cat([network(batch)[1] for batch in torch.tensor(images).split(IMAGES_PER_BATCH)])
    return torch.stack([each.argmax(dim=1) for each in logits.split(of.targets, dim=1)], dim=1).numpy()


@cache
def _committed_network(images: SmallSet) -> FeatureNetwork:
    return load_feature_network(images)
