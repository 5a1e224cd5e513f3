"""Shards of WebDataset, tar files with NAME.jpg next to NAME.cls or NAME.json, as a data set with random access.

The headers of all shards are read when the data set is opened; afterwards an image is read at its place in its shard.
Names are split at their first dot, as WebDataset does: "a/7.seg.png" is the member "seg.png" of the sample "a/7".
"""

from __future__ import annotations

import itertools
import os
import re
import tarfile
import warnings
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data.columns import LABEL, NONE, Labels, labels_of
from data.dataset import DatasetSettings
from data.folder_scan import EXTENSIONS, OTHER_IMAGES, READ, counted, is_hidden, warn_of_numbers
from data.image_folder import EncodedImages
from data.packed_names import PackedNames
from runtime.json_file import parse_json
from runtime.settings import flag_name
from runtime.stores import Address, fetch

IMAGES = {extension.removeprefix(".") for extension in EXTENSIONS}
NO_IMAGE = "without an image"
SAMPLE = re.compile(r"(?P<name>(.*/)?[^/.]+)\.(?P<kind>[^/]+)", re.DOTALL)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_SHARDS = 1_000_000
MAX_LABEL = 1 << 24  # bytes of a .cls or .json
BRACES = re.compile(r"\{([^{}]*)\}")
_THREADS = 8
_BLOCK = 1 << 20
Members = dict[str, tuple[int, int]]  # kind of a sample's member, such as "jpg" -> (offset, size) in the shard


class Shard(NamedTuple):
    """The images of a shard in the order of their files.

    Attributes:
        names: Name of each image's file.
        places: (offset, size) of each image in the shard, int64 (n, 2).
        labels: Class number or name of each; empty for data without classes.
        left_out: Samples without an image that is read, counted by the image's format, if there is one.
    """

    names: list[str]
    places: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
    labels: list[object]
    left_out: Counter[str]


def open_webdataset(settings: DatasetSettings) -> ShardImages:
    """Open shards, by default with crops of 256 x 256 pixels, mirrored at random.

    The path is a folder of .tar files, one of them, or a pattern such as "DIR/train-{0000..0146}.tar".

    Raises:
        ValueError: Naming the file that is missing or damaged, or the sample without a label.
    """
    path = settings.require_path("a folder or pattern of shards", is_pattern=True)
    for flag in ("image_column", "split"):
        if (value := getattr(settings.columns, flag)) is not None:
            raise ValueError(f"{flag_name(flag)} {value}: has no effect on shards, which have no columns and no splits")
    paths = shard_paths(path, settings.flag)
    with ThreadPoolExecutor(_THREADS) as pool:
        shards = [*pool.map(partial(read_shard, label=settings.columns.label_column), paths)]
    left_out = sum((shard.left_out for shard in shards), Counter[str]())
    if not any(shard.names for shard in shards):
        found = f" that are read, but {counted(left_out)}; {READ}" if left_out.keys() - {NO_IMAGE} else ""
        named = "; members of samples are named NAME.jpg, NAME.cls, ..."
        raise ValueError(f"{path}: its shards hold no images{found or named}")
    if left_out:
        warnings.warn(f"{path}: left out samples: {counted(left_out)}; {READ}", stacklevel=2)
    try:
        labels = labels_of([label for shard in shards for label in shard.labels])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    warn_of_numbers(path, labels.classes)
    return ShardImages(paths, shards, labels, settings)


def shard_paths(path: Path, flag: str = "--data-path") -> list[Path]:
    """The shards that a path means, in order: those of a folder by name, those of a pattern as it counts.

    Raises:
        ValueError: If there are none, one is missing, or one is compressed.
    """
    names_given = expand_braces(str(path))
    if isinstance(path, Address) and len(names_given) > 1:
        return [fetch(Address(name), flag) for name in names_given]
    path = fetch(path, flag)
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir() if not is_hidden(entry.name) and not entry.is_dir())
        found = [path / name for name in names if name.endswith(".tar")]
        packed = next((name for name in names if name.endswith(COMPRESSED)), None)
        if not found and packed is not None:
            raise ValueError(f"{path / packed}: compressed, so images in it have no places; unpack it to a .tar")
        if not found:
            raise ValueError(f"{path}: holds no .tar files")
        return found
    paths = [path] if path.exists() else [Path(name) for name in names_given]
    for each in paths:
        if each.name.endswith(COMPRESSED):
            raise ValueError(f"{each}: compressed, so images in it have no places; unpack it to a .tar")
        if not each.is_file():
            raise ValueError(f"{each}: no such file or folder")
    return paths


def expand_braces(pattern: str) -> list[str]:
    """Texts of a pattern in the order of a shell's: "a{1,2}-{08..10}" has two times three.

    Raises:
        ValueError: If there are more than `MAX_SHARDS`.
    """
    parts = BRACES.split(pattern)  # text and content of braces in turn
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_SHARDS:
        raise ValueError(f"{pattern}: means {count:,} files; at most {MAX_SHARDS:,} are opened")
    return ["".join(choice) for choice in itertools.product(*choices)]


def _choices(content: str) -> list[str]:
    """Texts of the content of braces."""
    match = re.fullmatch(r"(\d+)\.\.(\d+)", content)
    if match is None:
        return content.split(",") if "," in content else [f"{{{content}}}"]
    first, last = int(match[1]), int(match[2])
    if abs(last - first) >= MAX_SHARDS:
        raise ValueError(f"{{{content}}}: means {abs(last - first) + 1:,} files; at most {MAX_SHARDS:,} are opened")
    padded = max(len(text) for text in match.groups()) if any(t[0] == "0" and len(t) > 1 for t in match.groups()) else 0
    step = 1 if last >= first else -1
    return [f"{number:0{padded}d}" for number in range(first, last + step, step)]


