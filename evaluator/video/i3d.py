"""I3D, the network of the Frechet video distance, as TensorFlow Hub's deepmind/i3d-kinetics-400 computes it.

Source: Carreira and Zisserman, "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset", 2017: Inception
with convolutions over space and time. Normalisation is part of the convolutions here (`evaluator.video.weights`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from evaluator.inception.backend import Features
from evaluator.statistics import full_float32

CLIP_FRAMES = 16
SIDE = 224  # pixels, height and width of a resized frame
NUM_CLASSES = 400


class Widths(NamedTuple):
    """Channels of a `Mixed` block: of its single convolutions, and (first, second) of its two pairs."""

    single: int
    pair: tuple[int, int]
    small_pair: tuple[int, int]
    pooled: int

    @property
    def total(self) -> int:
        """Channels of the output."""
        return self.single + self.pair[1] + self.small_pair[1] + self.pooled


class Pool(NamedTuple):
    """Size and stride of a max pooling, in (time, height, width)."""

    size: tuple[int, int, int]
    stride: tuple[int, int, int]


# What follows the first three convolutions, in its order
TRUNK: dict[str, Widths | Pool] = {
    "Mixed_3b": Widths(64, (96, 128), (16, 32), 32),
    "Mixed_3c": Widths(128, (128, 192), (32, 96), 64),
    "MaxPool_4a": Pool((3, 3, 3), (2, 2, 2)),
    "Mixed_4b": Widths(192, (96, 208), (16, 48), 64),
    "Mixed_4c": Widths(160, (112, 224), (24, 64), 64),
    "Mixed_4d": Widths(128, (128, 256), (24, 64), 64),
    "Mixed_4e": Widths(112, (144, 288), (32, 64), 64),
    "Mixed_4f": Widths(256, (160, 320), (32, 128), 128),
    "MaxPool_5a": Pool((2, 2, 2), (2, 2, 2)),
    "Mixed_5b": Widths(256, (160, 320), (32, 128), 128),
    "Mixed_5c": Widths(384, (192, 384), (48, 128), 128),
}
WIDE_POOL = Pool((1, 3, 3), (1, 2, 2))  # of the first two stages, over space alone


def pad_same(x: Tensor, size: Sequence[int], stride: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad as TensorFlow's SAME does: output size ceil(n / stride), the larger half of an odd padding at the end.

    Args:
        x: (N, C, T, H, W).
        size: Kernel in (time, height, width).
        stride: Strides in the same order.
        value: Value of the added elements.
    """
    missing = [
        max((-(-n // step) - 1) * step + width - n, 0) for n, width, step in zip(x.shape[2:], size, stride, strict=True)
    ]
    pads = [(each // 2, each - each // 2) for each in missing]
    return functional.pad(x, [*itertools.chain(*reversed(pads))], value=value)  # PyTorch wants the last axis first


def max_pool(x: Tensor, pool: Pool) -> Tensor:
    """Take maxima of (N, C, T, H, W) with SAME padding, which never is the maximum."""
    return functional.max_pool3d(pad_same(x, *pool, value=-torch.inf), *pool)


class Unit(nn.Module):
    """Convolution with SAME padding and bias, then ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, size, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, T, H, W) to (N, outputs, T / stride, H / stride, W / stride), rounded up."""
        return functional.relu(self.conv(pad_same(x, self.conv.kernel_size, self.conv.stride)))


class Mixed(nn.Module):
    """Four parallel branches, concatenated on channels."""

    def __init__(self, inputs: int, widths: Widths) -> None:
        super().__init__()
        self.single = Unit(inputs, widths.single, 1)
        self.pair, self.small_pair = (
            nn.Sequential(Unit(inputs, first, 1), Unit(first, second, 3)) for first, second in widths[1:3]
        )
        self.pooled = Unit(inputs, widths.pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, T, H, W) to (N, total, T, H, W)."""
        pooled = max_pool(x, Pool((3, 3, 3), (1, 1, 1)))
        return torch.cat([self.single(x), self.pair(x), self.small_pair(x), self.pooled(pooled)], dim=1)


class I3D(nn.Module):
    """Classifier of clips; its logits are the features of the Frechet video distance.

    Args:
        divisor: Divisor of all widths but the number of classes, a power of two up to 8; 1 is the published network.
    """

    def __init__(self, divisor: int = 1) -> None:
        super().__init__()
        width = 64 // divisor
        self.stem = nn.ModuleList([Unit(3, width, 7, stride=2), Unit(width, width, 1), Unit(width, 3 * width, 3)])
        channels, trunk = 3 * width, {}
        for name, widths in TRUNK.items():
            if isinstance(widths, Widths):
                narrow = _divided(widths, divisor)
                trunk[name] = Mixed(channels, narrow)
                channels = narrow.total
        self.trunk = nn.ModuleDict(trunk)
        self.head = nn.Conv3d(channels, NUM_CLASSES, 1)
        self.eval().requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        """Compute logits.

        Args:
            clips: (N, 3, T, 224, 224) float32 in [-1, 1], T >= 9.

        Returns:
            (N, 400) float32, the mean over time.
        """
        first, second, third = self.stem
        x = max_pool(first(clips), WIDE_POOL)
        x = max_pool(third(second(x)), WIDE_POOL)
        for name, layer in TRUNK.items():
            x = max_pool(x, layer) if isinstance(layer, Pool) else self.trunk[name](x)
        x = functional.avg_pool3d(x, (2, 7, 7), stride=1)  # without padding
        return self.head(x).mean(dim=(2, 3, 4))

    @torch.no_grad()
    def features(self, clips: npt.NDArray[np.uint8]) -> Features:
        """Compute the features of clips on the network's device, in full float32.

        Args:
            clips: (N, 16, H, W, 3) uint8, of any size.

        Returns:
            Logits (N, 400) as pool features; no spatial features, (N, 0).
        """
        with full_float32():
            logits = self(prepare(torch.from_numpy(clips).to(self.head.weight.device)))
        return Features(logits, logits[:, :0])


def prepare(clips: Tensor) -> Tensor:
    """Resize clips (N, T, H, W, 3) uint8 to the network's input (N, 3, T, 224, 224) float32 in [-1, 1].

    Each frame is resized bilinearly, with pixel centres at half-integers and without antialiasing.
    """
    frames = clips.flatten(0, 1).permute(0, 3, 1, 2).float()  # (N * T, 3, H, W)
    resized = functional.interpolate(frames, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return resized.unflatten(0, clips.shape[:2]).transpose(1, 2).div(255).mul(2).sub(1)


def _divided(widths: Widths, divisor: int) -> Widths:
    (a, b), (c, d) = widths.pair, widths.small_pair
    return Widths(
        widths.single // divisor,
        (a // divisor, b // divisor),
        (c // divisor, d // divisor),
        widths.pooled // divisor,
    )
