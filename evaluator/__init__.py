"""Scores of samples: pure metrics on features, and the features."""
