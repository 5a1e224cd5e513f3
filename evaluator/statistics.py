"""Rows of features, and their mean and covariance in float64.

Shapes: N rows (one per image), D features. Arrays are NumPy's or PyTorch's; CUDA tensors stay on their GPU.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = Tensor | npt.NDArray[np.generic]

ROWS_PER_UPDATE = 4096  # of a block of sums; bounds the float64 copy of the features: 64 MiB at D = 2048
ASYMMETRY = 1e-4  # relative to a covariance's largest entry, which is on the diagonal; sums in float32 reach 1e-5


def as_rows(features: Array, name: str, device: torch.device | str | None = None) -> Tensor:
    """Check feature rows and make them a tensor, without a copy where none is needed.

    Args:
        features: (N, D) real numbers, N >= 1.
        name: Subject of error messages.
        device: Device of the result; None keeps the present one.

    Returns:
        (N, D) tensor of the given dtype.

    Raises:
        ValueError: If they are not two-dimensional, have no rows or columns, or hold NaN or infinity.
    """
    if isinstance(features, np.ndarray):
        # PyTorch shares memory only with arrays that it could write to; read-only and strided ones are copied
        features = torch.from_numpy(np.require(features, requirements=["C", "W"]))
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} must be (N, D) with N, D >= 1, not of shape {tuple(features.shape)}")
    bad = len(features) - int(torch.isfinite(features).all(dim=1).sum())
    if bad:
        raise ValueError(f"{name} has NaN or infinity in {bad} of {len(features)} rows")
    features = features.detach()
    return features if device is None else features.to(device)


def require_same_width(a: int, b: int) -> None:
    """Check that two sets have the same number of features."""
    if a != b:
        raise ValueError(f"the two sets have different numbers of features: {a} and {b}")


def require_two_rows(count: int) -> None:
    """Check that there are enough rows for a covariance."""
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 rows of features, not {count}")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of a set of features.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, symmetric, unbiased (divided by count - 1).
        count: Number of rows that they were computed from; None where a stored file does not say.

    Raises:
        ValueError: For other shapes or dtypes, values that are not finite, or a covariance that is not symmetric.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    def __post_init__(self) -> None:
        """Validate the fields."""
        if self.mean.ndim != 1 or self.covariance.shape != 2 * self.mean.shape or not len(self.mean):
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            raise ValueError(f"mean and covariance must be (D,) and (D, D) with D >= 1, not {shapes}")
        if self.mean.dtype != torch.float64 or self.covariance.dtype != torch.float64:
            raise ValueError(f"mean and covariance must be float64, not {self.mean.dtype} and {self.covariance.dtype}")
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all()):
            raise ValueError("mean or covariance has NaN or infinity")
        difference = float((self.covariance - self.covariance.T).max())  # each difference occurs with both signs
        if difference > ASYMMETRY * float(self.covariance.diagonal().abs().max()):
            raise ValueError(
                f"covariance is not symmetric: entries differ from their mirror images by up to {difference:.3g}; "
                "is it a triangle, or a factor?"
            )

    def sha256(self) -> str:
        """Digest of the numbers, which a copy of them in another file has, too."""
        digest = hashlib.sha256()
        for values in (self.mean, self.covariance):
            digest.update(values.cpu().contiguous().numpy().data)
        return digest.hexdigest()


class StatisticsAccumulator:
    """Accumulator of mean and covariance over batches, in float64; memory is D x D for any number of rows.

    The rows are cut into blocks of `ROWS_PER_UPDATE`, counted from the first row, and the sums of blocks are added in
    their order: not a bit of the result depends on the cut into updates.

    Source: the pairwise update of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979. Unlike sums of squares it does not cancel when the mean is large.
    """

    def __init__(self) -> None:
        self.count = 0
        self._added = 0  # rows in the sums; the others are pending
        self._mean = torch.zeros(0, dtype=torch.float64)  # (D,)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # (D, D) sum of outer products about the mean
        self._pending: list[Tensor] = []  # less than a block

    @property
    def width(self) -> int:
        """Number of features; 0 without rows."""
        return self._pending[0].shape[1] if self._pending else len(self._mean)

    def update(self, features: Array) -> None:
        """Add rows.

        Args:
            features: (N, D) real numbers; D as in earlier calls.

        Raises:
            ValueError: If they are not a finite (N, D) matrix, or D changes.
        """
        rows = as_rows(features, "features")
        if self.count:
            require_same_width(self.width, rows.shape[1])
        self.count += len(rows)
        if self.count - self._added < ROWS_PER_UPDATE:
            self._pending.append(rows.clone())
            return
        rows = torch.cat([*self._pending, rows]) if self._pending else rows
        whole = len(rows) // ROWS_PER_UPDATE * ROWS_PER_UPDATE
        for block in rows[:whole].split(ROWS_PER_UPDATE):
            self._add(block)
        self._pending = [rows[whole:].clone()] if whole < len(rows) else []

    def result(self) -> Statistics:
        """Return the statistics of all rows so far.

        Raises:
            ValueError: With fewer than two rows, which have no covariance.
        """
        require_two_rows(self.count)
        total = copy.copy(self)
        total._mean, total._scatter = self._mean.clone(), self._scatter.clone()
        if self._pending:
            total._add(torch.cat(self._pending))
        return Statistics(total._mean, total._scatter / (self.count - 1), self.count)

    def _add(self, block: Tensor) -> None:
        rows = block.double()
        mean = rows.mean(dim=0)
        centred = rows - mean
        if self._added == 0:
            self._mean, self._scatter = torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean))
        total = self._added + len(rows)
        shift = mean - self._mean
        self._scatter += centred.T @ centred
        self._scatter.addr_(shift, shift, alpha=self._added * len(rows) / total)
        self._mean += shift * (len(rows) / total)
        self._added = total


def feature_statistics(features: Array) -> Statistics:
    """Compute mean and covariance of all rows at once, accumulated in float64.

    Args:
        features: (N, D) real numbers, N >= 2.

    Raises:
        ValueError: If they are not a finite (N, D) matrix, or have a single row.

    Note:
        The ADM evaluator takes the mean in float32, which changes a distance by about 1e-7 of its value.
    """
    accumulator = StatisticsAccumulator()
    accumulator.update(features)
    return accumulator.result()


@contextmanager
def full_float32() -> Iterator[None]:
    """Switch TF32 and bfloat16 off inside the block, whatever training has chosen for products and convolutions.

    A distance is a difference of large products, and every published number is computed from features: both need all
    bits.
    """
    switches = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    )
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
