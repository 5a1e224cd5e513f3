"""Checksums of zip files, and of the parts of a PyTorch file that are used."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.types import Storage

from runtime.errors import UserError

UNREADABLE = (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError)


STORAGE = re.compile(r".+/data/(\d+)")  # part with the bytes of one storage, numbered in the order of first use


class PartChecksums:
    """CRC-32 of the parts of a PyTorch file: small ones are compared at once, storages where they are used.

    A training checkpoint is four times as large as the weights that are read from it.

    Args:
        path: A zip file.
        where: Flag and file in messages.

    Raises:
        UserError: If it is damaged.
    """

    def __init__(self, path: Path, where: str) -> None:
        self._path, self._where = path, where
        self._expected: dict[int, tuple[int, int]] = {}  # number of a storage -> its bytes and CRC-32
        self._places: list[int] = []  # addresses of the storages, by number
        try:
            with zipfile.ZipFile(path) as archive:
                parts = archive.infolist()
                self._has_any = any(part.CRC for part in parts if part.file_size)
                if len({part.filename for part in parts}) < len(parts):
                    raise zipfile.BadZipFile("two parts of one name")
                for part in parts if self._has_any else ():
                    with archive.open(part) as file:  # compares the part's header with the list of parts
                        if match := STORAGE.fullmatch(part.filename):
                            self._expected[int(match[1])] = part.file_size, part.CRC
                        else:
                            file.read()
        except UNREADABLE as error:
            raise damaged(where, error) from error

    def note(self, storage: Storage, location: str) -> Storage:
        """Note where a storage is in memory, as the `map_location` of `torch.load`, which calls it once for each."""
        self._places.append(storage.data_ptr() if storage.nbytes() else 0)
        return storage

    def compare(self, tensors: Iterable[Tensor]) -> bool:
        """Compare the checksums of the storages of some tensors; False if the file was written without them.

        Raises:
            UserError: Naming the first damaged part.
        """
        if not self._has_any:
            return False
        used = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        numbers = {place: number for number, place in enumerate(self._places) if place}
        for place, storage in used.items():
            actual = storage.nbytes(), zlib.crc32(torch.tensor([], dtype=torch.uint8).set_(storage).numpy().data)
            if storage.nbytes() and self._expected.get(numbers.get(place, -1)) != actual:
                return compare_checksums(self._path, self._where)  # damaged, or numbered by another program's order
        return True


def compare_checksums(path: Path, where: str) -> bool:
    """Compare the CRC-32 of every part of a zip file; False if it was written without them.

    Raises:
        UserError: Naming the first damaged part.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(part.CRC for part in archive.infolist() if part.file_size):
                return False
            name = archive.testzip()
    except UNREADABLE as error:
        raise damaged(where, error) from error
    if name is not None:
        raise UserError(f"{where}: damaged, {name} in it does not match its checksum")
    return True


def damaged(where: str, error: Exception) -> UserError:
    """The error of a zip file that cannot be read, or has a part that cannot."""
    return UserError(f"{where}: damaged or truncated zip file ({error})")
