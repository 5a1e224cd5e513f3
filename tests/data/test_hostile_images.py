"""Images that would start a program or fill the memory, by every way that leads to an image."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from subprocess import CalledProcessError

import pytest
from PIL import EpsImagePlugin, Image

from data import open_dataset
from data.columns import ColumnSettings
from data.image_folder import UnreadableImageError
from data.photos import Photos
from data.pixels import written_by
from runtime.errors import UserError
from tests.image_sources import encoded, table, table_cache, write_tar  # noqa: F401  (a fixture of all tests)

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(touch /tmp/x) run\nshowpage\n%%EOF\n"


def folder_of(root: Path, content: bytes) -> Path:
    """A folder of classes with one image of this content, under a name for PNG."""
    (root / "a").mkdir(parents=True)
    (root / "a" / "x.png").write_bytes(content)
    return root


def in_table(root: Path, content: bytes) -> Path:
    table([content], [0]).to_parquet(str(root / "0.parquet"))
    return root / "0.parquet"


def first_image(name: str, path: Path) -> object:
    columns = None if name == "imagefolder" else ColumnSettings()
    return open_dataset(name, path, 8, 3, strict=True, columns=columns)[0, 0]


# Way to an image -> function of an empty folder and the file's content that goes it
WAYS: dict[str, Callable[[Path, bytes], object]] = {
    "class folder": lambda root, content: first_image("imagefolder", folder_of(root, content)),
    "shard": lambda root, content: first_image(
        "webdataset", write_tar(root / "0.tar", [("x.png", content), ("x.cls", b"0")])
    ),
    "table": lambda root, content: first_image("huggingface", in_table(root, content)),
    "photo": lambda root, content: Photos(folder_of(root, content)).read(0),
    "header of a photo": lambda root, content: Photos(folder_of(root, content)).header(0),
    "note in a picture": lambda root, content: written_by(folder_of(root, content) / "a" / "x.png", "us"),
}


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File that exists once Ghostscript was started."""
    programs, path = tmp_path / "bin", tmp_path / "started"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch '{path}'\nexit 1\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow keeps what it found
    return path


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_an_image_starts_ghostscript(way: str, started: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with suppress(UnreadableImageError, UserError):
        WAYS[way](tmp_path / "images", EPS)
    assert not started.exists()
    with pytest.raises((OSError, CalledProcessError)), Image.open(io.BytesIO(EPS)) as image:
        image.load()
    assert started.exists()  # by Pillow alone


@pytest.mark.parametrize("way", [way for way in WAYS if way != "note in a picture"])
@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_no_way_to_an_image_resizes_a_thread(way: str, size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(UnreadableImageError, match=f"{size[0]} x {size[1]} pixels; a side may be at most 100 times"):
        WAYS[way](tmp_path / "images", encoded(size))
