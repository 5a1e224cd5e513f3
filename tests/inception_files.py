"""Weight files, images and .npz files for the evaluator's tests, and the mistakes that ports of ADM's code make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.inception_graph import synthetic_graph
from evaluator.inception import layers
from evaluator.inception.backend import Features
from evaluator.inception.network import InceptionNetwork
from tests.golden_data import GOLDEN

NARROW = 16  # the published numbers of channels are divided by it
RECORDED = (
    GOLDEN / "evaluator" / "synthetic_features.npz"
)  # TensorFlow's features; test_tensorflow_backend.py keeps them
Images = npt.NDArray[np.uint8]
Mistake = Callable[[InceptionNetwork, pytest.MonkeyPatch], None]


def make_images(count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> Images:
    """Patches of colour with noise on them, (N, H, W, 3) uint8; noise alone would look the same to any network."""
    random = np.random.RandomState(seed)
    coarse = torch.from_numpy(random.uniform(0, 255, (count, 3, 4, 4)))
    patches = functional.interpolate(coarse, size=size, mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    noise = torch.from_numpy(random.normal(0, 40, patches.shape))
    return (patches + noise).round().clamp(0, 255).to(torch.uint8).contiguous().numpy()


def write_npz(path: Path, images: Images, compressed: bool = False, **others: npt.NDArray[Any]) -> Path:
    """An .npz as sample_ddp.py and ADM write it."""
    (np.savez_compressed if compressed else np.savez)(path, arr_0=images, **others)
    return path


def write_graph(path: Path, **options: Any) -> Path:
    """A synthetic weight file; narrow by default."""
    path.write_bytes(synthetic_graph(**{"divisor": NARROW, **options}))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes: each spoils a network, and names the features in which that must show


def _resize_by_pytorch(antialias: bool) -> Mistake:
    def resize(images: Tensor, height: int, width: int) -> Tensor:
        channels_first = images.permute(0, 3, 1, 2)
        options: dict[str, Any] = {"mode": "bilinear", "antialias": antialias}
        return functional.interpolate(channels_first, (height, width), **options).permute(0, 2, 3, 1)

    return lambda network, patch: patch.setattr(layers, "resize_bilinear", resize)


def _count_padding(network: InceptionNetwork, patch: pytest.MonkeyPatch) -> None:
    def forward(self: layers.AveragePool, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, self.size, self.stride, self.padding)

    patch.setattr(layers.AveragePool, "forward", forward)


def _mean_in_the_last_block(network: InceptionNetwork, patch: pytest.MonkeyPatch) -> None:
    _replace(network, "mixed_10/tower_2/pool", lambda old: layers.AveragePool(old.size, old.stride, old.padding))


def _max_in_the_block_before(network: InceptionNetwork, patch: pytest.MonkeyPatch) -> None:
    _replace(network, "mixed_9/tower_2/pool", lambda old: layers.MaxPool(old.size, old.stride, old.padding))


def _replace(network: InceptionNetwork, name: str, make: Callable[[Any], nn.Module]) -> None:
    network.steps = [replace(step, module=make(step.module)) if step.output == name else step for step in network.steps]


def _round_weights(network: InceptionNetwork, patch: pytest.MonkeyPatch) -> None:
    for parameter in network.parameters():
        parameter.copy_(parameter.bfloat16())


def _channels_first(network: InceptionNetwork, patch: pytest.MonkeyPatch) -> None:
    right = network.forward

    def forward(images: Tensor) -> Features:
        pool, spatial = right(images)
        return Features(pool, spatial.unflatten(1, (17, 17, 7)).permute(0, 3, 1, 2).flatten(start_dim=1))

    network.forward = forward  # type: ignore[method-assign]


def _swap_towers(network: InceptionNetwork, patch: pytest.MonkeyPatch) -> None:
    def forward(self: layers.Concatenate, first: Tensor, *others: Tensor) -> Tensor:
        return torch.cat([*others, first], dim=1) if first.shape[2] == 8 else torch.cat([first, *others], dim=1)

    patch.setattr(layers.Concatenate, "forward", forward)


BOTH, POOL, SPATIAL = ("pool", "spatial"), ("pool",), ("spatial",)
MISTAKES: dict[str, tuple[Mistake, tuple[str, ...]]] = {
    "padding counts in averages": (_count_padding, BOTH),
    "mean pool in mixed_10": (_mean_in_the_last_block, POOL),
    "max pool in mixed_9": (_max_in_the_block_before, POOL),
    "half-pixel resize": (_resize_by_pytorch(antialias=False), BOTH),
    "antialiased resize": (_resize_by_pytorch(antialias=True), BOTH),
    "channels before places": (_channels_first, SPATIAL),
    "weights in bfloat16": (_round_weights, BOTH),
    "order of towers": (_swap_towers, POOL),
}
