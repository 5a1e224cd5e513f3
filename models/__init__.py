"""Networks by name: `from models import create_model, list_models, DiT, DyDiT, DDT, SkipDiT`.

A family is a file with a config dataclass, a network, and a table of named configs; one row of the registry below adds
it. Networks know nothing of noise processes, step numbers, guidance scales or cache intervals.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor

from models import ddt, dit, dydit, latte, latte_t2v, skip_dit
from models.contract import Conditioning, ModelOutput, Network, NetworkLike, TimeConvention
from models.ddt import DDT
from models.dit import DiT
from models.dydit import DyDiT
from models.latte import Latte, SkipLatte
from models.latte_t2v import LatteT2V, SkipLatteT2V
from models.skip_dit import SkipDiT

__all__ = [
    "DDT",
    "FAMILIES",
    "Conditioning",
    "DiT",
    "DyDiT",
    "Family",
    "Latte",
    "LatteT2V",
    "ModelOutput",
    "Network",
    "NetworkLike",
    "SkipDiT",
    "SkipLatte",
    "SkipLatteT2V",
    "TimeConvention",
    "create_model",
    "family_name",
    "family_of",
    "list_models",
    "model_config",
]

Inference = Callable[[Mapping[str, Tensor], Any], dict[str, object] | None]  # (weights, config) -> fields


class Family(NamedTuple):
    """One row of the registry.

    Attributes:
        network: Class of the networks, called with a config.
        config: Config dataclass.
        configs: Fields of each named config; a name may be any string.
        process: Noise process that the family was published with.
        cache_bounds: Timesteps between which Skip-Cache's interval holds (`diffusion.caching.CacheSchedule`), as they
            were published: the noisy one, the low one, and whether the low one itself counts as low.
        added_parts: Modules that the family adds to the one it grew from. Weights without any of them can start its
            training (`models.transfer`).
        data_dependent: Whether the computation of an evaluation depends on its input, which rules out CUDA graphs.
        settings_from: Fields that weights for a config of the family determine; ValueError if they cannot be its own.
        data_settings: Fields that follow from the data the weights were trained on, or None if they have another size
            than the named config. Without it, files of other code need `--model` to be recognised.
    """

    network: type[Network]
    config: type[Any]
    configs: Mapping[str, Mapping[str, object]]
    process: str = "gaussian"
    cache_bounds: tuple[float, float, bool] = (1000.0, 20.0, True)
    added_parts: tuple[str, ...] = ()
    data_dependent: bool = False
    settings_from: Callable[[Mapping[str, Tensor], Any], dict[str, object]] | None = None
    data_settings: Inference | None = None


FAMILIES: dict[str, Family] = {
    "DiT": Family(DiT, dit.DiTConfig, dit.CONFIGS, data_settings=dit.data_settings),
    "DyDiT": Family(
        DyDiT,
        dydit.DyDiTConfig,
        dydit.CONFIGS,
        added_parts=("attn_rate", "mlp_rate", "token_selection"),
        data_dependent=True,
        settings_from=dydit.settings_from,
        data_settings=dit.data_settings,
    ),
    "DDT": Family(DDT, ddt.DDTConfig, ddt.CONFIGS, process="flow", data_settings=ddt.data_settings),
    "Skip-DiT": Family(
        SkipDiT,
        skip_dit.SkipDiTConfig,
        skip_dit.CONFIGS,
        added_parts=("skip_norms", "skip_linears"),
        data_settings=dit.data_settings,
    ),
    "Latte": Family(
        Latte,
        latte.LatteConfig,
        latte.CONFIGS,
        cache_bounds=latte.CACHE_BOUNDS,
        data_settings=latte.data_settings,
    ),
    "Skip-Latte": Family(
        SkipLatte,
        latte.SkipLatteConfig,
        latte.SKIP_CONFIGS,
        cache_bounds=latte.CACHE_BOUNDS,
        added_parts=("skip_norms", "skip_linears"),
        data_settings=latte.data_settings,
    ),
    "LatteT2V": Family(
        LatteT2V,
        latte_t2v.LatteT2VConfig,
        latte_t2v.CONFIGS,
        cache_bounds=latte_t2v.CACHE_BOUNDS,
        data_settings=latte_t2v.data_settings,
    ),
    "Skip-LatteT2V": Family(
        SkipLatteT2V,
        latte_t2v.SkipLatteT2VConfig,
        latte_t2v.SKIP_CONFIGS,
        cache_bounds=latte_t2v.CACHE_BOUNDS,
        added_parts=("skip_norms", "skip_linears"),
        data_settings=latte_t2v.data_settings,
    ),
}


def list_models(pattern: str = "*") -> list[str]:
    """List the names that `create_model` accepts, those that match a shell pattern such as "*XL*"."""
    names = (name for family in FAMILIES.values() for name in family.configs)
    return [name for name in names if fnmatchcase(name, pattern)]


def family_name(name: str) -> str:
    """Find the family of a model, such as "DiT" of "DiT-XL/2".

    Raises:
        ValueError: Naming the models of similar spelling, if the name is unknown.
    """
    for family, row in FAMILIES.items():
        if name in row.configs:
            return family
    lower = {known.lower(): known for known in list_models()}
    close = [lower[match] for match in get_close_matches(name.lower(), lower, n=5, cutoff=0.7)]
    raise ValueError(f"unknown model {name!r}; " + (f"close to it: {', '.join(close)}" if close else _all_in_short()))


def family_of(name: str) -> Family:
    """Find the registry row of a model; a ValueError if the name is unknown."""
    return FAMILIES[family_name(name)]


def _all_in_short() -> str:
    """List all names, joining those of the form KIND-SIZE/PATCH: "known: DiT-{S,B}/{2,4}, DiT-debug/2"."""
    patches: dict[tuple[str, ...], list[str]] = {}  # (kind, size) or (name,) -> patches
    for name in list_models():
        match = re.fullmatch(r"(.+)-([^-/]+)/([^/]+)", name)
        patches.setdefault(match.groups()[:2] if match else (name,), []).extend(match.groups()[2:] if match else ())
    sizes: dict[tuple[str, str], list[str]] = {}  # (kind, patches) -> sizes
    for (kind, *size), each in patches.items():
        sizes.setdefault((kind, _either(each)), []).extend(size)
    items = (f"{kind}-{_either(each)}/{patch}" if each else kind for (kind, patch), each in sizes.items())
    return "known: " + ", ".join(items)


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"


def model_config(name: str, **overrides: object) -> Any:
    """Build the config of a named model, with these fields overridden.

    Raises:
        ValueError: For an unknown name, an unknown field, or values that do not fit together.
    """
    family = family_of(name)
    fields = {field.name: field for field in dataclasses.fields(family.config)}
    named = family.configs[name]
    if "sample_shape" in fields and not {"input_size", "in_channels"}.isdisjoint(overrides):
        default = named.get("sample_shape", fields["sample_shape"].default)
        overrides = _with_sample_shape(overrides, default)
    for field in overrides:
        if field not in fields:
            raise ValueError(f"{name} has no setting {field!r}; it has: {', '.join(fields)}")
    return family.config(**{**named, **overrides})


def _with_sample_shape(overrides: Mapping[str, object], default: Any) -> dict[str, object]:
    """Translate the former fields input_size and in_channels into a sample_shape."""
    former = {name: value for name, value in overrides.items() if name in ("input_size", "in_channels")}
    if "sample_shape" in overrides:
        raise ValueError(f"sample_shape {overrides['sample_shape']} replaces {' and '.join(former)}; give one of them")
    channels, height, width = default
    side = former.get("input_size")
    shape = (former.get("in_channels", channels), side or height, side or width)
    warnings.warn(f"{' and '.join(former)}: use sample_shape={shape}", FutureWarning, stacklevel=4)
    return {**{name: value for name, value in overrides.items() if name not in former}, "sample_shape": shape}


def create_model(name: str, **overrides: object) -> Network:
    """Build a network with fresh weights.

    Args:
        name: One of `list_models()`, such as "DiT-XL/2".
        **overrides: Fields of the family's config, such as `sample_shape=(4, 64, 64)` or `num_classes=10`.

    Returns:
        The network, in training mode, on the current default device.

    Raises:
        ValueError: For an unknown name, an unknown field, or values that do not fit together.
    """
    return family_of(name).network(model_config(name, **overrides))
