"""Descriptions of samples as JSON values: the settings, the weights, and the versions that made them."""

from __future__ import annotations

import platform

import numpy as np
import torch

from models import family_name
from models.loading import CheckpointInfo
from runtime.documents import document
from runtime.settings import Values
from runtime.weight_files import weights_sha256
from sampling.config import KINDS
from sampling.pipeline import Pipeline
from sampling.publishing import ROUNDED, SOURCES
from sampling.run import PreparedRun


def settings_of(pipeline: Pipeline, run: PreparedRun, config: object) -> Values:
    """All settings of a run as nested JSON.

    Args:
        pipeline: The pipeline.
        run: From the pipeline.
        config: The run's settings, or those with more filled in.
    """
    info, network = pipeline.info, pipeline.network
    fields = [flag.field.name for flag in KINDS[0].flags(family_name(info.model)).values()]
    own = {name: getattr(network.config, name) for name in fields}
    owners = {} if run.config.sampler is None else {"sampler": (run.config.sampler, run.settings)}
    return {**document(config, **owners), "model": {"name": info.model, **own}}


def describe_checkpoint(info: CheckpointInfo, sha256: str) -> Values:
    """Name a checkpoint, its weights that were used, and how a published folder was made of others."""
    published = {name: info.meta[name] for name in (SOURCES, ROUNDED) if name in info.meta} if info.meta else {}
    return {
        "file": info.file,
        **({} if info.repository is None else {"revision": info.repository.partition("@")[2]}),
        "sha256": sha256,
        "step": info.step,
        "release": info.release.name if info.release else None,
        "reported_fid": info.release.fid if info.release else None,
        "model": info.model,
        "weights": info.weights,
        **published,
    }


def describe_versions(device: torch.device) -> Values:
    """Versions of Python and the libraries that decide samples."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def protocol_of(pipeline: Pipeline, run: PreparedRun, script: str, **sections: Values) -> Values:
    """Describe samples of a pipeline as sample_ddp.py describes its own.

    Args:
        pipeline: The pipeline.
        run: From the pipeline.
        script: Name of the program.
        **sections: Further settings by section.
    """
    info = pipeline.info
    return {
        "config": {"format": 2, "script": script, **settings_of(pipeline, run, run.config), **sections},
        "checkpoint": describe_checkpoint(info, weights_sha256(info.path)),
        "autoencoder": pipeline.encoder.describe(),
        "versions": describe_versions(pipeline.device),
    }
