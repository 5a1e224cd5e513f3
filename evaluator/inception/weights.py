"""The weight file of the published Inception network: search and download.

Scores are comparable only between evaluations that use this file. Its licence is not ours, so it is downloaded, once.
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
SIZE = 95_673_916  # reported by two independent listings
MD5 = "e6bb154e85f5d4331c22abcddb5dcf31"  # reported by one project; no sha256 was published
ENVIRONMENT = "DIT_EVAL_INCEPTION"
TIMEOUT_SECONDS = 30
CHUNK = 1 << 20


@dataclass(frozen=True)
class Weights:
    """A weight file that exists.

    Attributes:
        path: Its path.
        sha256: Checksum of its bytes.
        warning: Reason why it may not be the file of published scores; None without one.
    """

    path: Path
    sha256: str
    warning: str | None


def default_cache() -> Path:
    """The user's cache folder for this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dit-family"


def find_weights(given: Path | None, cache: Path, *, offline: bool) -> Path:
    """Find the file, and download it into the cache if there is none.

    Places in their order: the given path, the environment variable DIT_EVAL_INCEPTION, the working directory (where ADM
    puts it), and the cache. A path that was given and does not exist is an error.

    Args:
        given: Path given by the user, or None.
        cache: Folder for a download.
        offline: Never download.

    Returns:
        Path of an existing file.

    Raises:
        UserError: If there is no such file and no way to get it.
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
    missing = f"{FILE_NAME} is neither here nor in {cache}"
    if offline:
        raise UserError(f"--offline: {missing}; {advice()}")
    try:
        return download(URL, places[-1], size=SIZE)
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"{missing}, and downloading it failed ({error}); {advice()}") from error


def advice() -> str:
    """Instructions for getting the file."""
    named = f"{ENVIRONMENT}=PATH, or the evaluator's --weights PATH"
    return f"get it from {URL} on a machine with a network, and name it: {named}"


def download(url: str, path: Path, *, size: int | None) -> Path:
    """Download a file, whole or not at all, and write its sha256 to FILE.sha256.

    Args:
        url: Address of the file.
        path: Path of the copy; folders are made.
        size: Number of bytes that it must have; None takes what the server announces.

    Raises:
        OSError: If the network or the disk fails.
        ValueError: If it ends early or has another size.
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
    _checksum_path(path).write_text(f"{digest.hexdigest()}  {path.name}\n")
    return path


def inspect_weights(path: Path) -> Weights:
    """Read a file once, and compare it with its download and with the published file.

    Raises:
        UserError: If it cannot be read, or has changed since it was downloaded.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    sha256 = hashlib.sha256(content).hexdigest()
    recorded = _checksum_path(path)
    if recorded.is_file() and recorded.read_text().split()[:1] != [sha256]:
        raise UserError(
            f"{path}: has changed since its download (its sha256 is not the one in {recorded.name}); delete both"
        )
    warning = None
    if len(content) != SIZE:
        warning = f"{path.name} has {len(content):,} bytes; the file of published scores has {SIZE:,}"
    elif hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5:
        warning = f"{path.name} does not have the md5 that is reported for the file of published scores"
    return Weights(path, sha256, warning)


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")
