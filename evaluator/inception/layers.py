"""The few operations of the Inception graph, as PyTorch modules.

Shapes: N images, C channels, H x W pixels. TensorFlow's order is (N, H, W, C). After the resize, tensors here are
(N, C, H, W) with `channels_last` strides: the same bytes in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from evaluator.inception.resize import resize_bilinear


class Resize(nn.Module):
    """Resizing of images (N, H, W, C) to (N, C, height, width)."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, images: Tensor) -> Tensor:
        """(N, H, W, C) float32 -> (N, C, height, width)."""
        return resize_bilinear(images, self.height, self.width).permute(0, 3, 1, 2)


class Arithmetic(nn.Module):
    """Operation with a constant, such as `operator.sub`."""

    def __init__(self, operation: Callable[[Tensor, float], Tensor], constant: float) -> None:
        super().__init__()
        self.operation, self.constant = operation, constant

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        return self.operation(x, self.constant)


class Convolution(nn.Module):
    """Convolution with its batch normalisation folded in, and a ReLU.

    Args:
        weight: (C_out, C_in, H, W).
        bias: (C_out,).
        stride: Down and across.
        padding: Zeros above and below, left and right.
    """

    def __init__(self, weight: Tensor, bias: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
        self.bias = nn.Parameter(bias)
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W')."""
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding).relu_()


class Pool(nn.Module):
    """Window over pixels."""

    def __init__(self, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> None:
        super().__init__()
        self.size, self.stride, self.padding = size, stride, padding


class MaxPool(Pool):
    """Maximum of a window; padding is never the maximum."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        return functional.max_pool2d(x, self.size, self.stride, self.padding)


class AveragePool(Pool):
    """Mean of a window without its padding, as TensorFlow computes it."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H', W')."""
        return functional.avg_pool2d(x, self.size, self.stride, self.padding, count_include_pad=False)


class Concatenate(nn.Module):
    """Concatenation of channels."""

    def forward(self, *parts: Tensor) -> Tensor:
        """(N, C_i, H, W) each -> (N, sum of C_i, H, W)."""
        return torch.cat(parts, dim=1)
