"""Files on object stores, named by fsspec's addresses ("s3://bucket/file"); the rest of the code has local paths.

What is read is copied into a cache folder first, by fsspec's `filecache`, which compares the store's fingerprint of a
file at every use. What is written is made in a local folder, uploaded when it is finished, and read back. Libraries of
single protocols (s3fs, gcsfs, huggingface_hub) bring credentials, prefetching and further attempts of their own.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

from filelock import FileLock

from runtime.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://")
ATTEMPTS = 4  # at one request; libraries may try more often below
WAIT_SECONDS = 1.0  # before the second attempt; twice as long before each further one
FILES_AT_A_TIME = 256
PACKAGES = {"s3": "'.[stores]'", "gs": "gcsfs", "gcs": "gcsfs"}
BLOCK = 1 << 20
_TRANSIENT = re.compile(r"Connect|Timeout|Disconnect|IncompleteRead|SlowDown")  # in names of libraries' exceptions


class Address(type(Path())):  # type: ignore[misc]  # the class of the system's paths
    """An fsspec address with the interface of a path: name, suffix, `/`, `with_name`; no file is opened by it."""

    __slots__ = ()

    def __str__(self) -> str:
        """The address, with the two slashes that a path would make one."""
        return re.sub(r"^([a-z][a-z0-9+.-]+):/+", r"\1://", super().__str__())

    @property
    def protocol(self) -> str:
        """First part, such as "s3"."""
        return str(self).partition("://")[0]


def parse_path(text: str | Path) -> Path:
    """A path, or an address; those of local files ("file://") are paths."""
    if isinstance(text, Path):
        return text
    if not ADDRESS.match(text):
        return Path(text)
    return Path(text.removeprefix("file://")) if text.startswith("file://") else Address(text)


def cache_folder() -> Path:
    """Folder of copies: $DIT_STORE_CACHE, or "stores" in the user's cache folder of this project."""
    given = os.environ.get("DIT_STORE_CACHE")
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-family" / "stores")


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def fetch(path: Path, flag: str) -> Path:
    """Copy a file, or a folder with all that is in it, into the cache, as far as it is not there; returns the copy.

    Processes of one machine copy in turn. Paths that are no addresses are returned as they are.

    Raises:
        UserError: In one line, if it is not there, or cannot be read after several attempts.
    """
    if not isinstance(path, Address):
        return path
    with one_line(path, flag, "read"):
        store, root = connect(path)
        files = attempt_request(lambda: list_files(store, root))
        if not files:
            raise FileNotFoundError
        folder = cache_folder() / path.protocol
        copy = folder / _local_name(root)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            _copy_missing(store, files, folder)
            _remove_gone(copy, {folder / _local_name(name) for name in files})
    return copy


def is_there(path: Path, flag: str) -> bool:
    """True if there is a file or folder at a path or an address; a UserError if the store does not say."""
    if not isinstance(path, Address):
        return path.exists()
    with one_line(path, flag, "read"):
        store, name = connect(path)
        return bool(attempt_request(lambda: store.exists(name)))


def connect(path: Path | str) -> tuple[AbstractFileSystem, str]:
    """The file system of an address, and the name of the file there."""
    from fsspec.core import url_to_fs  # heavy for programs that read local files

    store, name = url_to_fs(str(path))
    store.invalidate_cache()  # what another program has written since is seen
    return store, str(name)


def list_files(store: AbstractFileSystem, root: str) -> dict[str, int]:
    """Names of all files at and below a name, and their sizes in bytes."""
    info = store.info(root)
    found = {root: info} if info["type"] == "file" else store.find(root, detail=True)
    return {name: int(info["size"]) for name, info in found.items() if info["type"] == "file"}


def _local_name(name: str) -> str:
    """Path of a copy in the cache; a ValueError for a name that would lead out of it."""
    parts = [part for part in name.split("/") if part]
    if ".." in parts or "." in parts or not parts:
        raise ValueError(f"{name!r} is no name of a file that can be copied")
    return "/".join(["files", *parts])  # apart from the cache's records


def _copy_missing(store: AbstractFileSystem, files: dict[str, int], folder: Path) -> None:
    """Copy files that are not in the cache, or have changed in the store."""
    from fsspec.core import OpenFile, OpenFiles
    from fsspec.implementations.cached import WholeFileCacheFileSystem

    for name in files:
        (folder / _local_name(name)).parent.mkdir(parents=True, exist_ok=True)
    names = [*files]
    for start in range(0, len(names), FILES_AT_A_TIME):
        part = names[start : start + FILES_AT_A_TIME]

        def copy(part: list[str] = part) -> None:
            cache = WholeFileCacheFileSystem(
                fs=store,
                cache_storage=str(folder),
                cache_mapper=_local_name,
                check_files=True,
                expiry_time=0,
                skip_instance_cache=True,
            )
            with OpenFiles([OpenFile(cache, name) for name in part], mode="rb", fs=cache):
                pass

        attempt_request(copy)
        for name in part:
            size = (folder / _local_name(name)).stat().st_size
            if size != files[name]:
                raise OSError(f"{name} has {size:,} bytes here, and {files[name]:,} in the store")


