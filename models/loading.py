"""Networks out of checkpoints: whose weights a file holds, and a network filled with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from models import FAMILIES, Network, create_model, family_of, list_models, model_config
from runtime.checkpoint import Checkpoint, load_weights
from runtime.errors import UserError, blame


def restore(checkpoint: Checkpoint, source: str, model: str | None = None, **overrides: Any) -> Network:
    """Builds the network that a checkpoint was made with, and fills it, strictly.

    Args:
        checkpoint: ours, or a foreign one.
        source: flag and file, for messages.
        model: registry name, where the user gave one.
        **overrides: fields of the family's config that change no parameter, such as `cache_depth`.

    Returns:
        The network on the CPU, in evaluation mode, its parameters frozen.

    Raises:
        UserError: if the file's model is unknown, is not the one given, or does not fit the weights.
    """
    name, settings = settings_of(checkpoint, source, model)
    with blame(source):
        network = create_model(name, **{**settings, **overrides})
        check_family(name, checkpoint.weights)
    load_weights(network, checkpoint.weights, f"{source} as {name}")
    return network.eval().requires_grad_(False)


def settings_of(checkpoint: Checkpoint, source: str, model: str | None = None) -> tuple[str, dict[str, Any]]:
    """Registry name and overrides of the network that a checkpoint was made with.

    Our files say them. For foreign ones it is the user's name, or else the model of their sizes, with its own settings.

    Raises:
        UserError: if the name is unknown, or not the one given.
    """
    if checkpoint.meta is not None:
        settings = dict(checkpoint.meta["model"])
        name = settings.pop("name")
        if model not in (None, name):
            raise UserError(f"--model {model}: {source} was trained as {name}")
        return name, settings
    name = model or model_of_weights(checkpoint.weights)
    if name is None:
        raise UserError(f"{source}: its names and sizes are those of no model in the registry")
    return name, {}


def model_of_weights(weights: Mapping[str, Tensor]) -> str | None:
    """Finds the published model with these names, width, depth and patch size; None if there is none."""
    family, patches = family_of_weights(weights), weights.get("x_embedder.proj.weight")
    if family is None or patches is None or patches.ndim != 4:
        return None
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    width, _, patch, _ = patches.shape
    sizes = {"depth": depth, "hidden_size": width, "patch_size": patch}
    for name in FAMILIES[family].configs:
        config = model_config(name)
        if all(getattr(config, field, None) == size for field, size in sizes.items()):
            return name
    return None


def family_of_weights(names: Iterable[str]) -> str | None:
    """Finds the family whose networks have parameters of these names, whatever their depth.

    Args:
        names: of all parameters in a checkpoint.

    Returns:
        A family of the registry; None if no family's names are exactly these.
    """
    found = _without_numbers(names)
    return next((family for family in FAMILIES if found in _layouts(family)), None)


def check_family(model: str, names: Iterable[str]) -> None:
    """Refuses weights that are known to be another family's than the model's; leaves unknown ones to a strict load.

    Args:
        model: registry name that they are to be loaded as.
        names: of all parameters in a checkpoint.

    Raises:
        ValueError: saying what the weights lack or have beyond the model, and which model to choose.
    """
    row, found = family_of(model), family_of_weights(names)
    (wanted,) = (family for family in FAMILIES if FAMILIES[family] is row)
    if found in (None, wanted):
        return
    assert found is not None
    (ours, *_), theirs = _layouts(wanted), _without_numbers(names)
    differences = [
        *(f"without {part}" for part in _parts(ours - theirs)),
        *(f"with {part}" for part in _parts(theirs - ours)),
    ]
    sibling = found + model.removeprefix(wanted)
    choice = sibling if sibling in list_models() else f"a {found} model"
    raise ValueError(f"weights of a {found} ({', '.join(differences)}), not of {model}; choose {choice}")


@cache
def _layouts(family: str) -> tuple[frozenset[str], ...]:
    """Parameter names of a family's networks, one set for each kind of name in front of the size."""
    kinds = {name.rsplit("-", 1)[0]: name for name in reversed(FAMILIES[family].configs)}
    with torch.device("meta"):
        networks = [create_model(name) for name in reversed(kinds.values())]
    return tuple(_without_numbers(network.state_dict()) for network in networks)


def _without_numbers(names: Iterable[str]) -> frozenset[str]:
    return frozenset(re.sub(r"\.\d+(?=\.|$)", "", name) for name in names)


def _parts(names: Iterable[str]) -> list[str]:
    return sorted({name.split(".")[0] for name in names})
