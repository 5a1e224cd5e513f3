"""Noise processes, samplers and losses; knows no family by name."""

from diffusion.caching import skip_cache
from diffusion.calibration import Calibration
from diffusion.flow import FlowMatching
from diffusion.flow_multistep import AdamsSampler, FlowUniPCSampler
from diffusion.flow_samplers import EulerSampler, HeunSampler
from diffusion.gaussian import GaussianDiffusion, create_diffusion
from diffusion.gaussian_samplers import AncestralSampler, DDIMSampler, EDMSampler
from diffusion.guidance import guided
from diffusion.loss import Batch, DiffusionLoss, Draws, row_noise
from diffusion.multistep import DEISSampler, DPMSolverSampler, UniPCSampler
from diffusion.registry import PREVIEW_SAMPLER, PROCESSES, SAMPLERS, make_sampler
from diffusion.sampling import Evaluation, ImageNoise, Reuse, evaluations, sample_loop
from diffusion.schedules import convert_time, space_timesteps

__all__ = [
    "PREVIEW_SAMPLER",
    "PROCESSES",
    "SAMPLERS",
    "AdamsSampler",
    "AncestralSampler",
    "Batch",
    "Calibration",
    "DDIMSampler",
    "DEISSampler",
    "DPMSolverSampler",
    "DiffusionLoss",
    "Draws",
    "EDMSampler",
    "EulerSampler",
    "Evaluation",
    "FlowMatching",
    "FlowUniPCSampler",
    "GaussianDiffusion",
    "HeunSampler",
    "ImageNoise",
    "Reuse",
    "UniPCSampler",
    "convert_time",
    "create_diffusion",
    "evaluations",
    "guided",
    "make_sampler",
    "row_noise",
    "sample_loop",
    "skip_cache",
    "space_timesteps",
]
