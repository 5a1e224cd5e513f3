"""Folders of weights for the hub: config.json, and safetensors in one file or in several with an index.

    config.json                     {"dit_family": DOCUMENT}, a checkpoint's document without the state of training
    model.safetensors               one set of weights, by their official names
    vae/                            the autoencoder, if it is no public one

The document has the name of the set of weights and a checksum of every tensor. A folder for diffusers has the same in
its subfolder transformer/, with the prefix of the module that holds the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import UserError, error_prefix
from runtime.json_file import Json, parse_json
from runtime.tensor_file import CHECKSUMS, checksum
from runtime.weight_files import file_in, read_content

CONFIG, WEIGHTS, ENCODER = "config.json", "model{suffix}.safetensors", "vae"
DOCUMENT = "dit_family"  # member of config.json
FOR_DIFFUSERS, PREFIX = "transformer", "network."  # subfolder and prefix of names in a folder for diffusers
SHARD_SIZE = "5GB"
SIZE = re.compile(r"\d+(\.\d+)?\s?[KMGT]B", re.IGNORECASE)


def write_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    document: Mapping[str, object],
    shard_size: int | str = SHARD_SIZE,
    pattern: str = WEIGHTS,
    prefix: str = "",
    config: Mapping[str, object] | None = None,
) -> None:
    """Write weights and their document into a folder that exists.

    Args:
        folder: The folder.
        weights: Parameter name -> tensor.
        document: JSON values; checksums are added.
        shard_size: Largest size of a file, in bytes or as "5GB"; more are written beyond it, with an index.
        pattern: Name of the file of weights, with "{suffix}" for its number.
        prefix: Start of the names in that file.
        config: Further members of config.json.

    Raises:
        OSError: If a file cannot be written.
    """
    from huggingface_hub import save_torch_state_dict  # heavy, and only published folders need it

    # Copies: tensors that share memory are refused, or written once
    layout = torch.contiguous_format
    kept = {name: tensor.detach().cpu().clone(memory_format=layout) for name, tensor in sorted(weights.items())}
    named = {prefix + name: tensor for name, tensor in kept.items()}
    save_torch_state_dict(named, folder, filename_pattern=pattern, max_shard_size=shard_size)
    full = {**document, CHECKSUMS: {name: checksum(tensor) for name, tensor in kept.items()}}
    (folder / CONFIG).write_text(json.dumps({**(config or {}), DOCUMENT: full}, indent=2, allow_nan=False) + "\n")


def check_shard_size(size: int | str, flag: str = "shard_size") -> None:
    """Check the largest size of a file of weights.

    Raises:
        ValueError: If it is no number of bytes, and no text such as "500MB".
    """
    if size == 0 if isinstance(size, int) else SIZE.fullmatch(size) is None or not float(size[:-2]):
        raise ValueError(f"{flag} {size}: give a size with its unit, KB, MB, GB or TB, such as 500MB")


def pretrained_folder(path: Path) -> Path | None:
    """The folder with our config.json that a path means: itself, its transformer/, or that of a file in it."""
    for folder in (path, path / FOR_DIFFUSERS, path.parent):
        if (folder != path.parent or path.is_file()) and _document(folder / CONFIG) is not None:
            return folder
    return None


def read_weights(folder: Path, where: str) -> tuple[dict[str, Tensor], Json]:
    """Read a folder of ours, and compare every tensor with its checksum.

    Args:
        folder: From `pretrained_folder`.
        where: Flag and path in messages.

    Returns:
        Parameter name -> tensor on the CPU, and the document without checksums.

    Raises:
        UserError: If weights are missing or damaged.
    """
    document = _document(folder / CONFIG) or {}
    try:
        file = file_in(folder, "")
    except UserError as error:
        raise UserError(f"{where}: has a config.json, and no weights; download or save it again") from error
    with error_prefix(where):
        content, _ = read_content(file, where)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    known = document.pop(CHECKSUMS, {})
    for name in sorted(tensors.keys() | known.keys()):
        if name not in tensors or known.get(name) != checksum(tensors[name]):
            problem = "does not match its checksum" if name in tensors else "is missing"
            raise UserError(f"{where}: {name} {problem}; download or save it again")
    encoder = document.get("encoder", {})
    for place in (folder / ENCODER, folder.parent / ENCODER):
        if encoder.get("name") == ENCODER and place.is_dir():
            document["encoder"] = {**encoder, "name": str(place)}
    return tensors, document


def _document(config: Path) -> Json | None:
    """Document of a config.json; None if it is not ours, cannot be read, or is absent."""
    try:
        document = parse_json(config.read_text())[DOCUMENT]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return document if isinstance(document, dict) and "model" in document else None
