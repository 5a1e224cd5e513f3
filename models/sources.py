"""Places of weights: a file or folder, the name of a release, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from models import FAMILIES, list_models
from runtime import distributed
from runtime.download import obtain
from runtime.errors import UserError
from runtime.hub import fetch_repository, is_repository
from runtime.releases import Release, close_names, find_release, release_of_model
from runtime.stores import fetch, parse_path


class Located(NamedTuple):
    """Weights that are on this machine.

    Attributes:
        path: The file or folder.
        release: The released checkpoint that it is, if any.
        repository: "owner/name@commit" of a repository on the hub.
    """

    path: Path
    release: Release | None = None
    repository: str | None = None


def locate(source: str | Path, folder: Path, flag: str) -> Located:
    """Find the file of a source, downloaded if it is a release or a repository that is not here yet.

    Args:
        source: As for `models.loading.load_network`.
        folder: Folder of released checkpoints.
        flag: Flag in messages.

    Raises:
        UserError: If there is none of this name, or it cannot be had.
    """
    path, name = fetch(parse_path(source), flag), str(source)
    if path.exists():
        return Located(path, find_release(path.name))
    release = find_release(name)
    if release is None and name in list_models():
        release = release_of_model(name, None, FAMILIES)
    if release is None and (found := locate_repository(path, flag)) is not None:
        return found
    if release is None:
        close = close_names(name, FAMILIES)
        if close:
            raise UserError(f"{flag} {source}: no such file; released, and close to it: {', '.join(close)}")
        if path.suffix or len(path.parts) > 1:
            return Located(path)  # reading it fails with the right message
        raise UserError(
            f"{flag} {source}: no such file or folder, and no released checkpoint of this name; give a path, a name of "
            "the table of docs/sampling.md, or owner/name of a repository on the hub"
        )
    if release.family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{flag} {name}: is of the family {release.family}, which is not here yet; here: {known}")
    return Located(once_per_node(lambda: obtain(release, folder)), release)


def locate_repository(source: Path, flag: str) -> Located | None:
    """Fetch the repository that "owner/name[@revision]" names; None for other sources.

    Every process calls it.

    Raises:
        UserError: If it cannot be had.
    """
    if not is_repository(source, list_models()):
        return None
    path = once_per_node(lambda: fetch_repository(str(source), flag))
    return Located(path, repository=f"{str(source).partition('@')[0]}@{path.name}")


def once_per_node(download: Callable[[], Path]) -> Path:
    """Download on one process, then on one of each node that does not share its disk; returns the path."""
    path = distributed.on_rank0(download)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        download()
    distributed.barrier()
    return path
