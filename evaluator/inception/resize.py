"""Bilinear resizing as in TensorFlow 1, which published FIDs depend on."""

from __future__ import annotations

import torch
from torch import Tensor


def resize_bilinear(images: Tensor, height: int, width: int) -> Tensor:
    """Resize images; output pixel i is at i * (old size / new size), and nothing is averaged when shrinking.

    Args:
        images: (N, H, W, C) float32.
        height: New H.
        width: New W.

    Returns:
        (N, height, width, C) float32, equal to TensorFlow's to the last bit on a CPU.

    Source: TensorFlow's ResizeBilinear with align_corners and half_pixel_centers off.

    Note:
        `torch.nn.functional.interpolate` puts pixel i at (i + 1/2) * scale - 1/2 instead, which moves features by 1 %.
    """
    return _blend(_blend(images, width, dim=2), height, dim=1)


def _blend(images: Tensor, size: int, dim: int) -> Tensor:
    old_size = images.shape[dim]
    if size == old_size:
        return images
    # float32 like TensorFlow: a position that is exactly on a pixel there must be so here
    scale = torch.tensor(old_size, dtype=torch.float32) / size
    positions = torch.arange(size, dtype=torch.float32) * scale
    lower = positions.floor()
    weights = (positions - lower).to(images.device)
    below = lower.long().to(images.device)
    above = (below + 1).clamp(max=old_size - 1)
    start, end = images.index_select(dim, below), images.index_select(dim, above)
    weights = weights.reshape(size, *[1] * (images.ndim - dim - 1))
    return end.sub_(start).mul_(weights).add_(start)  # start + (end - start) * weight, in place
