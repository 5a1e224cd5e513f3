"""Metrics of generated images as pure functions of features: Frechet distance, Inception Score, precision and recall.

The definitions are those of the ADM evaluator (Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis",
2021), the one that published DiT numbers come from; where its code fails or loses digits, ours does not, and a Note
says so. Which network made the features is the caller's business: FID is `frechet_distance` on InceptionV3 features.

Shapes: N, M rows (one an image), D features, C classes, R rank. Arrays are NumPy's or PyTorch's; the computation runs
where the tensors lie, so CUDA tensors stay on their GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = Tensor | npt.NDArray[Any]
DistancePrecision = Literal["adm", "float32"]

ROWS_PER_UPDATE = 4096  # bounds the float64 copy of the features: 64 MiB at D = 2048
ASYMMETRY = 1e-4  # of a covariance's largest entry, which is on the diagonal; sums in float32 reach 1e-5
ADM_SPLIT_SIZE = 5000  # rows of one Inception Score split
ADM_BLOCK_SIZE = 10_000  # rows and columns of one block of distances


def _as_rows(features: Array, name: str, device: torch.device | str | None = None) -> Tensor:
    """Checks a set of feature rows and makes it a tensor, without a copy where none is needed.

    Args:
        features: (N, D) real numbers, N >= 1.
        name: what an error message calls them.
        device: where the tensor shall lie; None leaves it where it is.

    Returns:
        (N, D) tensor of the dtype given.

    Raises:
        ValueError: if they are not two-dimensional, have no rows or columns, or hold NaN or infinity.
    """
    if isinstance(features, np.ndarray):
        # PyTorch shares memory only with arrays it could write to; read-only and strided ones are copied
        features = torch.from_numpy(np.require(features, requirements=["C", "W"]))
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} must be (N, D) with N, D >= 1, not of shape {tuple(features.shape)}")
    bad = len(features) - int(torch.isfinite(features).all(dim=1).sum())
    if bad:
        raise ValueError(f"{name} has NaN or infinity in {bad} of {len(features)} rows")
    features = features.detach()
    return features if device is None else features.to(device)


def _require_same_width(a: int, b: int) -> None:
    if a != b:
        raise ValueError(f"the two sets have different numbers of features: {a} and {b}")


def _require_two_rows(count: int) -> None:
    if count < 2:
        raise ValueError(f"a covariance needs at least 2 rows of features, not {count}")


# ----------------------------------------------------------------------------------------------------------------------
# Mean and covariance


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of a set of features.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64, symmetric, unbiased (divided by count - 1).
        count: the number of rows behind them; None where a stored file does not say.

    Raises:
        ValueError: for other shapes or dtypes, values that are not finite, or a covariance that is not symmetric.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    def __post_init__(self) -> None:
        """Refuses what no set of features can have."""
        if self.mean.ndim != 1 or self.covariance.shape != 2 * self.mean.shape or not len(self.mean):
            shapes = f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            raise ValueError(f"mean and covariance must be (D,) and (D, D) with D >= 1, not {shapes}")
        if self.mean.dtype != torch.float64 or self.covariance.dtype != torch.float64:
            raise ValueError(f"mean and covariance must be float64, not {self.mean.dtype} and {self.covariance.dtype}")
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all()):
            raise ValueError("mean or covariance has NaN or infinity")
        difference = float((self.covariance - self.covariance.T).max())  # each stands there with both signs
        if difference > ASYMMETRY * float(self.covariance.diagonal().abs().max()):
            raise ValueError(
                f"covariance is not symmetric: entries differ from their mirror images by up to {difference:.3g}; "
                "is it a triangle, or a factor?"
            )


class StatisticsAccumulator:
    """Gathers mean and covariance from batches of features, in float64; memory is D x D for any number of rows.

    Several ranks accumulate their share each, exchange the accumulators (they pickle) and `merge` them in rank order.

    Source: the pairwise update of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979. Unlike sums of squares it does not cancel when the mean is large.
    """

    def __init__(self) -> None:
        """Starts with no rows."""
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)  # (D,)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # (D, D) sum of outer products about the mean

    def update(self, features: Array) -> None:
        """Adds rows.

        Args:
            features: (N, D) real numbers; D as in earlier calls.

        Raises:
            ValueError: if they are no finite (N, D) matrix, or D changes.
        """
        rows = _as_rows(features, "features")
        for start in range(0, len(rows), ROWS_PER_UPDATE):
            chunk = rows[start : start + ROWS_PER_UPDATE].double()
            mean = chunk.mean(dim=0)
            centred = chunk - mean
            self._absorb(len(chunk), mean, centred.T @ centred)

    def merge(self, other: StatisticsAccumulator) -> None:
        """Adds the rows that another accumulator has seen; the other one stays as it is.

        Args:
            other: gathered from features of the same network.

        Raises:
            ValueError: if its features have another width.
        """
        if other.count:
            self._absorb(other.count, other._mean.to(self._mean.device), other._scatter.to(self._mean.device))

    def to(self, device: torch.device | str) -> StatisticsAccumulator:
        """Moves the sums to a device, as before sending them to another rank; returns itself."""
        self._mean, self._scatter = self._mean.to(device), self._scatter.to(device)
        return self

    def result(self) -> Statistics:
        """Returns the statistics of all rows so far.

        Raises:
            ValueError: with fewer than two rows, which have no covariance.
        """
        _require_two_rows(self.count)
        return Statistics(self._mean.clone(), self._scatter / (self.count - 1), self.count)

    def _absorb(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.count == 0:
            self._mean, self._scatter = torch.zeros_like(mean), torch.zeros_like(scatter)
        _require_same_width(len(self._mean), len(mean))
        total = self.count + count
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(shift, shift, alpha=self.count * count / total)
        self._mean += shift * (count / total)
        self.count = total


def feature_statistics(features: Array) -> Statistics:
    """Computes mean and covariance of all rows at once.

    Args:
        features: (N, D) real numbers, N >= 2.

    Returns:
        Their statistics, accumulated in float64.

    Raises:
        ValueError: if they are no finite (N, D) matrix, or have a single row.

    Note:
        The ADM evaluator takes the mean in float32, which moves a distance by about 1e-7 of its value.
    """
    accumulator = StatisticsAccumulator()
    accumulator.update(features)
    return accumulator.result()


# ----------------------------------------------------------------------------------------------------------------------
# Frechet distance
#
# Between Gaussians it is |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr sqrt(S_a S_b). For any factors with A A' = S_a and
# B B' = S_b, the last trace is the sum of the singular values of A' B. A square root of the product S_a S_b itself
# (scipy's sqrtm) is slower, and turns complex or loses half its digits where a covariance is singular.


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Computes the Frechet (2-Wasserstein) distance, squared, between two Gaussians; the D in FID and sFID.

    Cholesky factors and symmetric eigenvalues if both covariances have full rank, otherwise (fewer rows than features,
    constant features) the singular values of eigenvector factors. Nothing is added to the diagonals.

    Args:
        a: statistics of one set.
        b: statistics of the other, of the same width.

    Returns:
        The distance, >= 0; rounding below zero (about 1e-13 of the traces) is clamped.

    Raises:
        ValueError: if the widths differ, or a matrix is not a covariance (it has a clearly negative eigenvalue).

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule...", 2017, equation 6.

    Note:
        The ADM evaluator uses sqrtm, with 1e-6 on the diagonals where that fails. From few rows its distances come
        out too small, by up to 6e-6 of the value; otherwise the two agree to rounding.
    """
    _require_same_width(len(a.mean), len(b.mean))
    overlap = _overlap_of_covariances(a.covariance, b.covariance)
    return _assemble(a.mean - b.mean, a.covariance.trace(), b.covariance.trace(), overlap)