def read_shard(path: Path, label: str | None) -> Shard:
    """Read the headers and labels of a shard.

    Args:
        path: The tar file.
        label: Member of the .json with the label; "none" for data without classes; None takes .cls, else "label".

    Raises:
        ValueError: Naming the shard, if it is damaged or cut short, or a sample has no label or two images.
    """
    try:
        with path.open("rb") as file:
            samples = _read_headers(file)
            chosen = {name: image for name, members in samples.items() if (image := _image_of(name, members))}
            labels = [] if label == NONE else [_read_label(file, name, samples[name], label) for name in chosen]
    except (tarfile.TarError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: not a tar file, damaged or cut short ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    places = np.array([samples[name][image] for name, image in chosen.items()], np.int64).reshape(-1, 2)
    left_out = Counter(_other_image(members) for name, members in samples.items() if name not in chosen)
    return Shard([f"{name}.{image}" for name, image in chosen.items()], places, labels, left_out)


def _read_headers(file: BinaryIO) -> dict[str, Members]:
    """Members of all samples of a shard, by the names of the samples."""
    samples: dict[str, Members] = {}
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.size < 0 or member.offset_data + member.size > length:
                raise ValueError(f"cut short in {member.name}; fetch it again")
            match = SAMPLE.fullmatch(member.name)
            if match is None or not member.isreg() or member.issparse() or any(map(is_hidden, member.name.split("/"))):
                continue
            name, kind = match["name"], match["kind"].lower()
            members = samples.setdefault(name, {})
            if kind in members:
                raise ValueError(f"holds {member.name} twice")
            members[kind] = member.offset_data, member.size
        end = archive.offset
    # tarfile takes a damaged header for the end of the archive
    file.seek(end)
    if end == length or any(any(block) for block in iter(partial(file.read, _BLOCK), b"")):
        raise ValueError("damaged or cut short: no end mark follows its last file; fetch it again")
    return samples


def _image_of(name: str, members: Members) -> str | None:
    """Kind of the member with the image of a sample; None without one."""
    kinds = sorted(IMAGES & members.keys())
    if len(kinds) > 1:
        raise ValueError(f"the sample {name} has {len(kinds)} images: {', '.join(kinds)}")
    return kinds[0] if kinds else None


def _other_image(members: Members) -> str:
    """Format of the image of a sample that is left out."""
    return next((f".{kind}" for kind in sorted(members) if f".{kind}" in OTHER_IMAGES), NO_IMAGE)


def _read_label(file: BinaryIO, name: str, members: Members, label: str | None) -> object:
    """Class number or name of a sample; a ValueError without one."""
    kind = "cls" if label is None and "cls" in members else "json"
    if kind not in members:
        needed = "neither a .cls nor a .json" if label is None else "no .json"
        raise ValueError(f"the sample {name} has {needed} with its label; --label-column {NONE} takes data without any")
    offset, size = members[kind]
    if size > MAX_LABEL:
        raise ValueError(f"{name}.{kind} has {size:,} bytes, which is no label")
    file.seek(offset)
    content = file.read(size)
    if kind == "cls":
        text = content.decode(errors="replace").strip()
        return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text
    try:
        record = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{name}.json is not JSON ({error})") from error
    column = label or LABEL
    if not isinstance(record, dict) or column not in record:
        names = ", ".join(sorted(record)) if isinstance(record, dict) else "no names"
        raise ValueError(f"{name}.json has no {column!r}; --label-column names another member of it ({names})")
    return record[column]


class ShardImages(EncodedImages):
    """The images of shards, in the order of shards and of files in them.

    Args:
        paths: The shards.
        shards: Their content.
        labels: Classes and labels of all images.
        settings: Settings of the data set.
    """

    remedy = "replace or remove it in its shard"

    def __init__(self, paths: list[Path], shards: list[Shard], labels: Labels, settings: DatasetSettings) -> None:
        root = Path(os.path.commonpath([path.parent for path in paths]))
        super().__init__(root, labels.classes, sum(len(s.names) for s in shards), settings, settings.size or (256, 256))
        self._paths, self._labels = paths, array("i", labels.values)
        self._names = PackedNames(name for shard in shards for name in shard.names)
        self._places = np.concatenate([shard.places for shard in shards])
        self._shards = np.repeat(np.arange(len(paths)), [len(shard.names) for shard in shards])

    def content(self, index: int) -> bytes:
        """Bytes of an image in its shard."""
        offset, size = self._places[index].tolist()
        with self._paths[self._shards[index]].open("rb") as file:  # workers may not share a position in a file
            file.seek(offset)
            return file.read(size)

    def path(self, index: int) -> str:
        """Name of a shard relative to the folder of all, and of the file in it: "0007.tar/cat/3.jpg"."""
        shard = self._paths[self._shards[index]].relative_to(self._root)
        return f"{shard.as_posix()}/{self._names[index]}"

    def label(self, index: int) -> int:
        """Label of an image; 0 without classes."""
        return self._labels[index] if self._labels else 0

    def sizes(self) -> Iterator[int]:
        """Sizes of all images in bytes, in their order."""
        return iter(self._places[:, 1].tolist())
