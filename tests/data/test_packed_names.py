"""Names in one buffer: the list that they stand for, in a fraction of its memory."""

import itertools
import os
import pickle
import sys
from pathlib import Path

import pytest

from data.folder_scan import scan
from data.image_folder import EncodedImages, ImageFolder
from data.packed_names import PackedNames
from tests.data.test_webdataset import opened
from tests.image_sources import encoded, write_tar

NAMES = ["a/1.png", "", "caf\u00e9 \U0001f600.jpg", os.fsdecode(b"caf\xe9.png"), "a/1.png", "\n"]


def test_names_are_those_of_the_list() -> None:
    packed = PackedNames(NAMES)
    assert [*packed] == NAMES and [*pickle.loads(pickle.dumps(packed))] == NAMES
    assert [packed[i] for i in range(-len(NAMES), len(NAMES))] == NAMES * 2
    for index in (len(NAMES), -len(NAMES) - 1):
        with pytest.raises(IndexError):
            packed[index]


def test_names_take_their_bytes_and_little_more() -> None:
    names = [f"n{i // 50:08d}/n{i // 50:08d}_{i}.JPEG" for i in range(5000)]
    packed = PackedNames(names)
    text = sum(map(len, names))
    assert text + 8 * 5000 < packed.nbytes < 1.13 * (text + 8 * 5000) + 500  # both buffers grow by an eighth
    assert packed.nbytes < 0.55 * (sys.getsizeof(names) + sum(map(sys.getsizeof, names)))


def lists(data: EncodedImages) -> list[str]:
    """Attributes of a data set that hold an object an image."""
    return [name for name, value in vars(data).items() if isinstance(value, list | tuple | dict) and len(value) > 20]


def test_image_folders_and_shards_hold_no_objects_an_image(tmp_path: Path) -> None:
    places = [f"{name}/{i:05d}.png" for name in "ab" for i in range(500)]
    for place in places:
        (tmp_path / "folder" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / place).touch()
    folder, samples = ImageFolder(tmp_path / "folder", 8), scan(tmp_path / "folder").samples
    assert [folder.path(i) for i in range(1000)] == places and [folder.label(i) for i in (0, 499, 500)] == [0, 0, 1]
    assert samples == [(str(tmp_path / "folder" / place), int(place[0] == "b")) for place in places]
    assert samples.nbytes / 1000 < len(places[0]) + 16  # an offset of 8 bytes, a label of 4, and room to grow
    members = [[(f"{i}.png", encoded()), (f"{i}.cls", b"1")] for i in range(50)]
    write_tar(tmp_path / "0.tar", [*itertools.chain(*members)])
    shards = opened(tmp_path / "0.tar")
    assert (shards.path(49), shards.label(49)) == ("0.tar/49.png", 1)
    assert lists(folder) == lists(shards) == []
