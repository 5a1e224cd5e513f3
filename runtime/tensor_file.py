"""Safetensors files of ours: tensors and one JSON document, all of it under checksums."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

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
    layout = ((name, DTYPES[tensor.dtype], tensor.shape) for name, tensor in kept.items())
    full[HEADER] = header_checksum(layout, full)
    try:
        with atomic_path(path, alone=True) as temporary:
            metadata = {key: json.dumps(full), **(more or {})}  # mostly one entry: their order is not fixed
            save_file(kept, temporary, metadata=metadata)
    except SafetensorError as error:  # among others, of a full disk
        raise OSError(str(error)) from error


def read_tensors(
    path: Path, key: str, choose: Callable[[Json, list[str]], Iterable[str]] | None = None
) -> tuple[dict[str, Tensor], Json]:
    """Read a file of `write_tensors`, and compare its checksums; earlier versions wrote fewer of them.

    Args:
        path: Path of the file.
        key: Name of its document.
        choose: Function of the document and all names that picks those to read; None reads all.

    Returns:
        Tensors on the CPU, and the document.

    Raises:
        KeyError: If it is a safetensors file without such a document.
        ValueError: Naming the damaged part.
        OSError: If it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, sorted(file.keys())
            if key not in metadata:
                raise KeyError(key)
            document = json.loads(metadata[key])
            expected = document.pop(HEADER, None)
            slices = {name: file.get_slice(name) for name in names}
            layout = ((name, each.get_dtype(), each.get_shape()) for name, each in slices.items())
            if (expected is not None or CHECKSUMS in document) and expected != header_checksum(layout, document):
                raise ValueError("the header does not match its checksum")
            known = document.pop(CHECKSUMS, None) or json.loads(metadata.get(CHECKSUMS, "{}"))
            read = {name: file.get_tensor(name) for name in (names if choose is None else choose(document, names))}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    for name, tensor in read.items():
        if known and known.get(name) != checksum(tensor):
            raise ValueError(f"{name} does not match its checksum")
    return read, document


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bytes of a tensor on the CPU."""
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def header_checksum(layout: Iterable[tuple[str, str, Iterable[int]]], document: Mapping[str, object]) -> int:
    """CRC-32 of names, dtypes and shapes, and of the document with its checksums of tensors."""
    listed = sorted((name, dtype, list(shape)) for name, dtype, shape in layout)
    values = json.loads(json.dumps([listed, document]))  # as they are read
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())
