"""Scores for 8 x 8 digits: what FID and its relatives are for ImageNet, small enough for a laptop and shipped whole.

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
