"""The Hugging Face hub, through its client: folders of weights there and back.

`HF_TOKEN` or `hf auth login` gives the token, `HF_ENDPOINT` another server, `HF_HUB_OFFLINE=1` the cache alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from runtime.download import quiet_hub
from runtime.errors import UserError
from runtime.json_file import Json, parse_json
from runtime.pretrained import CONFIG, DOCUMENT, FOR_DIFFUSERS, pretrained_folder
from runtime.weight_files import file_in

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SOURCE = re.compile(rf"(?P<name>{REPOSITORY.pattern})(@(?P<revision>[\w.][\w./-]*))?")
FILES_OF_WEIGHTS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".json"}
NEEDED = ("*.json", "*.safetensors", "vae/*", "transformer/*")  # files of a repository that are loaded
CARD = "README.md"
CARD_DIGEST = "card_sha256"  # member of documents: digest of the card that was written with the weights
ALWAYS_THERE = {".gitattributes", CARD}  # that the hub or a person makes with a repository
# Files that a folder of weights may have, and an earlier one of another layout left; a person's stay
REPLACED = ("model*.safetensors", "*.index.json", CONFIG, "model_index.json", "pipeline.py", "vae/*", "transformer/*")
CONFIGS = (CONFIG, f"{FOR_DIFFUSERS}/{CONFIG}")
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")  # in Markdown


class Former(NamedTuple):
    """Content of a repository before an upload.

    Attributes:
        files: Names of all files; none of a repository that does not exist.
        card: Its README.md; None without.
        edited: That is not the text that was written with the weights.
    """

    files: frozenset[str] = frozenset()
    card: str | None = None
    edited: bool = False


def is_repository(path: Path, models: Collection[str]) -> bool:
    """True for a source that is no file here and may be "owner/name[@revision]" on the hub, not a misspelt name."""
    match = SOURCE.fullmatch(str(path))
    if match is None or path.exists():
        return False
    name = Path(match["name"])
    if name.suffix in FILES_OF_WEIGHTS or name.parent.exists():
        return False
    return not get_close_matches(str(name).lower(), [model.lower() for model in models], cutoff=0.8)


def fetch_repository(source: str, flag: str = "--ckpt") -> Path:
    """Return a folder with the weights of a repository, from the client's cache where it is current.

    Args:
        source: "owner/name", or "owner/name@revision" for a commit, tag or branch.
        flag: Flag in messages.

    Returns:
        The folder; its name is the commit.

    Raises:
        UserError: If there is none, it cannot be had, or it holds other things than weights.
    """
    match = SOURCE.fullmatch(source)
    assert match is not None  # `is_repository` checked it
    with hub_errors(f"{flag} {source}", loads=True), quiet_hub():
        folder = _snapshot(match["name"], match["revision"])
    if pretrained_folder(folder) is None:
        try:
            file_in(folder, flag)
        except UserError as error:
            raise UserError(f"{flag} {source}: no weights of this code or of diffusers in this repository") from error
    return folder


def _snapshot(name: str, revision: str | None) -> Path:
    """Folder of the cache with the files of a repository; progress is shown only if something is downloaded."""
    from huggingface_hub import HfApi, snapshot_download  # heavy, and only repositories need it
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    try:
        files = HfApi().model_info(name, revision=revision)
        needed = [
            each.rfilename for each in files.siblings or () if any(fnmatchcase(each.rfilename, n) for n in NEEDED)
        ]
        disable_progress_bars()
        folder = Path(snapshot_download(name, revision=files.sha, allow_patterns=list(NEEDED), local_files_only=True))
        if needed and all((folder / each).is_file() for each in needed):
            return folder
    except Exception:  # not here, or not reachable: the download raises the error
        pass
    finally:
        if shown:
            enable_progress_bars()
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(NEEDED)))


def check_repository(
    repository: str, *, update: bool, card: Literal["keep", "new"] | None = None, flag: str = "--repo"
) -> Former:
    """Check that a folder can be pushed to a repository, before any work; it is not made yet.

    Args:
        repository: "owner/name".
        update: A repository that holds weights of this code may be overwritten.
        card: Treatment of a card that was edited there; None refuses it.
        flag: Flag in messages.

    Returns:
        What is there.

    Raises:
        UserError: Without a token or network, for another owner's name, and for other content.
    """
    from huggingface_hub import HfApi, get_token  # heavy, and only repositories need it

    if REPOSITORY.fullmatch(repository) is None:
        raise UserError(f"{flag} {repository}: must be owner/name")
    if get_token() is None:
        raise UserError(f"{flag} {repository}: no token; set HF_TOKEN, or run: hf auth login")
    api, former, ours = HfApi(), Former(), False
    with hub_errors(f"{flag} {repository}"), quiet_hub():
        who = api.whoami()
        owners = [who["name"], *(each["name"] for each in who.get("orgs") or ())]
        if repository.partition("/")[0] not in owners:
            raise UserError(f"{flag} {repository}: the token may publish for {' or '.join(owners)} alone")
        if api.repo_exists(repository):
            former, ours = _read_former(repository, frozenset(api.list_repo_files(repository)))
    files = former.files - ALWAYS_THERE
    if files and not (ours and update):
        held = f"{min(files)}, ..." if len(files) > 1 else min(files)
        remedy = "give --update to replace them" if ours else "choose another name"
        kind = "weights of this code" if ours else "other content"
        raise UserError(f"{flag} {repository}: exists, with {kind} ({held}); {remedy}")
    if former.edited and card is None:
        raise UserError(
            f"{flag} {repository}: its {CARD} was edited there; give --card keep to leave it as it is, "
            "or --card new to replace it"
        )
    return former


def _read_former(repository: str, files: frozenset[str]) -> tuple[Former, bool]:
    """Read the content of a repository; returns it, and True for weights of this code."""
    from huggingface_hub import hf_hub_download  # heavy, and only repositories need it

    def read(name: str) -> str:
        return Path(hf_hub_download(repository, name)).read_text()

    documents: list[Json] = []
    for config in files & set(CONFIGS):
        with_ours = _document(read(config))
        documents += [] if with_ours is None else [with_ours]
    card = read(CARD) if CARD in files else None
    edited = card is not None and all(each.get(CARD_DIGEST) != card_digest(card) for each in documents)
    return Former(files, card, edited), bool(documents)


def _document(text: str) -> Json | None:
    try:
        document = parse_json(text)[DOCUMENT]
    except (ValueError, TypeError, KeyError):
        return None
    return document if isinstance(document, dict) else None


def card_digest(text: str) -> str:
    """SHA-256 of a card, by which an edit on the hub is found."""
    return hashlib.sha256(text.encode()).hexdigest()


def push_folder(
    folder: Path,
    repository: str,
    *,
    former: Former,
    changed: Mapping[str, str] | None = None,
    left_out: Collection[str] = (),
    private: bool = False,
    flag: str = "--repo",
) -> str:
    """Upload a folder as one commit; weights, code, configs and pictures of an earlier one that it lacks are deleted.

    Args:
        folder: The folder; its hidden files stay here.
        repository: "owner/name".
        former: From `check_repository`.
        changed: Texts that take the place of those in the folder, by the name of their file.
        left_out: Names of files that are not uploaded; with the card among them, the former one and its pictures stay.
        private: Make a new repository private.
        flag: Flag in messages.

    Returns:
        Address of the repository.

    Raises:
        UserError: If it fails; what was there stays as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi  # heavy, and only repositories need it

    api, changed = HfApi(), changed or {}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hidden = {name for name in files if any(part.startswith(".") for part in name.split("/"))}
    names = [name for name in files if name not in {*left_out, *hidden}]
    shown = set() if former.card is None or CARD not in names else set(PICTURE.findall(former.card))
    gone = {
        name
        for name in former.files.difference(files)
        if name in shown or any(fnmatchcase(name, pattern) for pattern in REPLACED)
    }
    with hub_errors(f"{flag} {repository}"), quiet_hub():
        url = api.create_repo(repository, private=private, exist_ok=True)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(
                CommitOperationAdd(name, changed[name].encode() if name in changed else str(files[name]))
                for name in names
            ),
            *(CommitOperationDelete(name) for name in sorted(gone)),
        ]
        api.create_commit(repository, operations, commit_message="Upload weights")  # one, so it is whole or absent
    return str(url)


