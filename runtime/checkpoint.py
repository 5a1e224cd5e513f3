"""Checkpoints: ours, which hold tensors and JSON only, and the official ones, read without running their pickles.

Ours is one safetensors file. Tensor names start with their group ("model/", "ema/", "optimizer/"); the file's metadata
holds one JSON document with everything needed to rebuild the run's network, process and data, and a checksum of every
tensor, compared when it is read.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime.errors import UserError
from runtime.files import atomic_path

METADATA_KEY = "dit_family"
CHECKSUMS_KEY = "crc32"
# Where the official releases keep weights, best first; a file without any of these is the state dict itself.
OFFICIAL_GROUPS = ("ema", "model", "state_dict")
# Trainers that keep both in one state dict tell them apart by what stands in front.
GROUP_PREFIXES = {"ema": "ema_denoiser.", "model": "denoiser."}
# What wrappers put in front of a parameter's name.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


class Checkpoint(NamedTuple):
    """One set of weights from a file.

    Attributes:
        weights: parameter name -> tensor, on the CPU.
        meta: the JSON document of our own files; None for foreign files.
    """

    weights: dict[str, Tensor]
    meta: dict[str, Any] | None


def save_checkpoint(path: Path, groups: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        path: final name, ending in ".safetensors".
        groups: group name -> parameter name -> tensor.
        meta: JSON values.

    Raises:
        UserError: if the file cannot be written (a full disk, say); what stood there before is intact.
    """
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group, members in groups.items()
        for name, tensor in members.items()
    }
    checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    metadata = {METADATA_KEY: json.dumps(meta), CHECKSUMS_KEY: json.dumps(checksums)}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise UserError(f"{path}: could not write {size:,} bytes ({error}); earlier checkpoints are intact") from error


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())


def read_checkpoint(path: Path, group: str = "ema", flag: str = "--ckpt") -> Checkpoint:
    """Reads one group of weights from any supported file.

    Args:
        path: ours (safetensors), or an official .pt, .pth or .ckpt: a flat state dict, or one under "ema", "model" or
            "state_dict", beside whatever else; in it one set of weights, or two told apart by `GROUP_PREFIXES`.
        group: "ema" or "model". Official files without that group give what they have.
        flag: for messages.

    Raises:
        UserError: if the file is missing, damaged, not a checkpoint, or holds objects that could run code.
    """
    if path.suffix == ".safetensors":
        groups, meta = read_groups(path, [group], flag)
        return Checkpoint(_unwrapped(groups[group]), meta)
    return Checkpoint(_read_official(path, group, flag), None)


def read_groups(
    path: Path, groups: Sequence[str], flag: str = "--ckpt"
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any] | None]:
    """Reads groups of tensors from one of our files, every tensor compared with its checksum.

    Args:
        path: a safetensors file; one that is not ours is taken as the only group.
        groups: such as "model", "ema", "optimizer".
        flag: for messages.

    Returns:
        Group name -> tensor name -> tensor on the CPU, and the JSON document (None if the file is not ours).

    Raises:
        UserError: if the file is missing or damaged, or lacks a group.
    """
    _require_file(path, flag)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {
                name: file.get_tensor(name)
                for name in file.keys()
                if METADATA_KEY not in metadata or name.split("/")[0] in groups
            }
            present = {name.split("/")[0] for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{flag} {path}: damaged or truncated safetensors file ({error})") from error
    for name, checksum in json.loads(metadata.get(CHECKSUMS_KEY, "{}")).items():
        if name in tensors and _checksum(tensors[name]) != checksum:
            raise UserError(f"{flag} {path}: damaged, {name} does not match its checksum")
    if METADATA_KEY not in metadata:
        return {group: tensors for group in groups}, None
    read = {g: {n.removeprefix(f"{g}/"): t for n, t in tensors.items() if n.startswith(f"{g}/")} for g in groups}
    for group in groups:
        if not read[group]:
            has = ", ".join(sorted(present)) or "nothing"
            raise UserError(f"{flag} {path}: holds no weights under {group!r}; it has: {has}")
    return read, json.loads(metadata[METADATA_KEY])


def _require_file(path: Path, flag: str) -> None:
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; give a file in it, such as checkpoints/0050000.safetensors")
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")


def _read_official(path: Path, group: str, flag: str) -> dict[str, Tensor]:
    _require_file(path, flag)
    try:
        # Training checkpoints of the official repositories carry their flags as an argparse.Namespace: plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped where the format allows: a training checkpoint is four times as large as what is read of it.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{flag} {path}: refused, because it is no PyTorch file of plain tensors (unpickling it could run code)"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(f"{flag} {path}: not a readable PyTorch file; truncated download? ({error})") from error
    if isinstance(content, dict):
        for name in (group, *OFFICIAL_GROUPS):
            if isinstance(content.get(name), dict):
                content = content[name]
                break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{flag} {path}: a PyTorch file, but not one of weights by name")
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    for prefix in (GROUP_PREFIXES.get(group, group), *GROUP_PREFIXES.values()):
        grouped = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if grouped:
            return _unwrapped(grouped)
    return _unwrapped(weights)


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what DDP and torch.compile put in front of (or, per block, into) them."""
    plain = {}
    for name, tensor in weights.items():
        for prefix in WRAPPER_PREFIXES:
            name = name.removeprefix(prefix)
        plain[name.replace("._orig_mod.", ".")] = tensor
    return plain


def load_weights(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    recognise: Callable[[Mapping[str, Tensor]], str | None] | None = None,
) -> None:
    """Copies weights into a network; every name and shape must fit.

    Args:
        network: to be filled.
        weights: parameter name -> tensor.
        source: file and model, for the message.
        recognise: names the model that weights do fit, for the message.

    Raises:
        UserError: with what was expected and found, the number of mismatches, and the first three.
    """
    wanted = network.state_dict()
    problems = [
        *(f"missing {name}" for name in wanted if name not in weights),
        *(f"unexpected {name}" for name in weights if name not in wanted),
        *(
            f"{name} is {_shape(weights[name])}, expected {_shape(tensor)}"
            for name, tensor in wanted.items()
            if name in weights and weights[name].shape != tensor.shape
        ),
    ]
    if problems:
        name = recognise(weights) if recognise is not None else None
        found = f"those of {name}, {_outline(weights)}" if name else _outline(weights)
        raise UserError(
            f"{source}: the weights do not fit the model in {len(problems)} places; expected {_outline(wanted)}, "
            f"found {found}: {'; '.join(problems[:3])}"
        )
    network.load_state_dict(dict(weights))


def _outline(weights: Mapping[str, Tensor]) -> str:
    """What tells architectures apart at a glance: "292 tensors, 28 blocks, width 1152"."""
    blocks = {match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    width = next(
        (f", width {w.shape[0]}" for name, w in weights.items() if name.endswith("x_embedder.proj.weight")), ""
    )
    return f"{len(weights)} tensors, {len(blocks)} blocks{width}"


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "a single number"
