"""The noise processes by name: how each is made from the settings in a checkpoint, and who is published with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from diffusion.flow_matching import FlowMatching
from diffusion.gaussian_diffusion import create_diffusion
from diffusion.objective import Process
from diffusion.sampling import Sampler

if TYPE_CHECKING:
    from models.contract import TimeConvention


class PlainSampler(Protocol):
    """Makes a process's deterministic sampler of equal steps, for a look at what a network has learned."""

    def __call__(self, num_steps: int, *, clip_denoised: bool, convention: TimeConvention, **settings: Any) -> Sampler:
        """A sampler of `num_steps` evaluations; `settings` are the process's. Flows clip nothing."""
        ...


class ProcessRow(NamedTuple):
    """One row of the table.

    Attributes:
        make: from keyword arguments as a checkpoint's JSON document holds them, to be trained under.
        for_steps: from a step spec as users write it, those settings, and whether the network predicts a variance, to
            be sampled from. Refuses a spec that is none by a ValueError.
        plain_sampler: with the same settings.
    """

    make: Callable[..., Process]
    for_steps: Callable[[str, Mapping[str, Any], bool], Any]
    plain_sampler: PlainSampler


def flow_steps(spec: str) -> int:
    """The number that a flow's step spec is.

    Raises:
        ValueError: for any other spec.
    """
    if not spec.isdecimal() or int(spec) < 1:
        raise ValueError("a flow is sampled in a number of steps, such as 50")
    return int(spec)


def _gaussian_for_steps(spec: str, settings: Mapping[str, Any], learn_sigma: bool) -> Any:
    return create_diffusion(spec, learn_sigma=learn_sigma, **settings)


def _flow_for_steps(spec: str, settings: Mapping[str, Any], learn_sigma: bool) -> FlowMatching:
    flow_steps(spec)
    return FlowMatching(**settings)


def _ddim(num_steps: int, *, clip_denoised: bool, convention: TimeConvention, **settings: Any) -> Sampler:
    return create_diffusion(str(num_steps), **settings).ddim(clip_denoised=clip_denoised, convention=convention)


def _euler(num_steps: int, *, clip_denoised: bool, convention: TimeConvention, **settings: Any) -> Sampler:
    return FlowMatching(**settings).euler(num_steps, convention=convention)


PROCESSES: dict[str, ProcessRow] = {
    "gaussian": ProcessRow(create_diffusion, _gaussian_for_steps, _ddim),
    "flow": ProcessRow(FlowMatching, _flow_for_steps, _euler),
}
# What families are published with, by the units of time that they are told.
PUBLISHED_PROCESS: dict[TimeConvention, str] = {"index": "gaussian", "unit": "flow"}
