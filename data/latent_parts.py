"""Parts of a latent store that --shard cut, and their merge into the store of one extraction, byte for byte.

A part is a folder with the manifest, its own shards, under their numbers in the store, and `part.json`, which is
written last: numbers, sizes and checksums of all of its files.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data.caption_files import NULL, text_record
from data.latent_files import (
    INDEX,
    MANIFEST,
    PART,
    Json,
    finished_shard,
    shard_files,
    write_index,
)
from data.latent_manifest import FLAGS, OF_CAPTIONS, OF_CLIPS
from runtime.download import sha256_of
from runtime.errors import UserError
from runtime.files import new_folder
from runtime.json_file import read_json, write_json
from runtime.shards import REMEDY, Part, Shard, order_parts


def index_store(folder: Path, shard_count: int) -> Json:
    """Write the index of a whole store, with the captions that its manifest names; returns it.

    Raises:
        ValueError: If a shard, or its captions, are not finished.
    """
    text = read_json(folder / MANIFEST).get("text")
    if text is None:
        return write_index(folder, shard_count)
    text = {**text, "null": text_record(folder, NULL)}
    return write_index(folder, shard_count, partial(text_record, folder), text=text)


def write_part(folder: Path, shard: Shard, numbers: Sequence[int]) -> Json:
    """Write the description of a finished part; returns it.

    Args:
        folder: Folder of the part.
        shard: Which part it is.
        numbers: Numbers of its shards in the store.

    Raises:
        ValueError: If a shard, or its captions, are not finished.
    """
    names = [f"{number:05d}" for number in numbers]
    descriptions = [finished_shard(folder, number) for number in numbers]
    paths = [folder / f"{name}{suffix}" for name in names for suffix in (".npy", ".json")]
    if "text" in read_json(folder / MANIFEST):
        paths += [folder / file for name in (*names, NULL) for file in text_record(folder, name)]
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    totals = {"count": 0, "skipped": 0}
    for description in descriptions:
        assert description is not None  # made before
        totals["count"] += description["count"]
        totals["skipped"] += len(description["skipped"])
    part = {"number": str(shard), "shards": [*numbers], **totals, "files": files}
    write_json(folder / PART, part)
    return part


def read_part(folder: Path) -> tuple[Part, Json]:
    """Read the description of a part.

    Raises:
        UserError: If it is not finished, or no part.
    """
    if not (folder / PART).is_file():
        if (folder / INDEX).exists():
            raise UserError(f"{folder}: a whole store, not made by --shard; there is nothing to merge")
        if (folder / MANIFEST).exists() or shard_files(folder):
            raise UserError(f"{folder}: not finished; {REMEDY}, which completes it")
        raise UserError(f"{folder}: no part of a latent store (no {PART})")
    try:
        part, manifest = read_json(folder / PART, REMEDY), read_json(folder / MANIFEST, REMEDY)
        shard, flags = Shard.parse(part["number"]), {**FLAGS, **OF_CLIPS, **OF_CAPTIONS}
        sizes = {name: (folder / name).stat().st_size for name in part["files"]}
        damaged = [name for name in sizes if sizes[name] != part["files"][name]["bytes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: damaged ({error}); {REMEDY}") from error
    if damaged:
        raise UserError(f"{folder / damaged[0]}: damaged, it has another size than at first; delete it, and {REMEDY}")
    settings = {f"{flags[name]} ({name})" if name in flags else name: value for name, value in manifest.items()}
    key = f"{FLAGS['encoder']} (encoder)"
    return Part(folder, shard, {**settings, key: {**manifest["encoder"], "name": None}}), part  # a folder may move


def merge_latents(folders: Sequence[Path], output: Path) -> tuple[int, int]:
    """Write the store of a whole extraction; parts are left as they are.

    Args:
        folders: Folders of all parts, in any order.
        output: New folder.

    Returns:
        Numbers of images, and of those that were left out.

    Raises:
        UserError: If the parts do not belong together, or are damaged, or their files do not fit on the disk.
    """
    read = [read_part(folder) for folder in folders]
    parts = [part.path for part in order_parts([part for part, _ in read])]
    records = {part.path: record for part, record in read}
    files = {name: (path / name, facts) for path in parts for name, facts in records[path]["files"].items()}
    needed, free = sum(facts["bytes"] for _, facts in files.values()), shutil.disk_usage(output.parent).free
    if needed > free:
        raise UserError(f"--output {output}: the latents take {needed:,} bytes, and {free:,} are free on the disk")
    if not sum(record["count"] for record in records.values()):
        raise UserError(f"{parts[0]}: none of the images of this and the other parts could be read")
    with new_folder(output) as folder:
        for name, (path, facts) in files.items():
            shutil.copyfile(path, folder / name)
            if sha256_of(folder / name) != facts["sha256"]:
                raise UserError(f"{path}: damaged, it does not match its checksum; delete it, and {REMEDY}")
        shutil.copyfile(parts[0] / MANIFEST, folder / MANIFEST)
        index = index_store(folder, sum(len(record["shards"]) for record in records.values()))
    return index["count"], index["skipped"]
