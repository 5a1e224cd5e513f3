"""Models and families of weights in files: names and shapes tell them, without a config."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from torch import Tensor

from models import FAMILIES, Network, family_name, model_config
from models.blank import without_values
from models.transfer import LABEL_TABLE

Shapes = Mapping[str, tuple[int, ...]]


class Recognised(NamedTuple):
    """A model that takes the weights as they are."""

    name: str  # in the registry
    fields: dict[str, object]  # fields of its config that the weights determine


def recognise(weights: Mapping[str, Tensor], only: str | None = None) -> Recognised | None:
    """Find the first model of the registry, or the `only` one, with exactly these parameter names and shapes.

    The data may differ from the named config's: number of classes, channels, size and variance follow from the shapes.
    Fields that leave no trace there, such as the number of heads, are the named config's. Of several models, as where
    the patch size does not follow from the channels (DDT), the one with the fewest changed fields is meant.

    Raises:
        ValueError: If the weights have a named model's names and size, but its family refuses them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    fitting: list[tuple[int, Recognised]] = []  # with the number of changed fields
    refusal: str | None = None
    for family, row in FAMILIES.items():
        for name in row.configs if only is None else {only} & row.configs.keys():
            try:
                fields = _fields(family, name, weights, shapes)
            except ValueError as error:
                refusal = f"weights of {name}, but {error}"
                continue
            if fields is not None:
                named = model_config(name)
                changes = sum(getattr(named, key) != value for key, value in fields.items())
                fitting.append((changes, Recognised(name, fields)))
    if not fitting and refusal is not None:
        raise ValueError(refusal)
    return min(fitting, key=lambda each: each[0])[1] if fitting else None


def _fields(family: str, name: str, weights: Mapping[str, Tensor], shapes: Shapes) -> dict[str, object] | None:
    """Find the config fields with which a named model takes the weights; None, or a ValueError of the family."""
    row = FAMILIES[family]
    if row.data_settings is None:
        return None
    try:
        named = model_config(name)
        data = row.data_settings(weights, named)
        if data is None:
            return None
        config = model_config(name, **data)
        if _shapes(family, config).keys() != shapes.keys():
            return None
    except (LookupError, ValueError):  # other names or ranks, or a shape that no config has
        return None
    fields = data | (row.settings_from(weights, config) if row.settings_from is not None else {})
    return fields if _shapes(family, model_config(name, **fields)) == shapes else None


@cache
def _shapes(family: str, config: Hashable) -> Shapes:
    with without_values():
        network = FAMILIES[family].network(config)
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def family_of_weights(names: Iterable[str]) -> str | None:
    """Find the family that has exactly parameters of these names, whatever their depth; None if there is none."""
    plain = _without_numbers(names)
    return next((family for family in FAMILIES if plain in _layouts(family)), None)


def describe_unknown(names: Iterable[str]) -> str:
    """Describe weights that no named model takes, for a message."""
    family = family_of_weights(names)
    if family is None:
        return "its names and sizes are those of no model in the registry"
    return f"weights of a {family}, but their sizes are those of no model in the registry"


def check_family(model: str, weights: Mapping[str, Tensor]) -> None:
    """Check that weights are not those of another family than the model's.

    Weights of no known family pass; loading them strictly says what is wrong.

    Raises:
        ValueError: Naming what the weights lack or have in addition, and the model to choose.
    """
    actual, expected = family_of_weights(weights), family_name(model)
    if actual in (None, expected):
        return
    (ours, *_), theirs = _layouts(expected), _without_numbers(weights)
    differences = [
        f"{word} {', '.join(parts)}"
        for word, parts in (("without", _parts(ours, theirs)), ("with", _parts(theirs, ours)))
        if parts
    ]
    choice = recognised_name(weights) or f"a {actual} model"
    raise ValueError(f"weights of a {actual} ({', '.join(differences)}), not of {model}; choose {choice}")


def check_conditional(network: Network, weights: Mapping[str, Tensor], remedy: str) -> None:
    """Check that weights of an unconditional network are not taken for class-conditional ones, or the reverse.

    Weights that differ in other names pass; loading them strictly says what is wrong.

    Raises:
        ValueError: Saying what the weights are, with the remedy.
    """
    own = network.state_dict()
    if own.keys() ^ weights.keys() != {LABEL_TABLE}:
        return
    classes = getattr(network.config, "num_classes", 0)
    if LABEL_TABLE in own:
        raise ValueError(f"unconditional weights (they have no y_embedder), and num_classes is {classes}; {remedy}")
    rows = f"{len(weights[LABEL_TABLE])} rows, one of them the null class's if there is one"
    raise ValueError(f"class-conditional weights (y_embedder has {rows}), and num_classes is {classes}; {remedy}")


def recognised_name(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of the model that takes the weights, for messages; None if there is none."""
    try:
        recognised = recognise(weights)
    except ValueError:
        return None
    return None if recognised is None else recognised.name


@cache
def _layouts(family: str) -> tuple[frozenset[str], ...]:
    """Collect the parameter names of a family's networks without numbers.

    Configs that differ in numbers only have the same names, so one of each kind is built.
    """
    kinds = {}
    for name in FAMILIES[family].configs:
        config = model_config(name)
        kinds[frozenset(item for item in vars(config).items() if isinstance(item[1], bool | str | None))] = config
    unlabelled = [config for config in kinds.values() if getattr(config, "fewest_classes", 1) == 0]
    without_labels = (replace(config, num_classes=0) for config in unlabelled)
    return tuple(_without_numbers(_shapes(family, config)) for config in (*kinds.values(), *without_labels))


def _without_numbers(names: Iterable[str]) -> frozenset[str]:
    return frozenset(re.sub(r"\.\d+(?=\.|$)", "", name) for name in names)


def _parts(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Name the modules that occur in some of these names and in none of the others, at the highest level possible."""
    known = {".".join(name.split(".")[:n]) for name in others for n in range(1, name.count(".") + 2)}
    parts = set()
    for name in names:
        words = name.split(".")
        prefixes = (".".join(words[:n]) for n in range(1, len(words) + 1))
        parts.add(next((prefix for prefix in prefixes if prefix not in known), ""))
    return sorted(parts - {""})
