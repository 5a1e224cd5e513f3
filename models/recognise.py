"""Which model a set of weights belongs to: names and shapes say it, without a config beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import FAMILIES, create_model, model_config

LABELS, PATCHES, POSITIONS = "y_embedder.embedding_table.weight", "x_embedder.proj.weight", "pos_embed"
OUTPUT = "final_layer.linear.weight"


class Recognised(NamedTuple):
    """A model that takes the weights as they are.

    Attributes:
        name: in the registry.
        config: what the shapes say about the data, as `create_model` takes it.
    """

    name: str
    config: dict[str, Any]


def recognise(weights: Mapping[str, Tensor]) -> Recognised | None:
    """The first model of the registry whose parameters have exactly these names and shapes; None if there is none.

    Data may differ from the named config: number of classes, channels, size and variance are read off the shapes. What
    leaves no trace there, such as the number of heads, is the named config's.

    Note:
        The label table of a network without a null class looks like that of one with a class less.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    data, body = _data_traces(shapes), _body_traces(shapes)
    for family in FAMILIES.values():
        fields = family.network.config_class.__dataclass_fields__
        config = {field: value for field, value in data.items() if field in fields}
        for name, named in family.configs.items():
            if any(named.get(field, value) != value for field, value in body.items()):
                continue  # building it would take longer
            try:
                settings = config | family.network.settings_from(weights, model_config(name, **config))
                with torch.device("meta"):
                    network = create_model(name, **settings)
            except ValueError:
                continue
            if {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()} == shapes:
                return Recognised(name, settings)
    return None


def _body_traces(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """What names and shapes say about the network's size."""
    if PATCHES not in shapes:
        return {}
    width, _, patch, _ = shapes[PATCHES]
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return {"hidden_size": width, "patch_size": patch, "depth": len(blocks)}


def _data_traces(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What shapes say about the data that the weights were trained on."""
    found: dict[str, Any] = {}
    if LABELS in shapes:
        found["num_classes"] = shapes[LABELS][0] - 1  # the last row is the null class
    if PATCHES in shapes:
        _, found["in_channels"], patch, _ = shapes[PATCHES]
        if OUTPUT in shapes:
            found["learn_sigma"] = shapes[OUTPUT][0] == 2 * found["in_channels"] * patch**2
        if POSITIONS in shapes:
            found["input_size"] = math.isqrt(shapes[POSITIONS][1]) * patch
    return found
