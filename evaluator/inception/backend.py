"""Interface of the Inception network, and the names of its nodes in the frozen graph."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

# Nodes of the frozen graph, as ADM's evaluator uses them
IMAGES = "ExpandDims"  # (N, H, W, 3) float32 in [0, 255]; the graph itself resizes and scales
POOL = "pool_3"  # (N, 1, 1, 2048)
SPATIAL = "mixed_6/conv"  # (N, 17, 17, 192), after normalisation and ReLU
SPATIAL_CHANNELS = 7  # the first ones, so that 17 * 17 * 7 = 2023 is about as wide as the pool
SOFTMAX_PRODUCT = "softmax/logits/MatMul"  # its second input holds the classifier's weights (2048, 1008)


class Features(NamedTuple):
    """Features of N images.

    Attributes:
        pool: (N, 2048) float32, for FID, Inception Score, precision and recall.
        spatial: (N, 2023) float32, for sFID: (17, 17, 7) flattened, channels last.
    """

    pool: Tensor
    spatial: Tensor


class FeatureBackend(Protocol):
    """Network of one weight file, of images or clips."""

    def features(self, images: npt.NDArray[np.uint8], /) -> Features:
        """Compute both kinds of features, on the backend's device.

        Args:
            images: (N, H, W, 3) uint8, or clips (N, F, H, W, 3), of any size.
        """
        ...


class Backend(FeatureBackend, Protocol):
    """Network of images that is also a classifier."""

    def probabilities(self, pool: Tensor) -> Tensor:
        """Compute the class probabilities of the Inception Score.

        Args:
            pool: (N, 2048) float32.

        Returns:
            (N, 1008) float32, the softmax of pool @ weights. The classifier's bias is left out, as ADM does.
        """
        ...
