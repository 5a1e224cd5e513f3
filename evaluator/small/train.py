"""Train the feature network of a set and write its weights; needed only to make new ones.

    python -m evaluator.small.train
    python -m evaluator.small.train --set moving-digits
    python -m evaluator.small.train --set fashion --data-path /usr/share/datasets/fashion-mnist

Eight seconds on one core for the digits, minutes for the moving ones. The same machine gives the same bytes; another
may round differently. Every Frechet distance changes with the weights, so that distances of different weights do not
compare.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from data.array_images import array_digest
from data.small import load_small
from evaluator.small.network import FeatureNetwork
from evaluator.small.sets import DIGITS, SETS, SPLITS, LabelledImages, SmallSet
from runtime.command_line import parse_config
from runtime.errors import UserError, run
from runtime.settings import setting
from runtime.tensor_file import write_tensors

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class FeatureNetworkConfig:
    """Settings of evaluator.small.train."""

    set: str = setting("digits", "set of images", tuple(SETS))
    data_path: Path | None = setting(None, "folder of the idx files of Fashion-MNIST")
    seed: int = setting(0, "seed of initial weights, batches and dropout")
    num_steps: int | None = setting(None, "optimizer steps", shown="1000; 1500 for fashion, 2500 for moving-digits")
    output: Path | None = setting(None, "safetensors file to write", shown="the committed one")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"--num-steps {self.num_steps}: must be at least 1")
        if (self.set == "fashion") != (self.data_path is not None):
            raise ValueError(f"--data-path {self.data_path}: needed for --set fashion, and only for it")


def train_network(of: SmallSet, train: LabelledImages, seed: int, num_steps: int) -> FeatureNetwork:
    """Train on the training split only.

    Args:
        of: The set.
        train: Images (N, *of.shape) uint8 and labels of its training split, (N,) int64, or (N, targets).
        seed: Seed of initial weights, batches and dropout; the global generator does not change.
        num_steps: Number of optimizer steps, >= 1.

    Returns:
        The network in evaluation mode.
    """
    images, labels = (torch.from_numpy(array) for array in train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FeatureNetwork(of)
        optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)
        for _ in range(num_steps):
            rows = torch.randint(len(images), (of.batch_size,))
            _, logits = network(images[rows])
            optimizer.zero_grad()
            targets = labels[rows].reshape(of.batch_size, -1)
            losses = map(functional.cross_entropy, logits.split(of.targets, dim=1), targets.unbind(dim=1))
            torch.stack([*losses]).sum().backward()
            optimizer.step()
            scheduler.step()
    return network.eval()


def measure_accuracy(
    network: FeatureNetwork, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], of: SmallSet = DIGITS
) -> float:
    """Share of images that a network in evaluation mode gives all their labels, in [0, 1].

    Args:
        network: The network.
        images: (N, *of.shape) uint8.
        labels: (N,) int64, or (N, targets).
        of: The set.
    """
    with torch.no_grad():
        _, logits = network(torch.from_numpy(images))
    predicted = torch.stack([each.argmax(dim=1) for each in logits.split(of.targets, dim=1)], dim=1)
    return float(np.mean((predicted.numpy() == labels.reshape(len(labels), -1)).all(axis=1)))


def write_weights(network: FeatureNetwork, path: Path, metadata: Mapping[str, int | float | str]) -> None:
    """Write a safetensors file, whole or not at all, with JSON values in its header under "training"."""
    write_tensors(path, network.state_dict(), metadata, "training")


def main(argv: Sequence[str]) -> None:
    """Train, check the accuracy on the test split, and write the weights."""
    config = parse_config(FeatureNetworkConfig, argv, program="evaluator.small.train", doc=__doc__)
    torch.set_num_threads(1)  # sums depend on how many threads share them
    of = SETS[config.set]
    train, test = (load_small(of.name, split, config.data_path) for split in SPLITS)
    num_steps, output = config.num_steps or of.num_steps, config.output or of.weights
    network = train_network(of, train, config.seed, num_steps)
    accuracy = measure_accuracy(network, *test, of)
    if accuracy < of.min_accuracy:
        raise UserError(f"--num-steps {num_steps}: test accuracy {accuracy:.4f} is below {of.min_accuracy}")
    recorded: dict[str, int | float | str] = {
        "seed": config.seed,
        "steps": num_steps,
        "test_accuracy": accuracy,
        "data": array_digest(*train),
    }
    write_weights(network, output, recorded)
    print(f"test accuracy {accuracy:.4f}, {output.stat().st_size:,} bytes in {output}")


if __name__ == "__main__":
    sys.exit(run(main, "evaluator.small.train"))
