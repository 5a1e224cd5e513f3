"""Locks on folders that one job writes at a time; a crash releases them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from runtime.errors import UserError
from runtime.json_file import parse_json

NAME = ".lock"


@contextmanager
def locked(folder: Path, what: str, name: str = NAME) -> Iterator[None]:
    """Hold a folder's lock while the block runs, on the process that calls it (rank 0).

    The lock is the operating system's, on a file that names its owner and stays afterwards. A block may remove it
    together with the folder: a job that opened it before then finds the lock in use.

    Args:
        folder: Existing folder.
        what: Flag and value, or the folder, in the message.
        name: Name of the file.

    Raises:
        UserError: If another job holds it, or the folder cannot be written to.
    """
    path = folder / name
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{what}: in use by {_owner(path)}; wait for it, or end it") from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{what}: cannot be locked ({error})") from error
    try:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        path.write_text(json.dumps(owner))
        yield
    finally:
        lock.release()


def _owner(path: Path) -> str:
    try:
        owner = parse_json(path.read_text())
        return f"process {owner['pid']} on {owner['host']} (started {owner['started']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
