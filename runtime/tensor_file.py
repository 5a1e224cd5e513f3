"""Safetensors files of ours: tensors and one JSON document, all of it under checksums."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.files import atomic_path
from runtime.json_file import Json

CHECKSUMS, HEADER = "crc32", "header_crc32"  # members of the document, and in earlier versions keys of the metadata
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    document: Mapping[str, object],
    key: str,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write a file, whole or not at all.

    Args:
        path: Path of the file.
        tensors: Name -> tensor, of a dtype in `DTYPES`.
        document: JSON values.
        key: Name of the document in the file's metadata, which tells one kind of file from another.
        more: Further metadata, for readers of other code.

    Raises:
        OSError: If it cannot be written.
    """
    kept = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}  # any order, the same bytes
    full = {**document, CHECKSUMS: {name: checksum(tensor) for name, tensor in kept.items()}}
    layout = {name: (DTYPES[tensor.dtype], tensor.shape) for name, tensor in kept.items()}
    full[HEADER] = header_checksum(layout, full)
    try:
        with atomic_path(path, alone=True) as temporary:
            metadata = {key: json.dumps(full), **(more or {})}  # mostly one entry: their order is not fixed
            save_file(kept, temporary, metadata=metadata)
    except SafetensorError as error:  # among others, of a full disk
        raise OSError(str(error)) from error


class TensorFile:
    """A safetensors file, opened when a tensor of it is first asked for; pickled, it is its path.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type[TensorFile], tuple[Path]]:
        return TensorFile, (self.path,)

    @cached_property
    def handle(self) -> Any:
        """The open file of safetensors."""
        return safe_open(self.path, framework="pt")


class Piece(NamedTuple):
    """Rows of a tensor, or all of it, in one file.

    Attributes:
        file: The file.
        name: Name in the file.
        length: Number of rows, 1 for a single number.
        start: Number of the first row in the whole tensor.
        checksum: That of the bytes; None in files of earlier versions.
    """

    file: TensorFile
    name: str
    length: int
    start: int
    checksum: int | None

    def tensor(self) -> Tensor:
        """The rows, mapped into memory: what is not looked at is not read."""
        try:
            tensor: Tensor = self.file.handle.get_tensor(self.name)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        return tensor

    def compared(self) -> Tensor:
        """The rows, compared with their checksum; a ValueError if they do not match."""
        tensor = self.tensor()
        if self.checksum is not None and self.checksum != checksum(tensor):
            raise ValueError(f"{self.name} does not match its checksum")
        return tensor


class StoredTensor(NamedTuple):
    """A tensor in one or several files, which is read when it is needed.

    Attributes:
        shape: Its shape.
        dtype: Its type.
        pieces: Where its rows are, in order.
        is_shared: True for files that every process wrote a part of, and can read.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]
    is_shared: bool = False

    def outline(self) -> Tensor:
        """A tensor without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self) -> Tensor:
        """All of it, as `all_rows`, compared with checksums; a ValueError if one does not match."""
        for piece in self.pieces:
            piece.compared()
        return self.all_rows()

    def all_rows(self) -> Tensor:
        """All of it on the CPU, mapped into memory if it is in one file, not compared with checksums."""
        return self.rows(0, self.shape[0] if self.shape else 1)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` .. `stop` - 1 on the CPU, which are not compared with checksums; a single number is one row."""
        if not self.shape:
            return self.pieces[0].tensor()
        found = [
            piece.tensor()[max(start - piece.start, 0) : stop - piece.start]
            for piece in self.pieces
            if max(start, piece.start) < min(stop, piece.start + piece.length)
        ]
        if not found:
            return torch.empty((0, *self.shape[1:]), dtype=self.dtype)
        return found[0] if len(found) == 1 else torch.cat(found)


def open_tensors(path: Path, key: str) -> tuple[dict[str, StoredTensor], Json]:
    """Open a file of `write_tensors`, and check its header; earlier versions wrote fewer checksums. No tensor is read.

    Args:
        path: Path of the file.
        key: Name of its document.

    Returns:
        The tensors by name, and the document.

    Raises:
        KeyError: If it is a safetensors file without such a document.
        ValueError: Naming the damaged part.
        OSError: If it cannot be read.
    """
    file = TensorFile(path)
    try:
        metadata = file.handle.metadata() or {}
        if key not in metadata:
            raise KeyError(key)
        slices = {name: file.handle.get_slice(name) for name in sorted(file.handle.keys())}
        layout = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    document = json.loads(metadata[key])
    expected = document.pop(HEADER, None)
    if (expected is not None or CHECKSUMS in document) and expected != header_checksum(layout, document):
        raise ValueError("the header does not match its checksum")
    known = document.pop(CHECKSUMS, None) or json.loads(metadata.get(CHECKSUMS, "{}"))
    dtypes = {name: dtype for dtype, name in DTYPES.items()}
    tensors = {}
    for name, (kind, shape) in layout.items():
        if kind not in dtypes or known and name not in known:
            raise ValueError(f"{name} is of type {kind}" if kind not in dtypes else f"{name} has no checksum")
        piece = Piece(file, name, shape[0] if shape else 1, 0, known.get(name))
        tensors[name] = StoredTensor(shape, dtypes[kind], (piece,))
    return tensors, document


def read_tensors(path: Path, key: str) -> tuple[dict[str, Tensor], Json]:
    """Read a file of `write_tensors`, as `open_tensors` opens it, and compare the checksums of its tensors."""
    stored, document = open_tensors(path, key)
    return {name: tensor.read() for name, tensor in stored.items()}, document


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a tensor on the CPU."""
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def header_checksum(layout: Mapping[str, tuple[str, Sequence[int]]], document: Mapping[str, object]) -> int:
    """CRC-32 of names, dtypes and shapes, and of the document with its checksums of tensors."""
    listed = sorted((name, dtype, list(shape)) for name, (dtype, shape) in layout.items())
    values = json.loads(json.dumps([listed, document]))  # as they are read
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
