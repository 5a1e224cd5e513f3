"""The noise processes by name: how each is made from the settings in a checkpoint, and its plain sampler."""

from __future__ import annotations

from collections.abc import Callable
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
        make: from keyword arguments as a checkpoint's JSON document holds them.
        plain_sampler: with the same settings.
    """

    make: Callable[..., Process]
    plain_sampler: PlainSampler


def _ddim(num_steps: int, *, clip_denoised: bool, convention: TimeConvention, **settings: Any) -> Sampler:
    return create_diffusion(str(num_steps), **settings).ddim(clip_denoised=clip_denoised, convention=convention)


def _euler(num_steps: int, *, clip_denoised: bool, convention: TimeConvention, **settings: Any) -> Sampler:
    return FlowMatching(**settings).euler(num_steps, convention=convention)


PROCESSES: dict[str, ProcessRow] = {
    "gaussian": ProcessRow(create_diffusion, _ddim),
    "flow": ProcessRow(FlowMatching, _euler),
}
