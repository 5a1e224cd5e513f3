"""Downloads of large files: resumed after an interruption, checked, and whole or absent under their final name."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, TypedDict

from tqdm import tqdm

from runtime.errors import UserError, error_prefix
from runtime.json_file import read_json, write_json
from runtime.releases import Release

BLOCK = 1 << 20
ATTEMPTS = 4  # attempts in a row without progress
TIMEOUT_SECONDS = 30
SIZE_TOLERANCE = 0.03  # sizes in the table are rounded


class Record(TypedDict):
    """Source, size and checksum of a download."""

    source: str
    bytes: int
    sha256: str


class DownloadError(Exception):
    """A failed download, with its reason; the part that arrived is kept for the next attempt."""


def obtain(release: Release, folder: Path, say: Callable[[str], None] = print) -> Path:
    """Return the path of a release's file, and download it first if it is missing.

    Args:
        release: The release.
        folder: Folder of downloads.
        say: Receives messages.

    Returns:
        Its path. FILE.json next to it holds source, size and SHA-256 of the download.

    Raises:
        UserError: If it cannot be downloaded, with its address and the place for it; if its hash differs from the one
            in the table, or its size from that of the download.
    """
    path = folder / release.file
    if path.is_file():
        _check_size(path)
        return path
    size = f"{release.gigabytes:.2f} GB" if release.gigabytes else "size unknown"
    say(f"Downloading {release.address} ({size}) to {path}")
    is_new = not folder.exists()
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise DownloadError("HF_HUB_OFFLINE forbids it")
        folder.mkdir(parents=True, exist_ok=True)
        if release.hub is None:
            download(release.address, path, gigabytes=release.gigabytes)
        else:
            download_from_hub(*release.hub, path)
    except (DownloadError, OSError) as error:
        if is_new:
            with suppress(OSError):  # not empty: the part that arrived is in it
                folder.rmdir()
        reason = " ".join(str(error).split())
        raise UserError(
            f"--ckpt {release.name}: cannot download it ({reason}); fetch {release.address} by other means "
            f"and put it at {path}"
        ) from error
    digest = sha256_of(path)
    if release.sha256 not in (None, digest):
        path.unlink()
        raise UserError(
            f"--ckpt {release.name}: the file from {release.address} has SHA-256 {digest}, not {release.sha256}; "
            "it was deleted"
        )
    record: Record = {"source": release.address, "bytes": path.stat().st_size, "sha256": digest}
    write_json(record_path(path), record)
    say(f"Downloaded {path.name}, SHA-256 {digest}")
    return path


def record_path(path: Path) -> Path:
    """Path of the record of a download."""
    return path.with_name(f"{path.name}.json")


def read_record(path: Path) -> Record | None:
    """Read the record of a download; None for files that were not downloaded here.

    Raises:
        UserError: If the record is damaged.
    """
    file = record_path(path)
    if not file.is_file():
        return None
    with error_prefix("--ckpt"):
        document = read_json(file, f"delete it and {path.name} to download it again, or it alone to use {path.name}")
    if document.keys() != Record.__annotations__.keys():
        return None  # of another program
    return Record(source=document["source"], bytes=document["bytes"], sha256=document["sha256"])


def _check_size(path: Path) -> None:
    record = read_record(path)
    if record is not None and record["bytes"] != path.stat().st_size:
        raise UserError(
            f"--ckpt {path}: has {path.stat().st_size:,} bytes, and had {record['bytes']:,} when it was downloaded; "
            "delete it to download it again"
        )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: Path, *, gigabytes: float | None = None, pause: float = 1.0) -> None:
    """Download one file under a temporary name, and resume an earlier attempt.

    Args:
        url: Address (http or https).
        path: Final name. The part that has arrived is in FILE.part, the server's tag of the file in FILE.part.tag; both
            are removed if nothing arrived.
        gigabytes: Approximate size; a login page is not a checkpoint.
        pause: Seconds before the second attempt; doubled for each further one.

    Raises:
        DownloadError: If the server cannot be reached, has no such file, repeatedly breaks off, or offers a file of
            another size; or if another process is downloading the same file.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(f"another process is downloading it to {part}") from None
        tag = part.with_name(f"{part.name}.tag")
        try:
            _fetch_whole(url, file, part, path.name, gigabytes, pause)
        except DownloadError:
            if not file.seek(0, os.SEEK_END):
                part.unlink()
                tag.unlink(missing_ok=True)
            raise
        file.flush()
        os.fsync(file.fileno())
        os.replace(part, path)
    tag.unlink(missing_ok=True)


