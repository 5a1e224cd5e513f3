"""Merge of sampling jobs that were cut by --shard: the .npz of one job, byte for byte, from those of its parts."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from data.npz_file import NpzFile, Piece
from data.sample_file import LISTING, SHARD
from runtime.download import sha256_of
from runtime.errors import UserError
from runtime.files import atomic_path, new_folder, remove, remove_temporary
from runtime.json_file import Json, parse_json
from runtime.shards import REMEDY, Part, Shard, order_parts

ROWS = 256  # copied at a time


def read_record(path: Path) -> tuple[Part, Json]:
    """Read the JSON next to a part.

    Raises:
        UserError: If the part is not finished, or the file is no part.
    """
    if path.with_name(f"{path.stem}.partial").exists() or path.suffix == ".partial":
        raise UserError(f"{path}: not finished; {REMEDY}, which completes it")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        record = parse_json(path.with_suffix(".json").read_bytes())
        shard, settings = Shard.parse(record[SHARD]["number"]), dict(record[SHARD]["settings"])
        config, _, _ = record["config"]["job"], record["run"], record["sha256"]
        assert isinstance(config, dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path}: no part of a sampling job: {path.stem}.json next to it names no shard") from error
    return Part(path, shard, settings), record


def merge_samples(paths: Sequence[Path], output: Path) -> int:
    """Write the .npz of a job, its JSON, its prompts and its files of single samples; parts are left as they are.

    Args:
        paths: The .npz files of all parts, in any order.
        output: Path of the .npz.

    Returns:
        Number of samples.

    Raises:
        UserError: If the parts do not belong together, or are damaged, or something is at the output.
    """
    if output.suffix != ".npz":
        raise UserError(f"--output {output}: must end in .npz")
    read = [read_record(path) for path in paths]
    parts = [part.path for part in order_parts([part for part, _ in read])]
    records = {part.path: record for part, record in read}
    singles = [each for path in parts if path.with_suffix("").is_dir() for each in path.with_suffix("").iterdir()]
    listings = [path.with_suffix(LISTING) for path in parts if path.with_suffix(LISTING).exists()]
    ends = [".npz", ".json", *([LISTING] if listings else []), *([""] if singles else [])]
    document = json.dumps(_describe([records[path] for path in parts], output), indent=2) + "\n"
    if not output.exists() and _reads(output.with_suffix(".json"), document):
        for end in ends:  # the JSON gets its name first: a merge of these parts was killed before the last one
            remove(output.with_suffix(end))
    for path in map(output.with_suffix, ends):
        if path.exists():
            raise UserError(f"--output {path}: exists already; choose another name, or move it")
        remove_temporary(path)
    for path in parts:
        if sha256_of(path) != records[path]["sha256"]:
            raise UserError(f"{path}: damaged, it does not match its checksum; delete it, and {REMEDY}")
    needed, free = sum(path.stat().st_size for path in (*parts, *singles)), shutil.disk_usage(output.parent).free
    if needed > free:
        raise UserError(f"--output {output}: the samples take {needed:,} bytes, and {free:,} are free on the disk")
    with ExitStack() as held:  # renamed together, the .npz last and the JSON first
        npz = held.enter_context(atomic_path(output))
        total = _join(parts, npz)
        if listings:
            text = held.enter_context(atomic_path(output.with_suffix(LISTING)))
            text.write_bytes(b"".join(path.read_bytes() for path in listings))
        if singles:
            folder = held.enter_context(new_folder(output.with_suffix("")))
            for path in singles:
                shutil.copyfile(path, folder / path.name)
        held.enter_context(atomic_path(output.with_suffix(".json"))).write_text(document)
    return total


def _reads(path: Path, text: str) -> bool:
    """True for a file of this text."""
    try:
        return path.read_text() == text
    except (OSError, ValueError):
        return False


def _join(parts: Sequence[Path], target: Path) -> int:
    """Write the arrays of all parts one after the other; returns the number of rows."""
    labels, shapes = [], []
    for path in parts:
        with np.load(path, allow_pickle=False) as file:
            labels += [file["arr_1"]] if "arr_1" in file.files else []
        with _open_images(path) as (shape, _):
            shapes.append(shape)
    npz, start, pieces = NpzFile(target, (sum(shape[0] for shape in shapes), *shapes[0][1:])), 0, list[Piece]()
    npz.create()
    for path in parts:
        with _open_images(path) as (shape, stream):
            for first in range(0, shape[0], ROWS):
                count = min(ROWS, shape[0] - first)
                rows = np.frombuffer(stream.read(count * npz.row_bytes), np.uint8).reshape(count, *shape[1:])
                pieces.append(npz.write(start + first, rows))
        start += shape[0]
    npz.seal(pieces, {"arr_1": np.concatenate(labels)} if labels else {})
    return start


@contextmanager
def _open_images(path: Path) -> Iterator[tuple[tuple[int, ...], IO[bytes]]]:
    """Open `arr_0`; yields its shape, and a stream of its bytes."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as stream:
        np.lib.format.read_magic(stream)
        shape, _, _ = np.lib.format.read_array_header_1_0(stream)
        yield shape, stream


def _describe(records: Sequence[Json], output: Path) -> Json:
    """The JSON of the whole job, with the runs of all parts."""
    record = {name: value for name, value in records[0].items() if name not in (SHARD, "sha256", "run")}
    record["config"]["job"] |= {"output": str(output), SHARD: None}
    return {**record, "run": {"shards": [each["run"] for each in records]}}
