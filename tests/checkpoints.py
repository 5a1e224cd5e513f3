"""Checkpoints of small networks, written as training writes them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from models import Network, family_of
from runtime.groups import save_checkpoint


def write_network(
    path: Path, name: str, network: Network, averages: dict[str, Network] | None = None, **meta: Any
) -> Path:
    """Write a network (and averages of it, by group) in format 2; `meta` replaces parts of the JSON document."""
    averages = {"ema-0.9999": network} if averages is None else averages
    document = {
        "format": 2,
        "step": 7,
        "model": {"name": name, **dataclasses.asdict(network.config)},
        "process": {"name": family_of(name).process},
        "encoder": {"name": "none"},
        "data": {"image_shape": list(network.sample_shape), "classes": None},
        "averages": {group: {"decay": float(group.removeprefix("ema-"))} for group in averages},
    }
    groups = {"model": network, **averages}
    tensors = {group: {k: v.clone() for k, v in each.state_dict().items()} for group, each in groups.items()}
    save_checkpoint(path, tensors, {**document, **meta})
    return path
