"""The Hugging Face hub, through its client: folders of weights there and back.

`HF_TOKEN` or `hf auth login` gives the token, `HF_ENDPOINT` another server, `HF_HUB_OFFLINE=1` the cache alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from runtime.download import quiet_hub
from runtime.errors import UserError
from runtime.json_file import parse_json
from runtime.pretrained import CONFIG, DOCUMENT, FOR_DIFFUSERS

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES_OF_WEIGHTS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".json"}
NEEDED = ("*.json", "*.safetensors", "vae/*", "transformer/*")  # files of a repository that are loaded
ALWAYS_THERE = {".gitattributes", "README.md"}  # that the hub or a person makes with a repository
# Files that a folder of weights may have, and an earlier one of another layout left; a person's stay
REPLACED = ("model*.safetensors", "*.index.json", CONFIG, "model_index.json", "pipeline.py", "vae/*", "transformer/*")


def is_repository(path: Path, models: Collection[str]) -> bool:
    """True for a source that is no file here and may be "owner/name" on the hub, not a misspelt file or model."""
    name = str(path)
    if REPOSITORY.fullmatch(name) is None or path.suffix in FILES_OF_WEIGHTS or path.parent.exists():
        return False
    return not get_close_matches(name.lower(), [model.lower() for model in models], cutoff=0.8)


def fetch_repository(repository: str, flag: str = "--ckpt") -> Path:
    """Return a folder with the weights of a repository, from the client's cache where it is current.

    Raises:
        UserError: If there is none, or it cannot be had.
    """
    from huggingface_hub import snapshot_download  # heavy, and only repositories need it

    with hub_errors(f"{flag} {repository}: no such file or folder, and from the hub it cannot be had"), quiet_hub():
        return Path(snapshot_download(repository, allow_patterns=list(NEEDED)))


def check_repository(repository: str, *, update: bool, flag: str = "--repo") -> None:
    """Check that a folder can be pushed to a repository, before any work; it is not made yet.

    Args:
        repository: "owner/name".
        update: A repository that holds weights of this code may be overwritten.
        flag: Flag in messages.

    Raises:
        UserError: Without a token or network, for a name that cannot be one, and for other content.
    """
    from huggingface_hub import HfApi, get_token  # heavy, and only repositories need it

    if REPOSITORY.fullmatch(repository) is None:
        raise UserError(f"{flag} {repository}: must be owner/name")
    if get_token() is None:
        raise UserError(f"{flag} {repository}: no token; set HF_TOKEN, or run: hf auth login")
    api = HfApi()
    with hub_errors(f"{flag} {repository}"), quiet_hub():
        api.whoami()
        exists = api.repo_exists(repository)
        files = set(api.list_repo_files(repository)) - ALWAYS_THERE if exists else set[str]()
        ours = any(_is_ours(repository, file) for file in files & {CONFIG, f"{FOR_DIFFUSERS}/{CONFIG}"})
    if files and not (ours and update):
        held = f"{min(files)}, ..." if len(files) > 1 else min(files)
        remedy = "give --update to replace them" if ours else "choose another name"
        kind = "weights of this code" if ours else "other content"
        raise UserError(f"{flag} {repository}: exists, with {kind} ({held}); {remedy}")


def push_folder(folder: Path, repository: str, *, private: bool = False, flag: str = "--repo") -> str:
    """Upload a folder as one commit; weights, code and configs of an earlier one that it lacks are deleted.

    Returns:
        Address of the repository.

    Raises:
        UserError: If it fails; what was there stays as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi  # heavy, and only repositories need it

    api, files = HfApi(), sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    with hub_errors(f"{flag} {repository}"), quiet_hub():
        url = api.create_repo(repository, private=private, exist_ok=True)
        there = set(api.list_repo_files(repository)) - set(names)
        former = {name for name in there if any(fnmatchcase(name, pattern) for pattern in REPLACED)}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, str(path)) for name, path in zip(names, files, strict=True)),
            *(CommitOperationDelete(name) for name in sorted(former)),
        ]
        api.create_commit(repository, operations, commit_message="Upload weights")  # one, so it is whole or absent
    return str(url)


def _is_ours(repository: str, config: str) -> bool:
    from huggingface_hub import hf_hub_download  # heavy, and only repositories need it

    try:
        return DOCUMENT in parse_json(Path(hf_hub_download(repository, config)).read_text())
    except (ValueError, TypeError):
        return False


@contextmanager
def hub_errors(where: str) -> Iterator[None]:
    """Turn an error of the hub's client into a `UserError` of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the client's, httpx's or requests', depending on its version
        status = getattr(getattr(error, "response", None), "status_code", None)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if status in (401, 403):
            reason = f"the server refuses it ({status}): is the token valid, and may it read or write there?"
        elif status == 404:
            reason = "no such repository (404), or a private one and no token for it"
        elif status is None:
            reason = f"the hub cannot be reached, or HF_HUB_OFFLINE forbids it ({reason})"
        raise UserError(f"{where}: {reason}") from error
