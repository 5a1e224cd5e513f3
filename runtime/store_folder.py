"""A folder on an object store, file by file: what is written is compared, what is read is checked against a digest."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from runtime.files import atomic_path
from runtime.stores import Address, attempt_request, connect, digest, list_files, one_line, put


class Digest(NamedTuple):
    """Size in bytes, and SHA-256, of a file."""

    size: int
    sha256: str


class StoreFolder:
    """Files below an address. Every method raises a UserError, in one line, if the store fails.

    Args:
        address: The folder; it need not be there.
        flag: Flag in messages.
    """

    def __init__(self, address: Address, flag: str) -> None:
        self.address, self._flag = address, flag

    def names(self, below: str = "") -> list[str]:
        """Names of all files in the folder, or in one below it, relative to the folder."""
        with one_line(self.address, self._flag, "read"):
            store, root = connect(self.address)
            try:
                found = attempt_request(lambda: list_files(store, f"{root}/{below}".rstrip("/")))
            except FileNotFoundError:
                return []
            return sorted(name.removeprefix(root).lstrip("/") for name in found)

    def read(self, name: str) -> bytes | None:
        """Content of a file; None if there is none."""
        with one_line(self.address / name, self._flag, "read"):
            store, path = connect(self.address / name)
            try:
                content: bytes = attempt_request(lambda: store.cat_file(path))
            except FileNotFoundError:
                return None
            return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with one_line(self.address / name, self._flag, "write"):
            store, path = connect(self.address / name)
            attempt_request(lambda: store.pipe_file(path, content))
            if attempt_request(lambda: store.cat_file(path)) != content:
                raise OSError("what was read back is not what was written")

    def upload(self, local: Path, name: str) -> Digest:
        """Bring a finished file, and compare what can be read back."""
        with one_line(self.address / name, self._flag, "write"):
            return Digest(*put(local, *connect(self.address / name)))

    def download(self, name: str, local: Path, expected: Digest) -> None:
        """Copy a file, unless it is there already; it gets its name once it is whole and has the digest."""
        if local.is_file() and local.stat().st_size == expected.size and digest_of(local) == expected:
            return
        with one_line(self.address / name, self._flag, "read"):
            store, path = connect(self.address / name)
            local.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(local) as temporary:
                attempt_request(lambda: store.get_file(path, str(temporary)))
                if digest_of(temporary) != expected:
                    raise OSError("it is damaged: its SHA-256 is not the one that was recorded")

    def rename(self, name: str, new: str) -> None:
        """Give a file another name; nothing happens if it is not there."""
        with one_line(self.address / name, self._flag, "write"):
            store, path = connect(self.address / name)
            target = path.removesuffix(name) + new
            with suppress(FileNotFoundError):
                attempt_request(lambda: store.copy(path, target))
                attempt_request(lambda: store.rm_file(path))

    def remove(self, name: str) -> None:
        """Remove a file that may be missing."""
        with one_line(self.address / name, self._flag, "write"):
            store, path = connect(self.address / name)
            with suppress(FileNotFoundError):
                attempt_request(lambda: store.rm_file(path))

    def check_writable(self) -> None:
        """Check before any long work that a file can be written, by one that is removed again."""
        probe = f".{os.getpid()}.probe"
        self.write(probe, b"probe")
        self.remove(probe)


def digest_of(path: Path) -> Digest:
    """Size and SHA-256 of a local file."""
    with path.open("rb") as file:
        return Digest(*digest(file))
