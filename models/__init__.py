"""The one models module: `from models import create_model, list_models, DiT, DyDiT, DDT, SkipDiT`.

A family is a file with a config dataclass, a network, and a table of named configs; it enters the registry below by
one row. Networks know nothing of noise processes, step numbers, guidance scales or cache intervals.
"""

from __future__ import annotations

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
        ValueError: naming close relatives, if the name is unknown.
    """
    for family in FAMILIES.values():
        if name in family.configs:
            return family
    known = list_models()
    relatives = [k for k in known if k.rsplit("-", 1)[0] == name.rsplit("-", 1)[0]] or known
    raise ValueError(f"unknown model {name!r}; known: {', '.join(relatives)}")


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
