"""Results of an evaluation: a JSON document with the whole protocol."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from evaluator.npz import BadImageFile
from runtime.errors import UserError
from runtime.files import atomic_path
from runtime.json_file import Json
from runtime.stores import staged, upload


def protocol_path(samples: Path) -> Path:
    """Path of the JSON that sample_ddp.py writes with the samples: name.npz -> name.json."""
    return path_next_to(samples, ".json")


def path_next_to(samples: Path, ending: str) -> Path:
    """Path next to the samples: name.npz, or a folder name -> name + ending."""
    return samples.with_name((samples.stem if samples.suffix == ".npz" else samples.name) + ending)


def read_protocol(samples: Path) -> object:
    """Read the settings of the samples (sampler, steps, guidance, checkpoint, seed); None if there is no such file.

    Raises:
        BadImageFile: If the file is not JSON, or has numbers that JSON does not allow.
    """
    path = protocol_path(samples)
    if not path.is_file():
        return None
    try:
        content: object = json.loads(path.read_text(), parse_constant=_finite, parse_float=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise BadImageFile(
            f"{path}: cannot read the settings of the samples as JSON ({error}); repair or remove it"
        ) from error
    return content


def is_sampled(images: Path) -> bool:
    """True for images with the settings of a sampling job next to them."""
    try:
        protocol = read_protocol(images)
    except BadImageFile:
        return False
    return isinstance(protocol, dict) and "config" in protocol


def _finite(text: str) -> float:
    """Parse a number; Python would accept NaN and Infinity, which JSON does not have, and 1e999 as infinity."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def is_result(path: Path) -> bool:
    """True for a file that `write_document` wrote."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.keys() >= {"format", "scores"}


def name_layout(keys: Collection[str]) -> str:
    """Name the references in circulation that have such statistics among their keys; empty without any."""
    if {"mu", "sigma", "mu_s", "sigma_s"} <= {*keys}:
        return "those of ADM's references"
    return "those of JiT's references and of pytorch-fid" if {"mu", "sigma"} <= {*keys} else ""


def describe_in_line(title: str, described: Json) -> str:
    """Say in one line which file a result is about.

    Args:
        title: "reference" or "samples".
        described: The file's part of the document.
    """
    facts = [f"{described['images']:,} images" if "images" in described else f"{described['clips_in_file']:,} clips"]
    if "keys" in described:
        layout = name_layout(described["keys"])
        facts.append(f"keys {', '.join(described['keys'])}{f' ({layout})' if layout else ''}")
    if "source" in described:
        facts.append(described["source"])
    if "formats" in described:
        facts += [", ".join(described["formats"]), f"crop {described['crop']}"]
    return f"{title}: {described['path']}: {'; '.join(facts)}; sha256 {described['sha256'][:16]}"


def library_versions(backend: str) -> dict[str, str]:
    """Versions of Python and the libraries that compute here."""
    libraries = ["numpy", "torch"] + (["tensorflow"] if backend == "tensorflow" else [])
    return {"python": platform.python_version()} | {name: str(sys.modules[name].__version__) for name in libraries}


def write_document(document: Mapping[str, object], path: Path) -> None:
    """Write the JSON, whole or not at all, to a path or an address.

    Raises:
        UserError: If the disk is full, or a score is not a finite number.
    """
    try:
        with atomic_path(staged(path)) as temporary:
            temporary.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot write it ({getattr(error, 'strerror', None) or error})") from error
    upload(staged(path), path, "--json")
