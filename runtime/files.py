"""Atomic writing of files, and checks of places to write to."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import UserError

UMASK = os.umask(0o022)
os.umask(UMASK)


@contextmanager
def atomic_path(path: Path, *, alone: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder; that file is renamed to `path` when the block succeeds.

    The temporary name has the same suffix, because some writers choose their format by it. With `alone` it is in a
    temporary folder, for writers that put a temporary file next to theirs, as safetensors does: it can be swept.
    """
    temporary = place = _temporary(path)
    if alone:
        place.mkdir(exist_ok=True)
        temporary = place / path.name
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~UMASK)  # some writers keep others from reading it
        os.replace(temporary, path)
    finally:
        _delete(place)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to a path; it is renamed to `path`, new or empty, when the block succeeds."""
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(0o666 & ~UMASK)  # safetensors and others keep theirs private
        temporary.rename(path)
    finally:
        _delete(temporary)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")


def remove(path: Path) -> None:
    """Remove a file or a folder that may be missing; a killed process leaves no half of it under its name."""
    if path.is_dir():
        gone = _temporary(path)
        path.replace(gone)
        path = gone
    _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_utf8(path: Path) -> str:
    """Read a text file that a person wrote; a ValueError that says what is wrong, without the path."""
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin files with a mark
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"not text in UTF-8 ({error})") from error


def check_utf8(path: Path, flag: str) -> None:
    """Check that the library of checkpoints, which needs UTF-8, can open a path.

    Raises:
        UserError: Naming the flag.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag} {path}: not UTF-8, which checkpoints need; rename the folder or file") from None


def check_folder(path: Path, flag: str) -> None:
    """Check that a folder of checkpoints can be written to, or can be made, without making it.

    Raises:
        UserError: Naming the flag.
    """
    check_utf8(path, flag)
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{flag} {path}: cannot write there ({existing} is a file)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: cannot write there (no permission in {existing})")


def check_writable(path: Path, flag: str) -> None:
    """Make the folder of an output file and check that it can be written to, before any long work.

    Temporary files that killed processes left for it are removed.

    Raises:
        UserError: Naming the flag.
    """
    probe = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        remove_temporary(path)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot write there ({error.strerror})") from error
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; give a file name")


def remove_temporary(path: Path) -> None:
    """Remove temporary files that killed processes left at `path`."""
    _remove(path.parent, rf"\.{re.escape(path.stem)}\.(\d+)\.tmp{re.escape(path.suffix)}")


def sweep(folder: Path) -> None:
    """Remove all temporary files that killed processes left in a folder; the caller holds its lock."""
    _remove(folder, r"\..+\.(\d+)\.tmp(\.\w+)?")


def _remove(folder: Path, pattern: str) -> None:
    name = re.compile(pattern)
    for entry in folder.iterdir() if folder.is_dir() else ():
        match = name.fullmatch(entry.name)
        if match and (int(match[1]) == os.getpid() or not _is_running(int(match[1]))):
            _delete(entry)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return True
