"""The one models module: `from models import create_model, list_models, DiT, DyDiT, DDT, SkipDiT`.

A family is a file with a config dataclass, a network, and a table of named configs; it enters the registry below by
one row. Networks know nothing of noise processes, step numbers, guidance scales or cache intervals.
"""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from models import ddt, dit, dydit, skip_dit
from models.contract import ModelOutput, Network, Pass, Routing, TimeConvention, TrainingRecipe
from models.ddt import DDT
from models.dit import DiT
from models.dydit import DyDiT
from models.skip_dit import SkipDiT

__all__ = [
    "DDT",
    "DiT",
    "DyDiT",
    "ModelOutput",
    "Network",
    "Pass",
    "Routing",
    "SkipDiT",
    "TimeConvention",
    "TrainingRecipe",
    "create_model",
    "family_of",
    "list_models",
    "model_config",
]


class Family(NamedTuple):
    """One row of the registry."""

    network: type[Network]
    configs: dict[str, dict[str, Any]]


FAMILIES: dict[str, Family] = {
    "DiT": Family(DiT, dit.CONFIGS),
    "DyDiT": Family(DyDiT, dydit.CONFIGS),
    "DDT": Family(DDT, ddt.CONFIGS),
    "Skip-DiT": Family(SkipDiT, skip_dit.CONFIGS),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` accepts, those matching a shell pattern such as "*XL*"."""
    names = (name for family in FAMILIES.values() for name in family.configs)
    return [name for name in names if fnmatchcase(name, pattern)]


def family_of(name: str) -> Family:
    """Finds the registry row of a model name.

    Raises:
        ValueError: naming those that are spelt alike, if the name is unknown.
    """
    for family in FAMILIES.values():
        if name in family.configs:
            return family
    lower = {known.lower(): known for known in list_models()}
    close = [lower[match] for match in get_close_matches(name.lower(), lower, n=5, cutoff=0.7)]
    raise ValueError(f"unknown model {name!r}; " + (f"close to it: {', '.join(close)}" if close else _all_in_short()))


def _all_in_short() -> str:
    """All names, those that differ in size and patch alone in one: "known: DiT-{S,B}/{2,4}, DiT-debug/2"."""
    patches: dict[str, list[str]] = {}
    for name in list_models():
        stem, patch = name.split("/")
        patches.setdefault(stem, []).append(patch)
    sizes: dict[tuple[str, str], list[str]] = {}
    for stem, found in patches.items():
        kind, size = stem.rsplit("-", 1)
        sizes.setdefault((kind, _either(found)), []).append(size)
    return "known: " + ", ".join(f"{kind}-{_either(found)}/{patch}" for (kind, patch), found in sizes.items())


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"


def model_config(name: str, **overrides: Any) -> Any:
    """The resolved config of a named model, overrides applied.

    Raises:
        ValueError: for an unknown name, an unknown field, or values that do not fit together.
    """
    family = family_of(name)
    fields = family.network.config_class.__dataclass_fields__
    for field in overrides:
        if field not in fields:
            raise ValueError(f"{name} has no setting {field!r}; it has: {', '.join(fields)}")
    return family.network.config_class(**{**family.configs[name], **overrides})


def create_model(name: str, **overrides: Any) -> Network:
    """Builds a network with fresh weights.

    Args:
        name: one of `list_models()`, such as "DiT-XL/2".
        **overrides: fields of the family's config, such as `input_size=64` or `num_classes=10`.

    Returns:
        The network, in training mode, on the current default device.

    Raises:
        ValueError: for an unknown name, an unknown field, or values that do not fit together.
    """
    return family_of(name).network(model_config(name, **overrides))
