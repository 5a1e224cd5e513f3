"""Processes and samplers by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

from diffusion import flow_multistep, multistep
from diffusion import flow_samplers as flow
from diffusion import gaussian_samplers as gaussian
from diffusion.flow import FlowMatching
from diffusion.gaussian import GaussianSettings
from diffusion.loss import Process
from diffusion.sampling import Sampler


class ProcessSettings(Protocol):
    """Settings of a process: a dataclass of flags."""

    has_variance: ClassVar[bool]
    """A network may predict a variance."""

    def make(self, learn_sigma: bool) -> Process:
        """Build the process, for a network that predicts a variance or not."""


class SamplerRow(NamedTuple):
    """A sampler by its name on the command line.

    Attributes:
        process: Name of its process.
        steps: Default step spec.
        sampler: Its class, called as sampler(process, steps, **settings).
        settings: Dataclass of its settings.
    """

    process: str
    steps: str
    sampler: Callable[..., Sampler]
    settings: type


PROCESSES: dict[str, type[ProcessSettings]] = {"gaussian": GaussianSettings, "flow": FlowMatching}

SAMPLERS: dict[str, SamplerRow] = {
    "ddpm": SamplerRow("gaussian", "250", gaussian.AncestralSampler, gaussian.GaussianSamplerSettings),
    "ddim": SamplerRow("gaussian", "ddim50", gaussian.DDIMSampler, gaussian.DDIMSettings),
    "dpm++": SamplerRow("gaussian", "20", multistep.DPMSolverSampler, multistep.DPMSolverSettings),
    "unipc": SamplerRow("gaussian", "20", multistep.UniPCSampler, multistep.MultistepSettings),
    "deis": SamplerRow("gaussian", "20", multistep.DEISSampler, multistep.MultistepSettings),
    "edm": SamplerRow("gaussian", "25", gaussian.EDMSampler, gaussian.GaussianSamplerSettings),
    "euler": SamplerRow("flow", "250", flow.EulerSampler, flow.EulerSettings),
    "heun": SamplerRow("flow", "50", flow.HeunSampler, flow.HeunSettings),
    "adams": SamplerRow("flow", "50", flow_multistep.AdamsSampler, flow_multistep.AdamsSettings),
    "flow-unipc": SamplerRow("flow", "20", flow_multistep.FlowUniPCSampler, flow_multistep.FlowUniPCSettings),
}
# Deterministic sampler of equal steps of each process, for previews in training.
PREVIEW_SAMPLER = {"gaussian": "ddim", "flow": "euler"}


def make_sampler(
    name: str,
    process: Process,
    steps: str | None = None,
    settings: object = None,
    *,
    pixels: bool = False,
    strength: float = 1.0,
) -> Sampler:
    """Build a sampler of the registry.

    Args:
        name: Name in `SAMPLERS`.
        process: Process that the network was trained under.
        steps: Step spec; None is the sampler's default.
        settings: Instance of the row's settings; None is all defaults.
        pixels: x holds pixels in [-1, 1], which predictions are clamped to where `clip_denoised` is None.
        strength: Share of the steps that are taken, in (0, 1]: below 1, x starts as an image with noise.

    Raises:
        ValueError: For an unknown name, a sampler of another process, or a setting out of range.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    row = SAMPLERS[name]
    if row.process != process.name:
        fitting = ", ".join(other for other, row in SAMPLERS.items() if row.process == process.name)
        raise ValueError(f"sampler {name!r} is of process {row.process!r}, not {process.name!r}; choose from {fitting}")
    settings = row.settings() if settings is None else settings
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}  # type: ignore[arg-type]
    if values.get("clip_denoised", False) is None:
        values["clip_denoised"] = pixels
    if not 0 < strength <= 1:
        raise ValueError(f"the strength must be in (0, 1], not {strength}")
    sampler = row.sampler(process, row.steps if steps is None else steps, **values)
    count = len(dict.fromkeys(sampler.times))  # steps: a few samplers evaluate twice in one
    start = count - max(1, round(strength * count))
    return row.sampler(process, row.steps if steps is None else steps, **values, start=start) if start else sampler