def _fetch_whole(url: str, file: BinaryIO, part: Path, name: str, gigabytes: float | None, pause: float) -> None:
    """Append the missing bytes, with new attempts as long as there is progress."""
    failures = 0
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            _fetch(url, file, part.with_name(f"{part.name}.tag"), name, gigabytes)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # no further bytes: the part is whole, or of another file
                if before == _whole_size(error):
                    return
                file.truncate(0)
            elif error.code < 500:
                raise DownloadError(f"the server says {error.code} {error.reason}") from error
            reason = f"the server says {error.code} {error.reason}"
        except (OSError, EOFError, HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        have = file.seek(0, os.SEEK_END)
        failures = 0 if have > before else failures + 1
        if failures >= ATTEMPTS:
            kept = f"; {have:,} bytes are in {part}, and the same command resumes" if have else ""
            raise DownloadError(reason + kept)
        time.sleep(pause * 2**failures)


def _whole_size(error: urllib.error.HTTPError) -> int | None:
    """Size of the server's file, from its answer to a range outside the file: "bytes */1234"."""
    _, _, size = error.headers.get("Content-Range", "").rpartition("/")
    return int(size) if size.isdigit() else None


def _fetch(url: str, file: BinaryIO, tag_path: Path, name: str, gigabytes: float | None) -> None:
    """Append the missing bytes; EOFError if the connection ends early."""
    have = file.seek(0, os.SEEK_END)
    tag = tag_path.read_text() if tag_path.is_file() else ""
    headers = {"User-Agent": "dit-family", "Accept-Encoding": "identity"}
    if have and tag:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}  # a file that has changed is sent from its start
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS) as response:
        if response.status != 206:
            have = 0
            file.truncate(0)
        length = response.headers.get("Content-Length")
        if length is None:
            raise DownloadError("the server does not say how large it is")
        total = have + int(length)
        if gigabytes is not None and abs(total / (gigabytes * 1e9) - 1) > SIZE_TOLERANCE:
            file.truncate(0)
            raise DownloadError(f"the server offers {total:,} bytes, not about {gigabytes} GB")
        free = shutil.disk_usage(tag_path.parent).free
        if total - have > free:
            raise DownloadError(f"{total - have:,} bytes are missing, and {free:,} are free on the disk")
        tag_path.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
        with tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=name, disable=None) as bar:
            while block := response.read(BLOCK):
                file.write(block)
                have += len(block)
                bar.update(len(block))
    if have < total:
        raise EOFError(f"the connection ended after {have:,} of {total:,} bytes")


def download_from_hub(repository: str, pattern: str, path: Path) -> None:
    """Download one file of a repository on the Hugging Face hub, by the hub's client.

    Args:
        repository: "owner/name".
        pattern: Path of the file in the repository, or a pattern of one file.
        path: Final name.

    Raises:
        DownloadError: If it cannot be downloaded, or no file or several match the pattern.
    """
    from huggingface_hub import HfApi, hf_hub_download  # heavy, and only downloads need it

    staging = path.with_name(f".{path.name}.hub")  # in the same folder, so that the last step is a rename
    try:
        name = pattern
        if "*" in pattern:
            with quiet_hub():
                files = HfApi().list_repo_files(repository)
            matching = [name for name in files if fnmatchcase(name, pattern)]
            if len(matching) != 1:
                raise DownloadError(f"{len(matching)} files match {pattern}: {', '.join(matching) or 'none'}")
            name = matching[0]
        with quiet_hub():
            fetched = hf_hub_download(repository, name, local_dir=staging)
    except DownloadError:
        raise
    except Exception as error:  # the client's, httpx's or requests', depending on its version
        if not any(part.stat().st_size for part in staging.rglob("*.incomplete")):
            shutil.rmtree(staging, ignore_errors=True)  # only locks; the client resumes from a part with bytes
        raise DownloadError((str(error) or type(error).__name__).splitlines()[0]) from error
    os.replace(fetched, path)
    shutil.rmtree(staging)


def why_not_loaded(source: str, error: Exception) -> str:
    """Say in one line why a library could not load a folder or a repository, as the end of a message.

    Args:
        source: Folder, or name of a repository on the hub.
        error: What the library raised; a config of other code fails in many ways.
    """
    hint = "" if Path(source).is_dir() else " from cache or hub; without network download it and give its folder"
    return f"{hint} ({(str(error).strip() or type(error).__name__).splitlines()[0]})"


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence the hub's client about retries and deprecations; errors are reported here, in one line."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity  # heavy, and only downloads need it

    level = get_verbosity()
    set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        set_verbosity(level)
