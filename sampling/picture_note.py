"""Notes in pictures: the weights that they are of, and flags that make them again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path

import torch

from models import family_name
from runtime.settings import Flag, flags_of
from sampling.config import KINDS
from sampling.pipeline import Pipeline
from sampling.run import PreparedRun

# Settings that the weights decide, or that decide no pixel
OMITTED = {
    "model", "weights", "process", "num_classes", "network_times", "vae", "class_labels", "output", "trajectory",
    "trajectory_frames", "overwrite",
}  # fmt: skip
ALWAYS = {"sampler", "num_sampling_steps", "cfg_scale", "seed"}


def write_note(script: str, pipeline: Pipeline, run: PreparedRun, labels: Sequence[int]) -> str:
    """Describe samples for their file, as JSON, without places on this machine.

    Args:
        script: Name of the program.
        pipeline: The pipeline.
        run: From the pipeline.
        labels: Classes of the samples; none without labels.
    """
    info = pipeline.info
    described = {
        "script": script,
        "checkpoint": {"file": info.file, "model": info.model, "weights": info.weights, "step": info.step},
        "flags": [*_flags(pipeline, run), *(["--class-labels", *map(str, labels)] if labels else [])],
        "cfg_scale": run.config.guidance.cfg_scale,
        "device": pipeline.device.type,
        "torch": torch.__version__,
    }
    return json.dumps(described)


def _flags(pipeline: Pipeline, run: PreparedRun) -> Iterator[str]:
    """Flags of settings that are not the default, and of those that depend on the program."""
    config, family = run.config, family_name(pipeline.info.model)
    general = {name: flag for name, flag in flags_of(type(config)).items() if flag.field.name not in OMITTED}
    yield from _words(config, {name: flag for name, flag in general.items() if not flag.field.metadata.get("free")})
    if config.sampler is not None:
        yield from _words(run.settings, KINDS[1].flags(config.sampler))
    if config.caching.cache_interval is not None or config.caching.sharing_interval is not None:
        yield from _words(pipeline.network.config, KINDS[0].flags(family))  # have no effect without reuse


def _words(settings: object, flags: Mapping[str, Flag]) -> Iterator[str]:
    for name, flag in flags.items():
        value = reduce(getattr, flag.path, settings)
        if value is None or (value == flag.field.default and flag.field.name not in ALWAYS):
            continue
        if isinstance(value, bool):
            yield name if value else f"--no-{name.removeprefix('--')}"
            continue
        each = value if isinstance(value, list | tuple) else [value]
        yield from [name, *(part.name if isinstance(part, Path) else str(part) for part in each)]
