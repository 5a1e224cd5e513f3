"""Processes, files, checkpoints, settings, seeds, errors: what all other packages use. Imports none of them.

Importing it checks that Python finds the packages of this checkout: `models` and `data` are common names.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "diffusion", "evaluator", "models", "sampling", "training")


def check_packages() -> None:
    """Check that no module of other code hides a package of this checkout.

    Raises:
        ImportError: Naming the first that does. Our own scripts say so in one line and exit.
    """
    for name in PACKAGES:
        origin = getattr(importlib.util.find_spec(name), "origin", None)
        if origin is None or Path(origin).resolve() == ROOT / name / "__init__.py":
            continue
        message = f"`import {name}` finds {origin}, not {ROOT / name}; rename it, or put {ROOT} first on PYTHONPATH"
        script = Path(getattr(sys.modules["__main__"], "__file__", None) or "-")
        if script.resolve().is_relative_to(ROOT):
            print(f"{script.name}: error: {message}", file=sys.stderr)
            raise SystemExit(2)
        raise ImportError(message)


check_packages()
