"""JSON files of ours, with a checksum of the rest under one key. Those of earlier versions have none."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.files import atomic_path

KEY = "crc32"
Json = dict[str, Any]  # a JSON object


def write_json(path: Path, document: Mapping[str, object], indent: int | None = 2) -> None:
    """Write a document and its checksum, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({**document, KEY: _checksum(document)}, indent=indent) + "\n")


def read_json(path: Path, remedy: str = "") -> Json:
    """Read a document, without its checksum.

    Args:
        path: Path of the file.
        remedy: End of messages.

    Raises:
        ValueError: In one line, if it is not a JSON object, or is not what was written.
        OSError: If it cannot be read.
    """
    end = f"; {remedy}" if remedy else ""
    try:
        document = parse_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}){end}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: not a JSON object{end}")
    if not is_intact(document):
        raise ValueError(f"{path}: edited or damaged, it does not match its checksum{end}")
    return {name: value for name, value in document.items() if name != KEY}


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of other origin.

    Raises:
        ValueError: If it is none, names a member twice, or is nested so deeply that Python cannot follow.
    """
    try:
        return json.loads(text, object_pairs_hook=_members)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def json_lines(path: Path) -> Iterator[tuple[str, Json | None]]:
    """Read a file of one JSON object a line, such as metrics.jsonl, whatever a kill or an editor made of it.

    Args:
        path: Path of the file.

    Yields:
        Each line that is not blank, and its object; None for a damaged one.

    Raises:
        OSError: If it cannot be read.
    """
    for line in path.read_text("utf-8-sig", errors="replace").splitlines():
        if line.strip():
            try:
                record = parse_json(line)
            except ValueError:
                record = None
            yield line, record if isinstance(record, dict) else None


def _members(pairs: list[tuple[str, object]]) -> Json:
    """Members of an object; without this the last one of a name would count, and the others be ignored."""
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
    return members


def is_intact(document: Mapping[str, object]) -> bool:
    """True if a document matches its checksum, or has none."""
    return KEY not in document or document[KEY] == _checksum(document)


def _checksum(document: Mapping[str, object]) -> int:
    rest = json.dumps({name: value for name, value in document.items() if name != KEY})
    return zlib.crc32(json.dumps(json.loads(rest), sort_keys=True).encode())
