"""Train the feature network of the digits and write its weights; needed only to make new ones.

    python -m evaluator.digits.train

Eight seconds on one core. The same machine gives the same bytes; another may round differently. Every Frechet distance
of digits changes with the weights, so that distances of different weights do not compare.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from data.digits import load_digits
from evaluator.digits.network import WEIGHTS_PATH, DigitsFeatureNetwork
from runtime.command_line import parse_config
from runtime.errors import UserError, run
from runtime.settings import setting
from runtime.tensor_file import write_tensors

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
MIN_ACCURACY = 0.975


@dataclass(frozen=True)
class FeatureNetworkConfig:
    """Settings of evaluator.digits.train."""

    seed: int = setting(0, "seed of initial weights, batches and dropout")
    num_steps: int = setting(1000, "optimizer steps")
    output: Path = setting(WEIGHTS_PATH, "safetensors file to write", shown="the committed one")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.num_steps < 1:
            raise ValueError(f"--num-steps {self.num_steps}: must be at least 1")


def train_network(seed: int, num_steps: int) -> DigitsFeatureNetwork:
    """Train on the training split only.

    Args:
        seed: Seed of initial weights, batches and dropout; the global generator does not change.
        num_steps: Number of optimizer steps, >= 1.

    Returns:
        The network in evaluation mode.
    """
    images, labels = (torch.from_numpy(array) for array in load_digits("train"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DigitsFeatureNetwork()
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)
        for _ in range(num_steps):
            rows = torch.randint(len(images), (BATCH_SIZE,))
            _, logits = network(images[rows])
            optimizer.zero_grad()
            functional.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
            scheduler.step()
    return network.eval()


def measure_accuracy(
    network: DigitsFeatureNetwork, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
) -> float:
    """Share of images (N, 8, 8, 1) uint8 that a network in evaluation mode gives their labels (N,) int64, in [0, 1]."""
    with torch.no_grad():
        _, logits = network(torch.from_numpy(images))
    return float(np.mean(logits.argmax(dim=1).numpy() == labels))


def write_weights(network: DigitsFeatureNetwork, path: Path, metadata: dict[str, int | float]) -> None:
    """Write a safetensors file, whole or not at all, with JSON values in its header under "training"."""
    write_tensors(path, network.state_dict(), metadata, "training")


def main(argv: Sequence[str]) -> None:
    """Train, check the accuracy on the test split, and write the weights."""
    config = parse_config(FeatureNetworkConfig, argv, program="evaluator.digits.train", doc=__doc__)
    torch.set_num_threads(1)  # sums depend on how many threads share them
    network = train_network(config.seed, config.num_steps)
    accuracy = measure_accuracy(network, *load_digits("test"))
    if accuracy < MIN_ACCURACY:
        raise UserError(f"--num-steps {config.num_steps}: test accuracy {accuracy:.4f} is below {MIN_ACCURACY}")
    write_weights(network, config.output, {"seed": config.seed, "steps": config.num_steps, "test_accuracy": accuracy})
    print(f"test accuracy {accuracy:.4f}, {config.output.stat().st_size:,} bytes in {config.output}")


if __name__ == "__main__":
    sys.exit(run(main, "evaluator.digits.train"))
