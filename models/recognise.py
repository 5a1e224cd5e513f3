"""Which model a set of weights belongs to: names and shapes say it, without a config beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import FAMILIES, create_model

LABELS, PATCHES, POSITIONS = "y_embedder.embedding_table.weight", "x_embedder.proj.weight", "pos_embed"
OUTPUT = "final_layer.linear.weight"


class Recognised(NamedTuple):
    """A model that takes the weights as they are.

    Attributes:
        name: in the registry.
        config: fields that differ from those of the name, as `create_model` takes them.
    """

    name: str
    config: dict[str, Any]


def recognise(weights: Mapping[str, Tensor]) -> Recognised | None:
    """The first model of the registry whose parameters have exactly these names and shapes; None if there is none.

    Data may differ from the named config: number of classes, channels, size and variance are read off the shapes. What
    leaves no trace there, such as the number of heads, is the named config's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    traces = _traces(shapes)
    for family in FAMILIES.values():
        fields = family.network.config_class.__dataclass_fields__
        for name, named in family.configs.items():
            default = {field: named.get(field, fields[field].default) for field in traces if field in fields}
            config = {field: traces[field] for field in default if traces[field] != default[field]}
            try:
                with torch.device("meta"):
                    network = create_model(name, **config)
            except ValueError:
                continue
            if {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()} == shapes:
                return Recognised(name, config)
    return None


def _traces(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What shapes say about the data that the weights were trained on."""
    found: dict[str, Any] = {}
    if LABELS in shapes:
        found["num_classes"] = shapes[LABELS][0] - 1  # the last row is the null class of almost every network
    if PATCHES in shapes:
        _, found["in_channels"], patch, _ = shapes[PATCHES]
        if OUTPUT in shapes:
            found["learn_sigma"] = shapes[OUTPUT][0] == 2 * found["in_channels"] * patch**2
        if POSITIONS in shapes:
            found["input_size"] = math.isqrt(shapes[POSITIONS][1]) * patch
    return found
