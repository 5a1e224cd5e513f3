"""Official networks with our weights, and the official process, imported from checkouts that the user has."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from torch import nn

from models import Network, family_name
from runtime.errors import UserError


class Official(NamedTuple):
    """Where the official network of a family is, and what its constructor takes.

    Attributes:
        repository: On GitHub.
        file: Path in a checkout.
        network: Name of the class.
        arguments: Names of its arguments -> fields of our config, or `in_channels` and `input_size` of its samples.
    """

    repository: str
    file: str
    network: str
    arguments: Mapping[str, str]


_SHARED = ("in_channels", "hidden_size", "patch_size", "num_classes")
_DIT = {
    name: name
    for name in (*_SHARED, "input_size", "depth", "num_heads", "mlp_ratio", "class_dropout_prob", "learn_sigma")
}
_DDT = {name: name for name in _SHARED} | {
    "num_groups": "num_heads", "num_blocks": "depth", "num_encoder_blocks": "encoder_depth",
}  # fmt: skip
OFFICIAL = {
    "DiT": Official("facebookresearch/DiT", "models.py", "DiT", _DIT),
    "DyDiT": Official("alibaba-damo-academy/DyDiT", "DyDiT/models.py", "DiT", _DIT),
    "DDT": Official("MCG-NJU/DDT", "src/models/denoiser/decoupled_improved_dit.py", "DDT", _DDT),
    "Skip-DiT": Official("OpenSparseLLMs/Skip-DiT", "class-to-image/models.py", "DiT_skip", _DIT),
}


def _import(path: Path, name: str) -> ModuleType:
    """Import a file under another name than our own module has.

    Raises:
        FileNotFoundError: If there is none.
    """
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
    if not path.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    before = set(sys.modules)
    sys.modules[name] = module  # modules of a package import each other relatively,
    sys.path.append(str(path.parent))  # those beside a script by their bare names
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        for loaded in set(sys.modules) - before:
            file = getattr(sys.modules[loaded], "__file__", None)
            if loaded.split(".")[0] == name or (file is not None and path.parent in Path(file).parents):
                del sys.modules[loaded]
    return module


def official_network(folder: Path, ours: Network, name: str) -> nn.Module:
    """Build the official network with our weights.

    Raises:
        UserError: If its file is not there, imports a package that is not installed, or names its weights differently;
            or if no official network of this family is known.
    """
    family = family_name(name)
    if family not in OFFICIAL:
        raise UserError(f"--against {folder}: {name} has no official network here; families: {', '.join(OFFICIAL)}")
    source = OFFICIAL[family]
    settings = dataclasses.asdict(ours.config)
    settings["in_channels"], settings["input_size"], _ = settings["sample_shape"]
    try:
        kind = getattr(_import(folder / source.file, "official_dit_models"), source.network)
        network: nn.Module = kind(**{argument: settings[field] for argument, field in source.arguments.items()})
        network.load_state_dict(ours.state_dict(), strict=True)
    except FileNotFoundError as error:
        raise UserError(
            f"--against {folder}: no {source.file} there; give a checkout of {source.repository}"
        ) from error
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        raise UserError(
            f"--against {folder}: its {source.file} needs {error.name}, which is not installed "
            f"(pip install --no-deps {package})"
        ) from error
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UserError(f"--against {folder}: cannot be given the weights of {name}: {error}") from error
    return network.to(next(ours.parameters()).device).eval()


def load_official_diffusion(folder: Path) -> ModuleType:
    """Import the diffusion package of an official checkout.

    Raises:
        ImportError: If there is none.
    """
    try:
        return _import(folder / "diffusion" / "__init__.py", "official_dit_diffusion")
    except FileNotFoundError as error:
        raise ImportError("the checkout has no diffusion package") from error