def _remove_gone(copy: Path, present: set[Path]) -> None:
    """Remove copies of files that are no longer in the store's folder, and folders that are empty then."""
    for path in sorted(copy.rglob("[!.]*"), reverse=True):  # what a folder holds comes before it
        if path.is_file() and path not in present:
            path.unlink()
        elif path.is_dir():
            with suppress(OSError):  # not empty
                path.rmdir()


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def staged(path: Path) -> Path:
    """Local path where a file or folder is made that `upload` brings to an address; a local path itself."""
    if not isinstance(path, Address):
        return path
    return cache_folder() / "outputs" / hashlib.sha256(str(path).encode()).hexdigest()[:16] / str(path.name)


def check_store(path: Path, flag: str) -> None:
    """Check before any long work that a file can be written to an address, by one that is removed again.

    Raises:
        UserError: In one line, if it cannot: a read-only bucket, missing credentials, a package that is missing.
    """
    if isinstance(path, Address):
        probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
        with one_line(path, flag, "write"):
            store, name = connect(str(probe))
            attempt_request(lambda: store.pipe_file(name, b"probe"))
            attempt_request(lambda: store.rm_file(name))


def upload(local: Path, path: Path, flag: str, last: str = "") -> None:
    """Bring a finished file or folder to an address, compare sizes and digests there, and remove the local one.

    A local path is left as it is. Hidden files stay here; of a folder the file named `last` is brought last.

    Raises:
        UserError: In one line, if it cannot be written; the local one is kept, and named.
    """
    if not isinstance(path, Address):
        return
    try:
        with one_line(path, flag, "write"):
            found = [each for each in local.rglob("[!.]*") if each.is_file()] if local.is_dir() else [local]
            for each in sorted(found, key=lambda each: (each.name == last, each)):
                target = f"{path}/{each.relative_to(local).as_posix()}" if local.is_dir() else str(path)
                put(each, *connect(target))
    except UserError as error:
        raise UserError(f"{error}; it is at {local}, copy it from there") from error
    shutil.rmtree(local) if local.is_dir() else local.unlink()
    with suppress(OSError):  # others are in it
        local.parent.rmdir()


def put(local: Path, store: AbstractFileSystem, name: str) -> tuple[int, str]:
    """Upload one file, and compare it with what can be read back; returns size and SHA-256."""
    attempt_request(lambda: store.put_file(str(local), name))
    store.invalidate_cache()
    with local.open("rb") as file:
        expected = digest(file)
    if attempt_request(lambda: remote_digest(store, name)) != expected:
        raise OSError("what was read back is not what was written")
    return expected


def remote_digest(store: AbstractFileSystem, name: str) -> tuple[int, str]:
    """Size and SHA-256 of a file in a store."""
    with store.open(name, "rb") as file:
        return digest(file)


def digest(file: IO[bytes]) -> tuple[int, str]:
    """Size and SHA-256 of an open file."""
    size, total = 0, hashlib.sha256()
    while block := file.read(BLOCK):
        size += len(block)
        total.update(block)
    return size, total.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Failures


def attempt_request(request: Callable[[], T]) -> T:
    """Make a request, and repeat it while the connection fails."""
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except Exception as error:
            transient = isinstance(error, ConnectionError | TimeoutError) or _TRANSIENT.search(type(error).__name__)
            if not transient or attempt == ATTEMPTS - 1:
                raise
            time.sleep(WAIT_SECONDS * 2**attempt)
    raise AssertionError


@contextmanager
def one_line(path: Path, flag: str, verb: str) -> Iterator[None]:
    """Turn what libraries raise into one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # those of every library are others
        text, protocol = " ".join(str(error).split()) or type(error).__name__, str(path).partition("://")[0]
        if isinstance(error, FileNotFoundError):
            text = "no such file, folder or bucket"
        elif isinstance(error, ImportError):
            text = f"{text}; pip install {PACKAGES[protocol]}" if protocol in PACKAGES else text
        elif isinstance(error, PermissionError):
            text = f"no permission: {text}"
        elif "redential" in f"{type(error).__name__} {text}":
            text = f"{text}; give them in the environment or the files that the library of {protocol}:// reads"
        raise UserError(f"{flag} {path}: cannot {verb} it ({text})") from error
