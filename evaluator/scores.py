"""The scores of a set of images, one row of a table each; which network made the features is not known here.

A new metric is a function of two `ImageSet`s and a row in `METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from evaluator.metrics import (
    DistancePrecision,
    Statistics,
    feature_statistics,
    frechet_distance,
    frechet_distance_from_features,
    inception_score,
    kernel_distance,
    precision_recall,
)

NEIGHBOUR = 3  # of precision and recall


@dataclass(frozen=True)
class ImageSet:
    """What is known of the reference, or of the samples; None where nothing asked for needs it.

    Attributes:
        pool: (N, 2048) float32 pool features, in the order of images.
        pool_statistics: of the pool features, where a file brings its own; otherwise computed from `pool`.
        spatial_statistics: of the spatial features.
        probabilities: pool features -> class probabilities.
    """

    pool: Tensor | None
    pool_statistics: Statistics | None
    spatial_statistics: Statistics | None
    probabilities: Callable[[Tensor], Tensor]


class Metric(NamedTuple):
    """A row of the table.

    Attributes:
        compute: (reference, samples, precision of distances) -> scores by name.
        images: how many images it needs of each side.
        of_reference: whether it needs the reference's images at all.
        statistics: whether mean and covariance in a file do instead of images.
        spatial: whether it is about spatial features.
    """

    compute: Callable[[ImageSet, ImageSet, DistancePrecision], dict[str, float]]
    images: int
    of_reference: bool = True
    statistics: bool = False
    spatial: bool = False


def _inception_score(reference: ImageSet, samples: ImageSet, precision: DistancePrecision) -> dict[str, float]:
    return {"Inception Score": inception_score(samples.probabilities(_pool(samples)))}


def _fid(reference: ImageSet, samples: ImageSet, precision: DistancePrecision) -> dict[str, float]:
    if reference.pool_statistics is None and samples.pool_statistics is None:
        return {"FID": frechet_distance_from_features(_pool(reference), _pool(samples))}
    return {"FID": frechet_distance(_statistics(reference), _statistics(samples))}


def _sfid(reference: ImageSet, samples: ImageSet, precision: DistancePrecision) -> dict[str, float]:
    assert reference.spatial_statistics is not None and samples.spatial_statistics is not None
    return {"sFID": frechet_distance(reference.spatial_statistics, samples.spatial_statistics)}


def _precision_recall(reference: ImageSet, samples: ImageSet, precision: DistancePrecision) -> dict[str, float]:
    found = precision_recall(_pool(reference), _pool(samples), NEIGHBOUR, precision=precision)
    return {"Precision": found.precision, "Recall": found.recall}


def _kid(reference: ImageSet, samples: ImageSet, precision: DistancePrecision) -> dict[str, float]:
    return {"KID": kernel_distance(_pool(reference), _pool(samples))}


METRICS = {
    "is": Metric(_inception_score, images=1, of_reference=False),
    "fid": Metric(_fid, images=2, statistics=True),
    "sfid": Metric(_sfid, images=2, statistics=True, spatial=True),
    "pr": Metric(_precision_recall, images=NEIGHBOUR + 1),
    "kid": Metric(_kid, images=2),
}
ADM_METRICS = ("is", "fid", "sfid", "pr")  # in the order in which ADM prints them


def compute_scores(
    names: Sequence[str], reference: ImageSet, samples: ImageSet, precision: DistancePrecision
) -> dict[str, float]:
    """Computes metrics, in the order given.

    Args:
        names: keys of `METRICS`.
        reference: real images.
        samples: generated ones.
        precision: of the distances behind precision and recall.

    Returns:
        Scores by the name that ADM prints, such as "sFID".

    Raises:
        ValueError: if features or statistics are not what the metric needs.
    """
    scores: dict[str, float] = {}
    for name in names:
        scores |= METRICS[name].compute(reference, samples, precision)
    return scores


def _pool(images: ImageSet) -> Tensor:
    assert images.pool is not None
    return images.pool


def _statistics(images: ImageSet) -> Statistics:
    if images.pool_statistics is not None:
        return images.pool_statistics
    found = feature_statistics(_pool(images))
    return Statistics(found.mean.cpu(), found.covariance.cpu(), found.count)
