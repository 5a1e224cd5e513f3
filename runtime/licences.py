"""Licences of weights: those that weights inherit, and which one they may be published under.

Documents of checkpoints hold two members: "origin", the published weights that training began with, and "licence", that
of a folder that was published. Licences are identifiers of the Hugging Face hub, such as "apache-2.0".
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from runtime.errors import UserError
from runtime.json_file import Json
from runtime.releases import find_release

UNKNOWN = "unknown"  # for people; None in documents
# Identifiers that the hub knows; "other" is one of them
IDENTIFIERS = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unlicense
    wtfpl zlib
    """.split()
)
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


def origin_of(path: Path, meta: Json | None, repository: str | None = None) -> Origin | None:
    """Find the origin that a file of weights passes on; None for the user's own, trained from fresh weights.

    A published folder is an origin by its name on the hub; one that was never there is the user's own, and passes on
    its own origin.

    Args:
        path: The file or folder.
        meta: Document of one of our files; None for other code's.
        repository: Repository that it was loaded from, "owner/name@commit"; None for files.
    """
    loaded = None if repository is None else repository.partition("@")[0]
    if meta is None:
        return _of_file(path) if loaded is None else Origin(loaded, None)
    name = loaded or str(meta.get("name", ""))
    if "name" in meta and "/" in name:
        return Origin(name, meta.get("licence"))
    if "origin" in meta:
        return None if meta["origin"] is None else Origin(meta["origin"]["name"], meta["origin"]["licence"])
    start = meta.get("train", {}).get("run", {}).get("init_from")  # of checkpoints before origins were recorded
    return None if start is None else _of_file(Path(start))


def origin_to_name(origin: Origin | None, meta: Json | None, name: str) -> Origin | None:
    """Origin that a card of this name gives: for a copy of weights by the same owner, the one that those have.

    Args:
        origin: From `origin_of`.
        meta: Document that it was found in.
        name: Name of the repository or folder that the card is for.
    """
    if origin is None or meta is None or "name" not in meta:
        return origin
    if "/" in name and origin.name.partition("/")[0] == name.partition("/")[0]:
        passed_on = meta.get("origin")
        return None if passed_on is None else Origin(passed_on["name"], passed_on["licence"])
    return origin


def hub_name(origin: Origin) -> str | None:
    """Repository of an origin on the hub, for the card's `base_model`; None if it is not there."""
    if "/" in origin.name:
        return origin.name
    release = find_release(origin.name)
    return None if release is None or release.hub is None else release.hub[0]


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
    if chosen not in IDENTIFIERS:
        close = ", ".join(get_close_matches(chosen.lower(), sorted(IDENTIFIERS))) or "apache-2.0, cc-by-nc-4.0"
        raise UserError(f"{flag} {chosen}: not an identifier that the hub knows; did you mean {close}? Or give other")
    if origin is not None and origin.licence not in (None, chosen, *PERMISSIVE):
        raise UserError(
            f"{flag} {chosen}: against the licence of the weights that these are, or come from, {origin.name} "
            f"({origin.licence}); give {flag} {origin.licence}"
        )
    return chosen