def frechet_distance_from_features(a: Array, b: Array) -> float:
    """Computes the Frechet distance of two sets of features; the exact and fast way when a set has few rows.

    A set with no more rows than features is its own factor, so that its singular covariance is never formed.

    Args:
        a: (N, D) real numbers, N >= 2.
        b: (M, D) real numbers, M >= 2.

    Returns:
        The distance, >= 0, as `frechet_distance`.

    Raises:
        ValueError: for different widths, a single row, NaN or infinity.
    """
    a, b = _as_rows(a, "features a"), _as_rows(b, "features b")
    width = a.shape[1]
    _require_same_width(width, b.shape[1])
    if min(len(a), len(b)) > width:
        return frechet_distance(feature_statistics(a), feature_statistics(b))
    mean_a, factor_a = _mean_and_factor(a)
    mean_b, factor_b = _mean_and_factor(b)
    overlap = _overlap_of_factors(factor_a, factor_b)
    return _assemble(mean_a - mean_b, factor_a.square().sum(), factor_b.square().sum(), overlap)


def _assemble(shift: Tensor, trace_a: Tensor, trace_b: Tensor, overlap: Tensor) -> float:
    distance = float(shift.dot(shift) + trace_a + trace_b - 2 * overlap)
    return max(distance, 0.0)


