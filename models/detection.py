"""Whose weights these are, told by the names of the parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

import torch

from models import FAMILIES, create_model, list_models


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
    wanted = next(family for family, row in FAMILIES.items() if model in row.configs)
    found = family_of_weights(names)
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
