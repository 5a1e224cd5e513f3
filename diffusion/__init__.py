"""Noise processes and sampling; knows no family by name."""

from diffusion.flow_matching import FlowMatching
from diffusion.gaussian_diffusion import GaussianDiffusion, create_diffusion
from diffusion.objective import Batch, Draws, Objective
from diffusion.processes import PROCESSES, PUBLISHED_PROCESS
from diffusion.refresh import skip_cache
from diffusion.sampling import ImageNoise, guided, sample_loop
from diffusion.schedules import space_timesteps
from diffusion.sharing import Calibration

__all__ = [
    "PROCESSES",
    "PUBLISHED_PROCESS",
    "Batch",
    "Calibration",
    "Draws",
    "FlowMatching",
    "GaussianDiffusion",
    "ImageNoise",
    "Objective",
    "create_diffusion",
    "guided",
    "sample_loop",
    "skip_cache",
    "space_timesteps",
]
