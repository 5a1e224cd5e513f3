"""Content of files of weights by name, of any code, read without running code in them: safetensors and PyTorch's."""

from __future__ import annotations

import argparse
import collections
import hashlib
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.download import sha256_of
from runtime.errors import UserError
from runtime.files import check_utf8
from runtime.json_file import parse_json
from runtime.parts import files_of, is_sharded
from runtime.stores import fetch
from runtime.zip_checksums import PartChecksums

# Harmless classes in files of weights; everything else is refused
PLAIN_CLASSES: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
    argparse.Namespace, collections.OrderedDict, dict, list, int, float, set, str,
    (lambda *_: {}, "collections.defaultdict"),
    pathlib.PosixPath, pathlib.PurePosixPath, np.dtype, np.ndarray,
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")},
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # type: ignore[attr-defined]
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
    (np._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),  # type: ignore[attr-defined]
]  # fmt: skip
# Function of the tensors that are used: compares their checksums; False if the format has none
Compare = Callable[[Iterable[Tensor]], bool]


def file_in(path: Path, flag: str) -> Path:
    """The file of weights that a path means: itself, or the one in a folder.

    Raises:
        UserError: If there is none, or more than one.
    """
    path = fetch(path, flag)
    check_utf8(path, flag)
    if path.is_dir():
        for pattern in ("*.safetensors.index.json", "*.safetensors", "transformer/*.safetensors", "*.bin", "*.pt"):
            found = sorted(path.glob(pattern))
            if len(found) > 1:
                names = ", ".join(each.name for each in found[:3])
                raise UserError(f"{flag} {path}: is a folder; give a file in it: {names}, ...")
            if found:
                return found[0]
        runs = (file for above in ("", "*/", "*/*/") for file in path.glob(f"{above}checkpoints/*.safetensors"))
        newest = max(runs, key=lambda file: file.stat().st_mtime, default=None)
        example = "checkpoints/0050000.safetensors" if newest is None else newest.relative_to(path)
        raise UserError(f"{flag} {path}: is a folder; give a file in it, such as {example}")
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    return path


def weights_sha256(path: Path, flag: str = "--ckpt") -> str:
    """SHA-256 of the file that `read_foreign` or `read_checkpoint` reads; of several, that of all."""
    path = fetch(path, flag)
    if is_sharded(path):
        return hashlib.sha256("\n".join(map(sha256_of, files_of(path))).encode()).hexdigest()
    path = file_in(path, flag)
    digests = [sha256_of(path)]
    if path.name.endswith(".index.json"):
        names = {str(name) for name in parse_json(path.read_text())["weight_map"].values()}
        digests += [sha256_of(path.parent / name) for name in sorted(names)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_content(path: Path, where: str) -> tuple[Mapping[str, object], Compare]:
    """Read what a file holds by name, and the function that compares its checksums.

    Raises:
        UserError: If it is damaged, or something else.
    """
    head = read_head(path, where)
    if path.name.endswith(".index.json"):
        return read_shards(path, where), _nothing_to_compare
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return read_safetensors(path, where), _nothing_to_compare
    return read_pickle(path, where)


def read_head(path: Path, where: str) -> bytes:
    """First bytes of a file; a UserError for what a failed download leaves, and an OSError if it cannot be opened."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{where}: a Git LFS pointer, not the file itself; run git lfs pull, or download it again")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{where}: a web page, not a checkpoint; the address needs a login, or is not that of the file")
    return head


def read_safetensors(path: Path, where: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file; a UserError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{where}: damaged or truncated safetensors file ({error})") from error


def read_shards(index: Path, where: str) -> dict[str, Tensor]:
    """All tensors of the files that an index names; a UserError if one is missing or damaged."""
    try:
        files = parse_json(index.read_text())["weight_map"]
        names = sorted({str(name) for name in files.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not an index of safetensors files ({type(error).__name__}: {error})") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise UserError(f"{where}: {name} is missing beside it")
        tensors |= read_safetensors(shard, f"{where}: {name}")
    missing = files.keys() - tensors.keys()
    if missing:
        raise UserError(f"{where}: {min(missing)} is in none of its files")
    return tensors


def read_pickle(path: Path, where: str) -> tuple[Mapping[str, object], Compare]:
    """Content of a PyTorch file, without running code in it, and the function that compares its checksums.

    Raises:
        UserError: If it is damaged, or holds other classes than plain ones, or nothing by name.
    """
    checksums = PartChecksums(path, where) if zipfile.is_zipfile(path) else None
    try:
        with torch.serialization.safe_globals(PLAIN_CLASSES):
            # Mapped if the format allows it: a training checkpoint is four times as large as the part that is read.
            content = torch.load(
                path,
                map_location="cpu" if checksums is None else checksums.note,
                weights_only=True,
                mmap=checksums is not None,
            )
    except (pickle.UnpicklingError, RuntimeError) as error:
        if "TorchScript" in str(error):
            raise UserError(f"{where}: a TorchScript archive, not weights by name; save its state_dict()") from error
        if not isinstance(error, pickle.UnpicklingError):
            raise UserError(f"{where}: not a readable PyTorch file; truncated download? ({error})") from error
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        held = f": it holds a {named[1]}" if named else ""
        raise UserError(
            f"{where}: refused, because it is no PyTorch file of plain tensors{held} (unpickling it could run code)"
        ) from error
    except (EOFError, ValueError, OSError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{where}: not a readable PyTorch file; truncated download? ({error})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: a PyTorch file, but not one of weights by name")
    return content, _nothing_to_compare if checksums is None else checksums.compare


def _nothing_to_compare(tensors: Iterable[Tensor]) -> bool:
    return False
