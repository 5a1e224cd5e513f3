"""Checkpoints in parts: a folder with one safetensors file of each process that held a part, `0050000.sharded/`.

A file is like one of `runtime.tensor_file`, with the same document, its own checksums, and the place of its rows in the
whole tensors. The same places are also where torch.distributed.checkpoint's HuggingFaceStorageReader looks for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.json_file import Json
from runtime.tensor_file import read_tensors, write_tensors

SUFFIX = ".sharded"  # of the folder
PARTS = "parts"  # member of a file's document: its number, the number of files, and the places of its tensors
TORCH_PLACES, TORCH_OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # of torch.distributed.checkpoint


class Part(NamedTuple):
    """Some rows of a tensor.

    Attributes:
        tensor: The rows.
        shape: Shape of the whole tensor.
        start: Number of the first row.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    start: int = 0


def is_sharded(path: Path) -> bool:
    """True for a folder of parts, by its name."""
    return path.suffix == SUFFIX and path.is_dir()


def files_of(folder: Path) -> list[Path]:
    """Files of a folder of parts, in order."""
    return sorted(folder.glob("[!.]*.safetensors"))


def write_part(
    folder: Path, number: int, count: int, parts: Mapping[str, Part], document: Mapping[str, object], key: str
) -> None:
    """Write one of `count` files into a folder; the other arguments are those of `write_tensors`.

    Raises:
        OSError: If it cannot be written.
    """
    places = {name: {"shape": list(part.shape), "start": part.start} for name, part in parts.items()}
    offsets = {
        name: {TORCH_OFFSETS: [part.start, *[0] * (len(part.shape) - 1)][: len(part.shape)]}
        for name, part in parts.items()
    }
    write_tensors(
        folder / f"{number:05d}-of-{count:05d}.safetensors",
        {name: part.tensor for name, part in parts.items()},
        {**document, PARTS: {"number": number, "count": count, "places": places}},
        key,
        {TORCH_PLACES: json.dumps(offsets)},
    )


def read_parts(
    folder: Path, key: str, choose: Callable[[Json, list[str]], Iterable[str]] | None = None
) -> tuple[dict[str, Tensor], Json]:
    """Read tensors from a folder of parts, each of them whole; arguments, results and errors as of `read_tensors`."""
    files = files_of(folder)
    held = {path: _outline(path, key) for path in files}  # before anything is read: are all there, and of one save?
    documents = [document for document, _ in held.values()]
    numbers = sorted((parts["number"], parts["count"]) for parts in (document[PARTS] for document in documents))
    if not files or numbers != [(number, len(files)) for number in range(len(files))]:
        count = numbers[0][1] if numbers else "none"
        raise ValueError(f"{len(files)} files of {count} are there")
    common = [{name: value for name, value in document.items() if name != PARTS} for document in documents]
    if any(document != common[0] for document in common):
        raise ValueError("its files are of different saves")
    names = sorted({name for _, own in held.values() for name in own})
    chosen = set(names if choose is None else choose(common[0], names))
    tensors: dict[str, Tensor] = {}
    rows = dict.fromkeys(chosen, 0)
    for path, (document, own) in held.items():
        wanted = [name for name in own if name in chosen]
        read, _ = read_tensors(path, key, lambda *_, wanted=wanted: wanted)
        for name, part in read.items():
            shape, start = document[PARTS]["places"][name]["shape"], document[PARTS]["places"][name]["start"]
            if list(part.shape) == shape:
                tensors[name] = part
            else:
                whole = tensors.setdefault(name, torch.empty(shape, dtype=part.dtype))
                whole[start : start + len(part)] = part
            rows[name] += part.numel()
    for name, count in rows.items():
        if count != tensors[name].numel():
            raise ValueError(f"{name} is not whole")
    return tensors, common[0]


def _outline(path: Path, key: str) -> tuple[Json, list[str]]:
    """Document of a file, and names of its tensors, of which none is read."""
    names: list[str] = []

    def none(_: Json, own: list[str]) -> list[str]:
        names.extend(own)
        return []

    _, document = read_tensors(path, key, none)
    if PARTS not in document:
        raise ValueError(f"{path.name} is no part of a checkpoint")
    return document, names
