"""The file with the published Inception network: where it is looked for, and how it is fetched.

Scores are comparable only between evaluations that use this very file. It is not ours to ship; it is downloaded once.
"""

from __future__ import annotations

import hashlib
import os
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from runtime.errors import UserError
from runtime.files import atomic_path

FILE_NAME = "classify_image_graph_def.pb"
URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{FILE_NAME}"
SIZE = 95_673_916  # as reported by two independent listings
MD5 = "e6bb154e85f5d4331c22abcddb5dcf31"  # as reported by one project; nobody published a sha256
ENVIRONMENT = "DIT_EVAL_INCEPTION"
TIMEOUT_SECONDS = 30
CHUNK = 1 << 20


@dataclass(frozen=True)
class Weights:
    """A weight file that exists.

    Attributes:
        path: where it lies.
        sha256: of its bytes.
        doubt: why it may not be the file behind published scores; None if nothing speaks against it.
    """

    path: Path
    sha256: str
    doubt: str | None


def default_cache() -> Path:
    """The user's cache folder for this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-family"


def find_weights(given: Path | None, cache: Path, *, offline: bool) -> Path:
    """Finds the file, and downloads it into the cache if it is nowhere.

    Looks at the path given, the environment variable DIT_EVAL_INCEPTION, the working directory (where ADM puts it), and
    the cache, in this order; a path that was named and does not exist is an error.

    Args:
        given: the user's choice, or None.
        cache: folder for a download.
        offline: never download.

    Returns:
        Path of an existing file.

    Raises:
        UserError: if there is no such file and no way to get it.
    """
    named = {"--weights": given, ENVIRONMENT: os.environ.get(ENVIRONMENT)}
    for source, path in named.items():
        if path:
            if not Path(path).is_file():
                raise UserError(f"{source} {path}: there is no such file; {advice()}")
            return Path(path)
    places = [Path(FILE_NAME), cache / FILE_NAME]
    for place in places:
        if place.is_file():
            return place
    looked = f"{FILE_NAME} is neither here nor in {cache}"
    if offline:
        raise UserError(f"--offline: {looked}; {advice()}")
    try:
        return download(URL, places[-1], size=SIZE)
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"{looked}, and downloading it failed ({error}); {advice()}") from error


def advice() -> str:
    """What to do without the file."""
    named = f"{ENVIRONMENT}=PATH, or the evaluator's --weights PATH"
    return f"get it from {URL} on a machine with a network, and name it: {named}"


def download(url: str, path: Path, *, size: int | None) -> Path:
    """Fetches a file, whole or not at all, and notes its sha256 beside it.

    Args:
        url: where from.
        path: where to; folders are made.
        size: bytes that it must have; None takes what the server announces.

    Raises:
        OSError: if the network or the disk fails.
        ValueError: if it ends early or has another size.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response, atomic_path(path) as temporary:
        announced = response.headers.get("Content-Length")
        expected = size if size is not None else (int(announced) if announced else None)
        with (
            temporary.open("wb") as file,
            tqdm(total=expected, desc=path.name, unit="B", unit_scale=True, disable=None) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        received = temporary.stat().st_size
        if expected is not None and received != expected:
            raise ValueError(f"{received:,} bytes arrived, expected {expected:,}")
    _note(path).write_text(f"{digest.hexdigest()}  {path.name}\n")
    return path


def inspect_weights(path: Path) -> Weights:
    """Reads a file once, and says what is known about it.

    Raises:
        UserError: if it cannot be read, or is no longer what was downloaded.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    sha256 = hashlib.sha256(content).hexdigest()
    note = _note(path)
    if note.is_file() and note.read_text().split()[:1] != [sha256]:
        raise UserError(
            f"{path}: no longer what was downloaded (its sha256 is not the one in {note.name}); delete both"
        )
    doubt = None
    if len(content) != SIZE:
        doubt = f"{path.name} has {len(content):,} bytes; the file behind published scores has {SIZE:,}"
    elif hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5:
        doubt = f"{path.name} has not the md5 that is reported for the file behind published scores"
    return Weights(path, sha256, doubt)


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
