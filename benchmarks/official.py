"""The official network with our weights, and the official process, imported from a checkout that the user has."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from torch import nn

from models import Network
from runtime.errors import UserError


def _import(path: Path, name: str) -> ModuleType:
    """Import a file under another name than our own module has.

    Raises:
        FileNotFoundError: If there is none.
    """
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
    if not path.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # modules of a package import each other relatively
    try:
        spec.loader.exec_module(module)
    finally:
        for loaded in [key for key in sys.modules if key.split(".")[0] == name]:
            del sys.modules[loaded]
    return module


def official_network(folder: Path, ours: Network, name: str) -> nn.Module:
    """Build the official network with our weights.

    Raises:
        UserError: If models.py is not there, imports a package that is not installed, or names its weights differently.
    """
    settings = dataclasses.asdict(ours.config)
    settings.pop("cache_depth", None)  # is about later evaluations, and unknown there
    settings["in_channels"], settings["input_size"], _ = settings.pop("sample_shape")
    try:
        network = _import(folder / "models.py", "official_dit_models").DiT(**settings)
        network.load_state_dict(ours.state_dict(), strict=True)
    except FileNotFoundError as error:
        raise UserError(f"--against {folder}: no models.py there; give a checkout of facebookresearch/DiT") from error
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0]
        raise UserError(
            f"--against {folder}: its models.py needs {error.name}, which is not installed "
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
