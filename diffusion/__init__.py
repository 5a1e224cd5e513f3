"""Noise processes and sampling; knows no family by name."""

from diffusion.gaussian_diffusion import GaussianDiffusion, create_diffusion
from diffusion.objective import Batch, Draws, Objective
from diffusion.refresh import skip_cache
from diffusion.sampling import ImageNoise, guided, sample_loop
from diffusion.schedules import space_timesteps

__all__ = [
    "Batch",
    "Draws",
    "GaussianDiffusion",
    "ImageNoise",
    "Objective",
    "create_diffusion",
    "guided",
    "sample_loop",
    "skip_cache",
    "space_timesteps",
]