def latest_commit(repository: str, flag: str = "--repo") -> str:
    """Identifier of a repository's latest commit, as "owner/name@COMMIT" takes it."""
    from huggingface_hub import HfApi  # heavy, and only repositories need it

    with hub_errors(f"{flag} {repository}"), quiet_hub():
        return str(HfApi().repo_info(repository).sha)


@contextmanager
def hub_errors(where: str, *, loads: bool = False) -> Iterator[None]:
    """Turn an error of the hub's client into a `UserError` of one line.

    Args:
        where: Flag and name, the start of the message.
        loads: Weights are loaded, from the hub or its cache, and may be in a file or folder instead.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client's, httpx's or requests', depending on its version
        raise UserError(f"{where}: {_reason(error, loads)}") from error


def _reason(error: Exception, loads: bool) -> str:
    """Reason of a failure of the client, and the remedy."""
    from huggingface_hub import constants, get_token  # heavy, and only repositories need it
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = getattr(getattr(error, "response", None), "status_code", None)
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    first = lines[0] if lines else type(cause).__name__
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision; its page lists the commits"
    if isinstance(error, GatedRepoError):
        return "its authors ask for consent first: give it on the page of the repository, with the account of the token"
    if isinstance(error, RepositoryNotFoundError) or status == 404 or status == 401 and get_token() is None:
        absent = "no such file or folder, and no such repository" if loads else "no such repository"
        return f"{absent} on the hub, or a private one and no token for it"
    if status == 401:
        return "the server refuses the token (401); is it valid?"
    if status == 403:
        return "the server refuses it (403); may the token read or write there?"
    outside = type(error).__module__.startswith(("httpx", "requests", "httpcore"))
    reached = not (outside or isinstance(error, LocalEntryNotFoundError | ConnectionError | TimeoutError))
    if status is not None or reached:
        return first
    offline = constants.HF_HUB_OFFLINE or isinstance(cause, OfflineModeIsEnabled)
    barrier = "HF_HUB_OFFLINE is set" if offline else f"the hub at {constants.ENDPOINT} cannot be reached ({first})"
    if loads:
        return f"not in the cache, and {barrier}; load it once with a network, or give a folder"
    return f"{barrier}; this needs a network"
