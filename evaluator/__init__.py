"""Scores of samples: features of images, and metrics as pure functions of them."""
