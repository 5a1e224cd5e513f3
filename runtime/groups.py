"""Groups of tensors in our checkpoints: written, opened and compared with their checksums.

A checkpoint is one safetensors file, or a folder of them (`runtime.parts`). Tensor names start with their group
("model/", "ema-0.9999/", "optimizer/"); a file's metadata holds one JSON document with everything needed to rebuild the
run's network, process and data (see docs/checkpoints.md), and a checksum of every tensor. Files of earlier formats are
migrated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime import migrate
from runtime.errors import UserError
from runtime.json_file import Json
from runtime.parts import Part, files_of, is_sharded, open_parts, write_part
from runtime.tensor_file import StoredTensor, open_tensors, write_tensors
from runtime.weight_files import file_in, read_head, read_safetensors

FORMAT = 2  # of our files; runtime/migrate.py converts earlier ones
METADATA_KEY = "dit_family"


def save_checkpoint(path: Path, groups: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, object]) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: Final name, ending in ".safetensors".
        groups: Group name -> parameter name -> tensor.
        meta: JSON values.

    Raises:
        UserError: If the file cannot be written, as on a full disk; an earlier file of that name is intact.
    """
    tensors = {f"{group}/{name}": tensor for group, members in groups.items() for name, tensor in members.items()}
    with _writing(path, tensors.values()):
        write_tensors(path, tensors, meta, METADATA_KEY)


def save_part(folder: Path, number: int, count: int, parts: Mapping[str, Part], meta: Mapping[str, object]) -> None:
    """Write one file of a checkpoint in parts.

    Args:
        folder: Folder of the parts, made if it is not there.
        number: Number of the file, from 0.
        count: Number of files.
        parts: Full name, "group/parameter" -> part of the tensor.
        meta: JSON values.

    Raises:
        UserError: If the file cannot be written.
    """
    with _writing(folder, (part.tensor for part in parts.values())):
        folder.mkdir(exist_ok=True)
        write_part(folder, number, count, parts, meta, METADATA_KEY)


@contextlib.contextmanager
def _writing(path: Path, tensors: Iterable[Tensor]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        size = sum(tensor.nbytes for tensor in tensors)
        raise UserError(f"{path}: could not write {size:,} bytes ({error}); earlier checkpoints are intact") from error


def open_groups(path: Path, flag: str = "--ckpt") -> tuple[dict[str, dict[str, StoredTensor]], Json | None]:
    """Open one of our files; no tensor is read yet.

    Args:
        path: Path of a safetensors file, or of a folder of parts.
        flag: Flag in messages.

    Returns:
        Group name -> tensor name -> tensor, and the JSON document; nothing and None if the file is not ours.

    Raises:
        UserError: If the file is missing, damaged, or of a later format.
    """
    sharded = is_sharded(path)
    path = path if sharded else file_in(path, flag)
    with _reading(path, flag):
        try:
            if not sharded:
                read_head(path, f"{flag} {path}")
            stored, document = (open_parts if sharded else open_tensors)(path, METADATA_KEY)
        except KeyError as error:
            if sharded:
                raise UserError(f"{flag} {path}: holds files of other code") from error
            return {}, None
        meta, renamed = migrate.checkpoint(document)
        if meta.get("format", FORMAT) > FORMAT:
            raise UserError(f"{flag} {path}: of format {meta['format']}, this version reads up to {FORMAT}; update it")
        groups: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in stored.items():
            former = next((start for start in renamed if name.startswith(start)), "")
            group, _, rest = (renamed.get(former, "") + name.removeprefix(former)).partition("/")
            groups.setdefault(group, {})[rest] = tensor
    return groups, meta


def read_groups(
    path: Path, choose: Callable[[Sequence[str]], Sequence[str]], flag: str = "--ckpt"
) -> tuple[dict[str, dict[str, Tensor]], Json | None]:
    """Read groups of tensors from one of our files, and compare every tensor with its checksum.

    Args:
        path: Path of a safetensors file, or of a folder of parts; a file that is not ours is read as one group.
        choose: Function that picks groups from the names of those in the file.
        flag: Flag in messages.

    Returns:
        Group name -> tensor name -> tensor on the CPU, and the JSON document (None if the file is not ours).

    Raises:
        UserError: If the file is missing, damaged, or of a later format, or lacks a group.
    """
    stored, meta = open_groups(path, flag)
    if meta is None:
        path = file_in(path, flag)
        return {"weights": read_safetensors(path, f"{flag} {path}")}, None
    chosen = list(choose(list(stored)))
    check_groups(stored, chosen, f"{flag} {path}")
    with _reading(path, flag):
        return {group: {name: tensor.read() for name, tensor in stored[group].items()} for group in chosen}, meta


def check_groups(present: Collection[str], wanted: Iterable[str], where: str) -> None:
    """Check that a file has these groups.

    Raises:
        UserError: Naming the first that is missing, and those that are there.
    """
    for group in wanted:
        if group not in present:
            has = ", ".join(sorted(present)) or "nothing"
            raise UserError(f"{where}: holds no weights under {group!r}; it has: {has}")


def check_stored(
    groups: Mapping[str, Mapping[str, StoredTensor]], path: Path, flag: str, number: int = 0, count: int = 1
) -> None:
    """Compare stored tensors with their checksums, and check that they are finite; memory holds a piece at a time.

    Args:
        groups: Group name -> tensor name -> tensor.
        path: The checkpoint.
        flag: Flag in messages.
        number: Number of the first piece to look at.
        count: Distance to the next, so that as many processes can share the work.

    Raises:
        UserError: Naming the first tensor that is damaged, or has NaN or infinity.
    """
    pieces = [(group, name, piece) for group in groups for name, each in groups[group].items() for piece in each.pieces]
    for group, name, piece in pieces[number::count]:
        with _reading(path, flag):
            rows = piece.compared()
        check_finite({group: {name: rows}}, f"{flag} {path}")


@contextlib.contextmanager
def _reading(path: Path, flag: str) -> Iterator[None]:
    """One line for a damaged file; TypeError and AttributeError come of a document of another structure."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError) as error:
        kind = "damaged or incomplete checkpoint" if is_sharded(path) else "damaged or truncated safetensors file"
        raise UserError(f"{flag} {path}: {kind} ({error})") from error


def check_finite(groups: Mapping[str, Mapping[str, Tensor]], where: str) -> None:
    """Check that all numbers are finite.

    Raises:
        UserError: Naming the first tensor with NaN or infinity.
    """
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(f"{where}: {group}/{name} has NaN or infinity")


def is_ours(path: Path) -> bool:
    """True for a safetensors file with our document; damaged files count as ours if they name it."""
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        with contextlib.suppress(OSError), path.open("rb") as file:
            return METADATA_KEY.encode() in file.read(1 << 16)
        return False


def is_whole(path: Path) -> bool:
    """True if a safetensors file, or every one in a folder of parts, is as long as it says; no numbers are read."""
    if is_sharded(path):
        files = files_of(path)
        return bool(files) and files[-1].stem.endswith(f"-of-{len(files):05d}") and all(map(is_whole, files))
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
