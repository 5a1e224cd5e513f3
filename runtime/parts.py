"""Checkpoints in parts: a folder with one safetensors file of each process that held a part, `0050000.sharded/`.

A file is like one of `runtime.tensor_file`, with the same document, its own checksums, and the place of its rows in the
whole tensors. The same places are also where torch.distributed.checkpoint's HuggingFaceStorageReader looks for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from runtime.json_file import Json
from runtime.tensor_file import StoredTensor, open_tensors, write_tensors

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


def open_parts(folder: Path, key: str) -> tuple[dict[str, StoredTensor], Json]:
    """Open a folder of parts; arguments, results and errors as of `open_tensors`, with whole tensors."""
    files = files_of(folder)
    opened = [open_tensors(path, key) for path in files]
    documents = [document for _, document in opened]
    for path, document in zip(files, documents, strict=True):
        if PARTS not in document:
            raise ValueError(f"{path.name} is no part of a checkpoint")
    parts = [document.pop(PARTS) for document in documents]
    numbers = sorted((part["number"], part["count"]) for part in parts)
    if not files or numbers != [(number, len(files)) for number in range(len(files))]:
        raise ValueError(f"{len(files)} files of {numbers[0][1] if numbers else 'none'} are there")
    if any(document != documents[0] for document in documents):
        raise ValueError("its files are of different saves")
    found: dict[str, list[StoredTensor]] = {}
    for part, (tensors, _) in zip(parts, opened, strict=True):
        for name, rows in tensors.items():
            shape, start = tuple(part["places"][name]["shape"]), part["places"][name]["start"]
            if rows.shape[1:] != shape[1:]:
                raise ValueError(f"{name} has rows of another shape")
            found.setdefault(name, []).append(StoredTensor(shape, rows.dtype, (rows.pieces[0]._replace(start=start),)))
    return {name: _joined(name, found[name]) for name in sorted(found)}, documents[0]


def _joined(name: str, parts: Sequence[StoredTensor]) -> StoredTensor:
    """The tensor of which these have a piece each; a ValueError if it is not whole."""
    shape, dtype = parts[0].shape, parts[0].dtype
    pieces = sorted((part.pieces[0] for part in parts), key=lambda piece: piece.start)
    end = 0
    for piece in pieces:
        if piece.start != end:
            break
        end += piece.length
    else:
        if end == (shape[0] if shape else 1) and {part[:2] for part in parts} == {(shape, dtype)}:
            return StoredTensor(shape, dtype, tuple(pieces), is_shared=True)
    raise ValueError(f"{name} is not whole")
