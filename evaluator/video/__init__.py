"""Frechet video distance: the I3D network, its weights, and the clips of a file that it processes."""
