"""Registry of metrics. To add one, write a function of two `ImageSet`s and a row in `METRICS`.

Nothing here depends on which network made the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from evaluator.metrics import (
    DistancePrecision,
    frechet_distance,
    frechet_distance_from_features,
    inception_score,
    kernel_distance,
    precision_recall,
)
from evaluator.statistics import Statistics, feature_statistics

NEIGHBOUR = 3  # of precision and recall


@dataclass(frozen=True)
class ImageSet:
    """Features of the reference or of the samples; None where no chosen metric needs them.

    Attributes:
        pool: (N, 2048) float32 pool features, in the order of images.
        pool_statistics: Their statistics, if a file holds them; computed from `pool` otherwise.
        spatial_statistics: Statistics of the spatial features.
        probabilities: Map from pool features to class probabilities.
        clips: (N, 400) float32 features of clips, if the files hold clips.
    """

    pool: Tensor | None
    pool_statistics: Statistics | None
    spatial_statistics: Statistics | None
    probabilities: Callable[[Tensor], Tensor] | None
    clips: Tensor | None = None

    def rows(self) -> Tensor:
        """Pool features (N, 2048) of a metric that needs images."""
        assert self.pool is not None
        return self.pool

    def statistics(self) -> Statistics:
        """Statistics of the pool features, from the file if it holds them."""
        if self.pool_statistics is not None:
            return self.pool_statistics
        computed = feature_statistics(self.rows())
        return Statistics(computed.mean.cpu(), computed.covariance.cpu(), computed.count)


class Metric(NamedTuple):
    """Row of the table.

    Attributes:
        compute: Function (reference, samples, precision of distances) -> scores by name.
        images: Number of images (or clips) that it needs at least, of the reference and of the samples.
        of_reference: True if it needs the reference's images at all.
        statistics: True if mean and covariance from a file can replace images.
        spatial: True if it reads spatial features.
        clips: True if it reads features of clips, not of images.
    """

    compute: Callable[[ImageSet, ImageSet, DistancePrecision], dict[str, float]]
    images: int
    of_reference: bool = True
    statistics: bool = False
    spatial: bool = False
    clips: bool = False


def _inception_score(reference: ImageSet, samples: ImageSet, precision: DistancePrecision) -> dict[str, float]:
    assert samples.probabilities is not None
    return {"Inception Score": inception_score(samples.probabilities(samples.rows()))}


def _fid(reference: ImageSet, samples: ImageSet, precision: DistancePrecision) -> dict[str, float]:
    if reference.pool_statistics is None and samples.pool_statistics is None:
        return {"FID": frechet_distance_from_features(reference.rows(), samples.rows())}
    return {"FID": frechet_distance(reference.statistics(), samples.statistics())}


def _sfid(reference: ImageSet, samples: ImageSet, precision: DistancePrecision) -> dict[str, float]:
    assert reference.spatial_statistics is not None and samples.spatial_statistics is not None
    return {"sFID": frechet_distance(reference.spatial_statistics, samples.spatial_statistics)}


def _precision_recall(reference: ImageSet, samples: ImageSet, precision: DistancePrecision) -> dict[str, float]:
    shares = precision_recall(reference.rows(), samples.rows(), NEIGHBOUR, precision=precision)
    return {"Precision": shares.precision, "Recall": shares.recall}


def _kid(reference: ImageSet, samples: ImageSet, precision: DistancePrecision) -> dict[str, float]:
    return {"KID": kernel_distance(reference.rows(), samples.rows())}


def _fvd(reference: ImageSet, samples: ImageSet, precision: DistancePrecision) -> dict[str, float]:
    assert reference.clips is not None and samples.clips is not None
    return {"FVD": frechet_distance_from_features(reference.clips, samples.clips, biased=True)}


METRICS = {
    "is": Metric(_inception_score, images=1, of_reference=False),
    "fid": Metric(_fid, images=2, statistics=True),
    "sfid": Metric(_sfid, images=2, statistics=True, spatial=True),
    "pr": Metric(_precision_recall, images=NEIGHBOUR + 1),
    "kid": Metric(_kid, images=2),
    "fvd": Metric(_fvd, images=2, clips=True),
}
ADM_METRICS = ("is", "fid", "sfid", "pr")  # in the order in which ADM prints them
CLIP_METRICS = ("fvd",)


def compute_scores(
    names: Sequence[str], reference: ImageSet, samples: ImageSet, precision: DistancePrecision
) -> dict[str, float]:
    """Compute metrics, in the order given.

    Args:
        names: Keys of `METRICS`.
        reference: Real images.
        samples: Generated images.
        precision: Precision of the distances in precision and recall.

    Returns:
        Scores by the name that ADM prints, such as "sFID".

    Raises:
        ValueError: If features or statistics do not have the form that the metric needs.
    """
    scores: dict[str, float] = {}
    for name in names:
        scores |= METRICS[name].compute(reference, samples, precision)
    return scores
