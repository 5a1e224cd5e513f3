"""Scores for 8 x 8 digits, in the way of FID and its relatives, with a network small enough to be in the repository.

The numbers compare runs of this project with one another; they are not FID and must not be reported as such.
"""

from evaluator.digits.classifier import IndependentClassifier
from evaluator.digits.network import DigitsFeatureNetwork, digits_features, load_feature_network
from evaluator.digits.score import DigitsScores, score_digits

__all__ = [
    "DigitsFeatureNetwork",
    "DigitsScores",
    "IndependentClassifier",
    "digits_features",
    "load_feature_network",
    "score_digits",
]
