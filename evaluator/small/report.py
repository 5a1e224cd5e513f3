"""Results of small images and clips, in the form of the evaluator's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from evaluator.report import library_versions
from evaluator.small.sets import SmallSet
from runtime.download import sha256_of
from runtime.settings import Values

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT = 2  # of the evaluator's results
ENOUGH = 500  # samples; as many held-out digits have the distance that is the goal
NOT_FID = "these scores are of small networks that come with this code: not FID, comparable only with their own kind"
MEANINGS = {
    "accuracy": "share of samples that an independent classifier takes for the class that was asked for",
    "frechet_distance": "to the training split, in features of a small network; 0 is best",
    "frechet_distance_of_test": "the same of real held-out images, below which samples of a good model stay",
    "inception_score": "by the probabilities of the small network, 1 to 10",
    "precision": "share of samples among the real images",
    "recall": "share of real images among the samples",
    "nearest_ratio": "distance to the nearest training image, over that of held-out ones; 0 for copies, 1 for new ones",
    "motion": "share of clips that move as real ones do, in any direction",
    "direction": "share of clips that move as real ones do, in the direction that was asked for",
    "frechet_ratio": "Frechet distance to the training clips, over that of as many held-out clips; 1 is best",
}


def scores_document(
    scores: DataclassInstance, of: SmallSet, *, reference: Values, samples: Values, protocol: object, config: Values
) -> Values:
    """Describe scores as the evaluator describes its own.

    Args:
        scores: Dataclass of scores; those that are None are left out.
        of: The set that the samples belong to.
        reference: Digest and number of the real images or clips.
        samples: Path, digest and number of the samples.
        protocol: Settings of the samples; None if unknown.
        config: Settings of the scores.
    """
    import sklearn  # heavy; the scores have imported it

    values = dataclasses.asdict(scores)
    count, warnings = values.pop("num_samples"), [NOT_FID]
    if count < ENOUGH:
        warnings.append(
            f"{count:,} samples are too few: distances come out larger, and shares vary; take {ENOUGH:,} or more"
        )
    if protocol is None:
        warnings.append("the settings of the samples are unknown: there is no .json next to them")
    return {
        "format": FORMAT,
        "scores": {name: value for name, value in values.items() if value is not None},
        "meanings": {name: MEANINGS[name] for name, value in values.items() if value is not None},
        "reference": {"path": f"{of.name}, training split", **reference},
        "samples": samples,
        "protocol": protocol,
        "config": config,
        "network": {
            "backend": "torch",
            "weights": of.weights.name,
            "weights_sha256": sha256_of(of.weights),
            "precision": "float32",
            "device": "cpu",
            "classifier": "support vector machine, fitted to the training split",
        },
        "versions": {**library_versions("torch"), "scikit-learn": sklearn.__version__},
        "warnings": warnings,
    }
