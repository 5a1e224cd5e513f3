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
    leaves no trace there, such as the number of heads, is the named config's. Where a patch's side cannot be told from
    its channels (DDT), the model with the channels of its name is meant.

    Note:
        The label table of a network without a null class looks like that of one with a class less.

    Raises:
        ValueError: if they have a named model's size, and its family says why they cannot be that model's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if PATCHES not in shapes:
        return None
    found: Recognised | None = None
    refused: str | None = None
    for family in FAMILIES.values():
        fields = family.network.config_class.__dataclass_fields__
        for name, named in family.configs.items():
            traces = _traces(shapes, named["patch_size"])
            if any(named.get(field, value) != value for field, value in traces.body.items()):
                continue  # building it would take longer
            data = {field: value for field, value in traces.data.items() if field in fields}
            try:
                config = model_config(name, **data)
            except ValueError:
                continue
            try:
                settings = data | family.network.settings_from(weights, config)
            except ValueError as error:
                refused = f"weights of {name}, but {error}"
                continue
            try:
                with torch.device("meta"):
                    network = create_model(name, **settings)
            except ValueError:
                continue
            if {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()} == shapes:
                found = found or Recognised(name, settings)
                if network.in_channels == model_config(name).in_channels:
                    return Recognised(name, settings)
    if found is None and refused is not None:
        raise ValueError(refused)
    return found


class _Traces(NamedTuple):
    """Fields of a config that names and shapes decide: of the network's size, and of the data it was trained on."""

    body: dict[str, int]
    data: dict[str, Any]


def _traces(shapes: Mapping[str, tuple[int, ...]], patch: int) -> _Traces:
    """What shows if patches have this side: maps of patches are (D, C, p, p), or (D, C p p) in some families."""
    width, channels, *sides = shapes[PATCHES]
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    body = {"hidden_size": width, "patch_size": sides[0] if sides else patch, "depth": len(blocks)}
    data: dict[str, Any] = {"in_channels": channels if sides else channels // patch**2}
    if LABELS in shapes:
        data["num_classes"] = shapes[LABELS][0] - 1  # the last row is the null class
    if OUTPUT in shapes:
        data["learn_sigma"] = shapes[OUTPUT][0] == 2 * data["in_channels"] * patch**2
    if POSITIONS in shapes:
        data["input_size"] = math.isqrt(shapes[POSITIONS][1]) * patch
    return _Traces(body, data)
