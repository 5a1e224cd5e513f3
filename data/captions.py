"""Captions of images and videos on disk: a JSON or CSV of them, or a .txt next to each file."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from runtime.files import read_utf8
from runtime.json_file import parse_json

BESIDE = "txt"  # value of --captions for files next to the images
PATHS, TEXTS = ("path", "file", "file_name", "video", "image"), ("caption", "text", "prompt")  # names of columns


def read_captions(source: str, root: Path, paths: Sequence[str]) -> list[str]:
    """Read the caption of each image or clip.

    Args:
        source: "txt", or the path of a .json (an object of path -> caption, or a list of objects) or a .csv with a
            header; columns or members are named as in `PATHS` and `TEXTS`.
        root: Folder of the images.
        paths: Their paths relative to it; what follows a "#" is the place of a clip in its video.

    Raises:
        ValueError: If the file cannot be read, or lacks the caption of an image; one line.
    """
    files = [path.partition("#")[0] for path in paths]
    if source == BESIDE:
        lookup: Callable[[str], str | None] = _beside(root)
    else:
        lookup = _read_table(Path(source)).get
    captions = {file: lookup(file) for file in dict.fromkeys(files)}
    missing = [file for file, caption in captions.items() if caption is None]
    if missing:
        where = f"{root / missing[0]} has no .txt" if source == BESIDE else f"no caption of {missing[0]}"
        raise ValueError(f"{where}, nor have {len(missing) - 1} others" if len(missing) > 1 else where)
    return [captions[file] or "" for file in files]


def check_captions(source: str) -> None:
    """Raise the ValueError of `read_captions` for a file that cannot be read as captions at all."""
    if source != BESIDE:
        _read_table(Path(source))


def _beside(root: Path) -> Callable[[str], str | None]:
    """Reader of the .txt of a file's name with the suffix replaced or added, as one line."""

    def read(file: str) -> str | None:
        for path in ((root / file).with_suffix(".txt"), root / f"{file}.txt"):
            if path.is_file():
                return _decoded(path).strip()
        return None

    return read


def _read_table(path: Path) -> Mapping[str, str]:
    """Captions of a JSON or CSV file by path."""
    text = read_utf8(path)
    if path.suffix.lower() == ".csv":
        return _by_path(csv.DictReader(text.splitlines()))
    if path.suffix.lower() != ".json":
        raise ValueError("must end in .json or .csv, or be txt for a .txt next to each file")
    try:
        document = parse_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if isinstance(document, dict) and all(isinstance(value, str) for value in document.values()):
        return document
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise ValueError("must be an object of path -> caption, or a list of objects with both")
    return _by_path(document)


def _by_path(rows: Iterable[Mapping[str, object]]) -> dict[str, str]:
    captions: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        file = next((row[name] for name in PATHS if row.get(name)), None)
        caption = next((row[name] for name in TEXTS if row.get(name) is not None), None)
        if not isinstance(file, str) or not isinstance(caption, str):
            raise ValueError(f"entry {number} needs a {PATHS[0]} and a {TEXTS[0]}; it has {', '.join(row)}")
        captions[file] = caption
    return captions


def _decoded(path: Path) -> str:
    try:
        return read_utf8(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
