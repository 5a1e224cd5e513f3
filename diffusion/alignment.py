"""Representation alignment (REPA): a network's inner features are trained towards those of a frozen vision encoder.

Yu et al., 2024 (arXiv 2410.06940). An optional part of training: the projector learns with the network, is saved and
resumed with it, and is no part of the model that images are sampled from.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class ImageEncoder(Protocol):
    """Encoder of the target tokens."""

    width: int
    """Channels of a token."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Tokens (N, T, width) of images (N, 3, H, W) in [0, 1], without gradients."""


class Alignment(nn.Module):
    """The loss between projected features and an encoder's tokens, on square grids.

    Args:
        encoder: Frozen encoder; its weights are no part of this module.
        features: Width of the network's features.
        block: 1-based number of the block after which they are taken.
        weight: Weight of the loss.
        hidden: Width inside the projector; None takes `features`.

    Raises:
        ValueError: For a block below 1, a hidden width below 1, or a weight that is not positive and finite.
    """

    def __init__(
        self, encoder: ImageEncoder, features: int, *, block: int = 8, weight: float = 0.5, hidden: int | None = None
    ) -> None:
        super().__init__()
        hidden = features if hidden is None else hidden
        for name, value in (("block", block), ("hidden width", hidden)):
            if value < 1:
                raise ValueError(f"the {name} must be at least 1, not {value}")
        if not 0 < weight < float("inf"):
            raise ValueError(f"the weight must be positive and finite, not {weight}")
        self.block, self.weight = block, weight
        self._encode = encoder
        self.projector = nn.Sequential(
            nn.Linear(features, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, encoder.width),
        )

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        """1 - cosine between projected features (N, T, D) of `block` and targets, mean over tokens, (N,) float32.

        Images are (N, 3, H, W) floats in [0, 1].

        Raises:
            ValueError: If one of the grids is not square.
        """
        with torch.no_grad():
            targets = resample_tokens(self._encode(images).float(), features.shape[1])
        projected = self.projector(features).float()
        return 1 - functional.cosine_similarity(projected, targets, dim=-1).mean(dim=1)

    def add_to(self, losses: dict[str, Tensor], features: Tensor | None, images: Tensor | None) -> dict[str, Tensor]:
        """Add "align" to a step's losses, (N,) each, and its share to "loss"; a ValueError if an input is missing."""
        if features is None or images is None:
            raise ValueError("alignment needs the network's features and the raw images of the batch")
        align = self(features, images)
        return {**losses, "loss": losses["loss"] + self.weight * align, "align": align}


def resample_tokens(tokens: Tensor, count: int) -> Tensor:
    """Resample a square grid of tokens bilinearly: (N, T, D) -> (N, count, D); a ValueError for other grids."""
    if tokens.shape[1] == count:
        return tokens
    old, new = math.isqrt(tokens.shape[1]), math.isqrt(count)
    if old**2 != tokens.shape[1] or new**2 != count:
        raise ValueError(f"{tokens.shape[1]} target tokens cannot be resampled to {count}: both grids must be square")
    grid = tokens.reshape(len(tokens), old, old, -1).permute(0, 3, 1, 2)
    return functional.interpolate(grid, size=(new, new), mode="bilinear").flatten(2).transpose(1, 2)