def _overlap_of_covariances(a: Tensor, b: Tensor) -> Tensor:
    """Returns tr sqrt(a b) for covariances a, b (D, D)."""
    factor_a, factor_b = _cholesky(a), _cholesky(b)
    if factor_a is None or factor_b is None:
        factor_a = _eigenvector_factor(a) if factor_a is None else factor_a
        factor_b = _eigenvector_factor(b) if factor_b is None else factor_b
        return _overlap_of_factors(factor_a, factor_b)
    # the squares of the singular values of A' B, four times faster
    similar_to_product = factor_a.T @ b @ factor_a
    return torch.linalg.eigvalsh(similar_to_product).clamp(min=0).sqrt().sum()


def _overlap_of_factors(a: Tensor, b: Tensor) -> Tensor:
    """Returns tr sqrt(a a' b b') for factors (D, R_a) and (D, R_b)."""
    return torch.linalg.svdvals(a.T @ b).sum()


def _mean_and_factor(features: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the mean (D,) and a factor (D, R) of the covariance of features (N, D), R <= min(N, D)."""
    count, width = features.shape
    _require_two_rows(count)
    if count > width:
        statistics = feature_statistics(features)
        factor = _cholesky(statistics.covariance)
        return statistics.mean, _eigenvector_factor(statistics.covariance) if factor is None else factor
    rows = features.double()
    mean = rows.mean(dim=0)
    return mean, (rows - mean).T / math.sqrt(count - 1)


def _cholesky(covariance: Tensor) -> Tensor | None:
    """Returns the lower triangular factor, or None if the matrix is singular to working precision."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return None if failed else factor


def _eigenvector_factor(covariance: Tensor) -> Tensor:
    """Returns a factor (D, R) of a covariance of numerical rank R.

    Eigenvalues at rounding level are left out: their square roots are not at rounding level, and thousands add up.
    """
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    largest = float(values[-1])
    if float(values[0]) < -1e-4 * abs(largest):  # stored float32 matrices reach -1e-6
        raise ValueError(f"not a covariance: its eigenvalues reach from {float(values[0]):.3g} to {largest:.3g}")
    kept = values > largest * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


# ----------------------------------------------------------------------------------------------------------------------
# Kernel distance


def kernel_distance(a: Array, b: Array, *, block_size: int = ADM_BLOCK_SIZE) -> float:
    """Computes the squared maximum mean discrepancy for the kernel (x y / D + 1)^3, the D in KID.

    Unlike FID it has no bias from few rows: its expectation does not depend on their number.

    Args:
        a: (N, D) features, N >= 2.
        b: (M, D) features, M >= 2.
        block_size: rows and columns of products held at a time; bounds memory.

    Returns:
        The unbiased estimate over all pairs of rows; near 0, on either side, for sets of one distribution.

    Raises:
        ValueError: for different widths, a single row, NaN or infinity.

    Source: Binkowski et al., "Demystifying MMD GANs", 2018, section 4.

    Note:
        Published values are means over random subsets of 1,000 rows, with the same expectation, often times 1,000.
    """
    a, b = _as_rows(a, "features a"), _as_rows(b, "features b")
    _require_same_width(a.shape[1], b.shape[1])
    _require_two_rows(min(len(a), len(b)))

    def kernel_sum(u: Tensor, v: Tensor) -> float:
        total = 0.0
        for rows in u.float().split(block_size):
            for columns in v.float().split(block_size):
                with full_float32():
                    products = rows @ columns.T
                total += float(products.double().div_(u.shape[1]).add_(1).pow_(3).sum())
        return total

    def own_mean(u: Tensor) -> float:
        with_themselves = float(u.double().square().sum(dim=1).div(u.shape[1]).add(1).pow(3).sum())
        return (kernel_sum(u, u) - with_themselves) / (len(u) * (len(u) - 1))

    return own_mean(a) + own_mean(b) - 2 * kernel_sum(a, b) / (len(a) * len(b))


# ----------------------------------------------------------------------------------------------------------------------
# Inception Score


def inception_score(probabilities: Array, split_size: int = ADM_SPLIT_SIZE) -> float:
    """Computes the Inception Score, averaged over consecutive splits.

    Of each split it is exp(mean KL(p(y|x) || p(y))), from 1 (all rows alike) to C (certain, and classes balanced).

    Args:
        probabilities: (N, C) softmax outputs of a classifier, rows in sampling order; exact zeros are allowed.
        split_size: rows of a split; the last split may be short, and counts as much as the others.

    Returns:
        The plain mean over splits, in [1, C].

    Raises:
        ValueError: if the rows are not probabilities, or for split_size < 1.

    Source: Salimans et al., "Improved Techniques for Training GANs", 2016, section 4.

    Note:
        The ADM evaluator splits by 5,000 rows, not into 10 parts, and returns NaN once a probability underflows.
    """
    rows = _as_rows(probabilities, "probabilities")
    if split_size < 1:
        raise ValueError(f"split_size must be at least 1, not {split_size}")
    if float(rows.min()) < 0 or float((rows.sum(dim=1, dtype=torch.float64) - 1).abs().max()) > 1e-3:
        raise ValueError("probabilities must be >= 0 and sum to 1 in each row; pass softmax outputs, not logits")
    scores = [_score_of_split(split.double()) for split in rows.split(split_size)]
    return float(torch.stack(scores).mean())


def _score_of_split(probabilities: Tensor) -> Tensor:
    # mean KL = entropy of the mean - mean of the entropies; entr(0) = 0, so no logarithm of zero is ever taken
    entropy_of_mean = torch.special.entr(probabilities.mean(dim=0)).sum()
    mean_of_entropies = torch.special.entr(probabilities).sum(dim=1).mean()
    return torch.exp(entropy_of_mean - mean_of_entropies)


# ----------------------------------------------------------------------------------------------------------------------
# Precision and recall


class PrecisionRecall(NamedTuple):
    """Fidelity and coverage, both in [0, 1].

    Attributes:
        precision: share of the samples that lie inside the manifold of the reference.
        recall: share of the reference that lies inside the manifold of the samples.
    """

    precision: float
    recall: float


def precision_recall(
    reference: Array,
    samples: Array,
    k: int = 3,
    *,
    precision: DistancePrecision = "adm",
    clamp_to_percentile: float | None = None,
    block_size: int = ADM_BLOCK_SIZE,
    device: torch.device | str | None = None,
) -> PrecisionRecall:
    """Computes improved precision and recall: is a row inside any ball around the rows of the other set?

    A ball reaches from its row to the k-th nearest neighbour in the same set.

    Args:
        reference: (N, D) features of real images, N >= k + 1.
        samples: (M, D) features of generated images, M >= k + 1.
        k: the neighbour that sets the radius, >= 1.
        precision: "adm" rounds distances to float16 as published numbers do, "float32" does not; the two differ by up
            to about 0.01 and must not be compared with one another.
        clamp_to_percentile: shrink the balls above this percentile of radii, in [0, 100], to points; None keeps all.
        block_size: rows and columns of distances held at a time; bounds memory (2 x 4 bytes a pair), and is the unit
            in which "adm" falls back to float32 where a distance overflows float16.
        device: where to compute; None means where the features lie.

    Returns:
        Precision and recall.

    Raises:
        ValueError: as `manifold_radii`, or for different widths.

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019,
        equations 1 and 2.
    """
    reference, samples = _as_rows(reference, "reference", device), _as_rows(samples, "samples", device)
    _require_same_width(reference.shape[1], samples.shape[1])
    reference_radii, sample_radii = (
        manifold_radii(rows, k, precision=precision, clamp_to_percentile=clamp_to_percentile, block_size=block_size)
        for rows in (reference, samples)
    )
    reference_covered = torch.zeros_like(reference_radii, dtype=torch.bool)
    sample_covered = torch.zeros_like(sample_radii, dtype=torch.bool)
    for rows, columns, distances in _distance_blocks(reference, samples, precision, block_size):
        sample_covered[columns] |= (distances <= reference_radii[rows, None]).any(dim=0)
        reference_covered[rows] |= (distances <= sample_radii[None, columns]).any(dim=1)
    return PrecisionRecall(_share(sample_covered), _share(reference_covered))


def manifold_radii(
    features: Array,
    k: int = 3,
    *,
    precision: DistancePrecision = "adm",
    clamp_to_percentile: float | None = None,
    block_size: int = ADM_BLOCK_SIZE,
    device: torch.device | str | None = None,
) -> Tensor:
    """Computes for each row the SQUARED distance to its k-th nearest neighbour, the row itself not counted.

    Args:
        features: (N, D) real numbers, N >= k + 1.
        k: the neighbour, >= 1.
        precision: as in `precision_recall`.
        clamp_to_percentile: as in `precision_recall`.
        block_size: as in `precision_recall`.
        device: as in `precision_recall`.

    Returns:
        (N,) float32.

    Raises:
        ValueError: if they are no finite (N, D) matrix, for fewer than k + 1 rows, or an argument out of its range.
    """
    rows = _as_rows(features, "features", device)
    _check_manifold_arguments(len(rows), k, precision, clamp_to_percentile, block_size)
    nearest = torch.full((len(rows), k + 1), torch.inf, device=rows.device)  # (N, k + 1), the row itself among them
    for block, _, distances in _distance_blocks(rows, rows, precision, block_size):
        nearest_in_block = _smallest(distances, k + 1)
        nearest[block] = _smallest(torch.cat([nearest[block], nearest_in_block], dim=1), k + 1)
    radii = nearest.amax(dim=1)
    if clamp_to_percentile is not None:
        radii[radii > torch.quantile(radii, clamp_to_percentile / 100)] = 0
    return radii


def _check_manifold_arguments(
    count: int, k: int, precision: str, clamp_to_percentile: float | None, block_size: int
) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if count < k + 1:
        raise ValueError(f"the {k}-th nearest neighbour needs at least k + 1 = {k + 1} rows of features, not {count}")
    if precision not in ("adm", "float32"):
        raise ValueError(f"precision must be 'adm' or 'float32', not {precision!r}")
    if clamp_to_percentile is not None and not 0 <= clamp_to_percentile <= 100:
        raise ValueError(f"clamp_to_percentile must be in [0, 100], not {clamp_to_percentile}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")


def _smallest(values: Tensor, count: int) -> Tensor:
    """Returns the `count` smallest of each row, or all if there are fewer, in no order."""
    return values.topk(min(count, values.shape[1]), dim=1, largest=False, sorted=False).values


def _share(flags: Tensor) -> float:
    return int(flags.sum()) / len(flags)


def _distance_blocks(
    u: Tensor, v: Tensor, precision: DistancePrecision, block_size: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields rows of u (N, D), columns (rows of v, (M, D)) and their squared distances in float32, block by block."""
    for start in range(0, len(u), block_size):
        rows = slice(start, start + block_size)
        for other in range(0, len(v), block_size):
            columns = slice(other, other + block_size)
            with full_float32():
                distances = _squared_distances(u[rows].float(), v[columns].float(), precision)
            yield rows, columns, distances


def _squared_distances(u: Tensor, v: Tensor, precision: DistancePrecision) -> Tensor:
    """Returns max(0, |u|^2 - 2 u v + |v|^2) in float32, (N, M), each term rounded to float16 first for "adm".

    Note:
        ADM looks for overflow after the maximum, which turns an overflow of 2 u v into the distance 0; we look before.
    """
    if precision == "adm":
        distances = _expanded_square(u.half(), v.half())
        if torch.isfinite(distances).all():
            return distances.clamp_(min=0).float()
    return _expanded_square(u, v).clamp_(min=0)


def _expanded_square(u: Tensor, v: Tensor) -> Tensor:
    """Returns |u|^2 - 2 u v + |v|^2 in the dtype of u; the sums over features run in float32, then are rounded."""
    dtype, u, v = u.dtype, u.float(), v.float()
    distances = (u @ v.T).to(dtype)
    distances.mul_(-2).add_(u.square().sum(dim=1, keepdim=True).to(dtype))
    return distances.add_(v.square().sum(dim=1).to(dtype))


@contextmanager
def full_float32() -> Iterator[None]:
    """Switches TF32 and bfloat16 off inside the block, whatever training has chosen for products and convolutions.

    A distance is a difference of large products, and features stand behind every published number: both need all bits.
    """
    settings = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
        torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
    )
    chosen = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, chosen, strict=True):
            setting.fp32_precision = precision
