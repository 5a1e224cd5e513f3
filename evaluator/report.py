"""What an evaluation leaves behind: five lines in ADM's layout, and a JSON that states the whole protocol."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evaluator.npz import BadImageFile
from runtime.errors import UserError
from runtime.files import atomic_path


def adm_lines(scores: Mapping[str, float]) -> str:
    """The scores as ADM prints them, a line each: "FID: 2.271800"."""
    return "\n".join(f"{name}: {value:.6f}" for name, value in scores.items())


def default_output(samples: Path) -> Path:
    """Where the JSON goes: name.npz -> name.scores.json, beside it."""
    return samples.with_suffix(".scores.json")


def protocol_path(samples: Path) -> Path:
    """Where sample_ddp.py writes how the samples were made: name.npz -> name.json."""
    return samples.with_suffix(".json")


def read_protocol(samples: Path) -> Any:
    """How the samples were made (sampler, steps, guidance, checkpoint, seed), or None where nobody wrote it down.

    Raises:
        BadImageFile: if the file beside the samples is no JSON, or has numbers that could not be written into ours.
    """
    path = protocol_path(samples)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(), parse_constant=_finite, parse_float=_finite)
    except (OSError, ValueError) as error:
        raise BadImageFile(
            f"{path}: says how the samples were made, but is no JSON ({error}); mend or remove it"
        ) from error


def _finite(text: str) -> float:
    """A number of a JSON file; Python would take NaN and Infinity, which are none, and 1e999 as infinity."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def library_versions(backend: str) -> dict[str, str]:
    """Versions of what computes here."""
    libraries = ["numpy", "torch"] + (["tensorflow"] if backend == "tensorflow" else [])
    return {"python": platform.python_version()} | {name: str(sys.modules[name].__version__) for name in libraries}


def scores_as_json(scores: Mapping[str, float]) -> dict[str, float]:
    """The scores by plain keys: "Inception Score" -> "inception_score"."""
    return {name.lower().replace(" ", "_"): value for name, value in scores.items()}


def write_document(document: Mapping[str, Any], path: Path) -> None:
    """Writes the JSON, whole or not at all.

    Raises:
        UserError: if the disk is full, or a score is no finite number.
    """
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot write it ({getattr(error, 'strerror', None) or error})") from error
