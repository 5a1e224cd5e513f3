"""Networks out of checkpoints: whose weights a file holds, and a network filled with them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch

from models import FAMILIES, Network, create_model, family_of, list_models, model_config
from models.recognise import recognise
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

    Our files say them. For foreign ones it is the user's name, or else the model that has their names and shapes.

    Raises:
        UserError: if the name is unknown, or not the one given.
    """
    if checkpoint.meta is not None:
        settings = dict(checkpoint.meta["model"])
        name = settings.pop("name")
        if model not in (None, name):
            raise UserError(f"--model {model}: {source} was trained as {name}")
        return name, settings
    with blame(source):
        found = recognise(checkpoint.weights)
        if found is None and model is None:
            raise ValueError(unknown_weights(checkpoint.weights))
    if found is not None and model in (None, found.name):
        return found
    assert model is not None  # or it was refused above
    with blame(f"{source} as {model}"):
        return model, family_of(model).network.settings_from(checkpoint.weights, model_config(model))


def family_of_weights(names: Iterable[str]) -> str | None:
    """Finds the family whose networks have parameters of these names, whatever their depth.

    Args:
        names: of all parameters in a checkpoint.

    Returns:
        A family of the registry; None if no family's names are exactly these.
    """
    found = _without_numbers(names)
    return next((family for family in FAMILIES if found in _layouts(family)), None)


def unknown_weights(names: Iterable[str]) -> str:
    """What to say of weights that are no named model's: whose they are, as far as their names tell."""
    family = family_of_weights(names)
    if family is None:
        return "its names and sizes are those of no model in the registry"
    return f"weights of a {family}, but their sizes are those of no model in the registry"


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
        f"{word} {', '.join(parts)}"
        for word, parts in (("without", _parts(ours, theirs)), ("with", _parts(theirs, ours)))
        if parts
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


def _parts(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """What is in some of these names and in none of the others, as far from the end of a name as can be said."""
    known = {".".join(name.split(".")[:n]) for name in others for n in range(1, name.count(".") + 2)}
    found = set()
    for name in names:
        words = name.split(".")
        prefixes = (".".join(words[:n]) for n in range(1, len(words) + 1))
        found.add(next((prefix for prefix in prefixes if prefix not in known), ""))
    return sorted(found - {""})
