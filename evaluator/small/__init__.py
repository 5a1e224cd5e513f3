"""Scores for small images, in the way of FID and its relatives, with networks small enough to be in the repository.

The numbers compare runs of this project with one another; they are not FID and must not be reported as such.
"""

from evaluator.small.classifier import IndependentClassifier
from evaluator.small.network import FeatureNetwork, compute_features, load_feature_network, predict_targets
from evaluator.small.score import SmallScorer, SmallScores
from evaluator.small.sets import DIGITS, FASHION, MOVING_DIGITS, SETS, SmallSet

__all__ = [
    "DIGITS",
    "FASHION",
    "MOVING_DIGITS",
    "SETS",
    "FeatureNetwork",
    "IndependentClassifier",
    "SmallScorer",
    "SmallScores",
    "SmallSet",
    "compute_features",
    "load_feature_network",
    "predict_targets",
]
