"""Settings of sampling where no flag decides.

A flag decides; where none is given, the checkpoint does (ours know their model, process and encoder; released ones
have a preset in runtime/releases.py); where it does not know, the official default.
"""

from __future__ import annotations

from dataclasses import replace

from diffusion import PROCESSES, SAMPLERS
from diffusion.solver_table import SolverTable
from models.loading import CheckpointInfo
from runtime.errors import UserError, error_prefix
from runtime.given import Given
from runtime.releases import Preset
from sampling.config import C
from sampling.published_solvers import open_table


def preset_of(info: CheckpointInfo) -> Preset:
    """The preset of a checkpoint: how to sample where nothing else is given.

    Raises:
        UserError: If its process is unknown.
    """
    if info.preset is not None:
        return info.preset
    samplers = [(name, row.steps) for name, row in SAMPLERS.items() if row.process == info.process]
    if not samplers:
        known = ", ".join(PROCESSES)
        raise UserError(f"--ckpt {info.source}: trained under {info.process!r}, which is unknown here; known: {known}")
    # The official code guides the first 3 of 4 latent channels.
    channels = 3 if info.process == "gaussian" and info.meta is None else None
    return Preset(*samplers[0], cfg_scale=1.5, channels=channels)


def resolve(given: Given[C], info: CheckpointInfo, conditional: bool = True) -> tuple[C, object]:
    """Settings with nothing left to the checkpoint, and those of the sampler, or the table in its place.

    A preset's interval belongs to its scale: with another scale it is not used.

    Args:
        given: The settings.
        info: Description of the checkpoint.
        conditional: False for a network without conditioning, which is not guided where no scale is given; a weaker
            network guides it like any other.

    Raises:
        UserError: If the sampler is not one of the checkpoint's process, or settings do not go with each other.
    """
    config, preset = given.general, preset_of(info)
    table = None if config.solver_table is None else chosen_table(config.solver_table, config.num_sampling_steps)
    name, guidance = config.sampler or preset.sampler, config.guidance
    row, published, scale = SAMPLERS[name], name == preset.sampler, guidance.cfg_scale or guidance.default_scale
    if guidance.cfg_scale is None and not conditional and guidance.guidance != "autoguidance":
        scale = 1.0
    if row.process != info.process:
        fitting = ", ".join(sampler for sampler, other in SAMPLERS.items() if other.process == info.process)
        raise UserError(f"--sampler {name}: --ckpt was trained under {info.process!r}; choose from {fitting}")
    given.check_owners(sampler="" if table else name)
    settings = table or given.build("sampler", name, **(preset.options if published else {}))
    steps = str(table.evaluations) if table else preset.steps if published else row.steps
    with error_prefix(""):  # a flag may not go with what the checkpoint decides
        guidance = replace(
            guidance,
            cfg_scale=preset.cfg_scale if scale is None else scale,
            guidance_channels=guidance.guidance_channels or preset.channels,
            guidance_interval=guidance.guidance_interval or (preset.interval if scale is None else None),
        )
    resolved = replace(
        config,
        model=info.model,
        sampler=None if table else name,
        num_sampling_steps=config.num_sampling_steps or steps,
        encoder=replace(config.encoder, vae=info.encoder),
        guidance=guidance,
    )
    return resolved, settings


def chosen_table(source: str, steps: str | None) -> SolverTable:
    """Read the table of `--solver-table`.

    Raises:
        UserError: If it cannot be read, or is for another number of evaluations.
    """
    if steps is not None and not steps.isdecimal():
        raise UserError(f"--num-sampling-steps {steps}: a table has a number of evaluations, such as 10")
    with error_prefix(f"--solver-table {source}"):
        return open_table(source, None if steps is None else int(steps))
