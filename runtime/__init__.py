"""Processes, files, checkpoints, settings, seeds, errors: what all other packages use. Imports none of them."""
