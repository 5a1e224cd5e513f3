"""Rows of conditioning: of all samples, and of a batch."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.contract import Conditioning
from runtime.errors import UserError
from sampling.config import check_labels


def check_rows(
    takes: Sequence[str], num_classes: int, rows: Mapping[str, Any], count: int | None
) -> tuple[dict[str, Tensor], int]:
    """Check the conditioning of all samples, and their number.

    Args:
        takes: Names of the network's conditioning.
        num_classes: Number of classes, of networks with labels.
        rows: Conditioning by name, N rows in front; labels may be any whole numbers.
        count: Number of samples of a network without conditioning.

    Returns:
        Conditioning as tensors, and the number of samples.

    Raises:
        UserError: If they do not fit the network or each other.
    """
    for name in sorted(rows.keys() ^ set(takes)):
        known, problem = ", ".join(takes).replace("y", "labels"), "missing" if name in takes else "unknown"
        known = known or "none; give count"
        raise UserError(f"{'labels' if name == 'y' else name}: {problem}; conditioning of this network: {known}")
    if bool(takes) == (count is not None) or (count is not None and count < 1):
        needs = "has no effect: there is one image per row" if takes else "must be at least 1"
        raise UserError(f"count {count}: {needs}")
    if "y" in rows:
        try:
            numbers = [operator.index(label) for label in rows["y"]]
        except TypeError as error:
            raise UserError(f"labels {rows['y']}: must be whole numbers, one per image") from error
        check_labels(numbers, num_classes, "labels")
        rows = {**rows, "y": torch.tensor(numbers)}
    if count is not None:
        return {}, count
    if len({len(leaf) for leaf in rows.values()} | {0}) != 2:
        raise UserError("labels and conditioning: must have one row per image, and at least one")
    return dict(rows), len(next(iter(rows.values())))


def batch_indices(start: int, size: int, count: int) -> list[int]:
    """Numbers of the images in a batch; the last batch is filled up from the first images, so all have one size."""
    return [i % count for i in range(start, start + size)]


def take(rows: Conditioning, indices: Sequence[int]) -> dict[str, Tensor]:
    """Return the rows of these numbers."""
    return {name: leaf[indices] for name, leaf in rows.items()}
