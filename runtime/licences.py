"""Licences of weights: those that weights inherit, and which one they may be published under.

Documents of checkpoints hold two members: "origin", the published weights that training began with, and "licence", that
of a folder that was published. Licences are identifiers of the Hugging Face hub, such as "apache-2.0".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from runtime.errors import UserError
from runtime.releases import find_release

UNKNOWN = "unknown"  # for people; None in documents
PERMISSIVE = {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "unlicense"}


class Origin(NamedTuple):
    """Weights of others that weights are, or were trained from.

    Attributes:
        name: Name of a release, or of a file or model.
        licence: Their licence; None if it is unknown.
    """

    name: str
    licence: str | None

    def as_json(self) -> dict[str, str | None]:
        """The members of a document."""
        return self._asdict()


def origin_of(path: Path, meta: Mapping[str, Any] | None) -> Origin | None:
    """Find the origin that a file of weights passes on; None for the user's own, trained from fresh weights.

    Args:
        path: The file or folder.
        meta: Document of one of our files; None for other code's.
    """
    if meta is None:
        return _of_file(path)
    if meta.get("licence") is not None:
        return Origin(meta.get("name") or meta["model"]["name"], meta["licence"])
    if "origin" in meta:
        return None if meta["origin"] is None else Origin(meta["origin"]["name"], meta["origin"]["licence"])
    start = meta.get("train", {}).get("run", {}).get("init_from")  # of checkpoints before origins were recorded
    return None if start is None else _of_file(Path(start))


def _of_file(path: Path) -> Origin:
    """A file of other code: a release by its name, or of an unknown licence."""
    release = find_release(path.name)
    return Origin(path.name, None) if release is None else Origin(release.name, release.licence)


def licence_to_publish(chosen: str | None, origin: Origin | None, flag: str = "--license") -> str:
    """Decide the licence of weights that are to be published.

    Args:
        chosen: Licence that the user gives; None for that of the origin.
        origin: Origin of the weights; None for the user's own.
        flag: Name of the setting in messages.

    Raises:
        UserError: If none is given or known, if the one given is against that of the origin, or if the authors of the
            origin do not say that others may pass their weights on.
    """
    if origin is not None and origin.licence is None and find_release(origin.name) is not None:
        raise UserError(
            f"{flag} {chosen or UNKNOWN}: the weights are, or come from, {origin.name}, which its authors released "
            "without a licence, so that only they may publish them; ask them"
        )
    if chosen is None:
        if origin is None or origin.licence is None:
            known = "your own" if origin is None else f"those of {origin.name}, of an unknown licence"
            raise UserError(f"{flag}: needed, such as apache-2.0 or cc-by-nc-4.0: the weights are {known}")
        return origin.licence
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", chosen):
        raise UserError(f"{flag} {chosen}: not an identifier of a licence, such as apache-2.0 or cc-by-nc-4.0")
    if origin is not None and origin.licence not in (None, chosen, *PERMISSIVE):
        raise UserError(
            f"{flag} {chosen}: against the licence of the weights that these are, or come from, {origin.name} "
            f"({origin.licence}); give {flag} {origin.licence}"
        )
    return chosen
