"""Manifests of stored latents: what fixes the bytes, and what is refused when work continues."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.encoders import Pixels
from data.image_folder import ImageFolder
from data.latent_files import MANIFEST
from data.latent_manifest import FLAGS, check_ranks, check_settings, make_manifest
from runtime import distributed
from runtime.errors import UserError
from runtime.json_file import read_json, write_json


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, Any]:
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), ord(name), np.uint8)).save(tmp_path / "images" / name / "0.png")
    images = ImageFolder(tmp_path / "images", 8)
    return make_manifest(images, Pixels(), (2, 3, 8, 8), batch_size=2, shard_size=4)


def test_a_manifest_is_as_it_is_read(manifest: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / MANIFEST, manifest)
    assert read_json(tmp_path / MANIFEST) == manifest
    assert FLAGS.keys() <= manifest.keys() and manifest["row_shape"] == [2, 3, 8, 8]
    check_settings(tmp_path, manifest, Pixels(), overwrite=False)


@pytest.mark.parametrize("name", [name for name in FLAGS if name != "encoder"])
def test_every_setting_counts(manifest: dict[str, Any], tmp_path: Path, name: str, monkeypatch: Any) -> None:
    other = {**manifest, name: "another"}
    write_json(tmp_path / MANIFEST, other)
    with pytest.raises(UserError, match=f"^{FLAGS[name]}: .* was started with other settings .*{name}"):
        check_settings(tmp_path, manifest, Pixels(), overwrite=False)
    check_settings(tmp_path, manifest, Pixels(), overwrite=True)
    monkeypatch.setattr(distributed, "objects_from_all_ranks", lambda own: [own, own, other])
    with pytest.raises(UserError, match=f"^{FLAGS[name]}: rank 2 has other {name} than rank 0"):
        check_ranks(manifest)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "of another format"),
        (b'{"format": 99}', "of another format"),
        (None, "00000.npy is there, but no manifest.json"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_not_touched(
    manifest: dict[str, Any], tmp_path: Path, content: bytes | None, words: str, overwrite: bool
) -> None:
    (tmp_path / "00000.npy").write_bytes(b"x")
    if content is not None:
        (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(
        UserError, match=f"^--output .*{words}.*; give the same settings or another --output, or remove"
    ):
        check_settings(tmp_path, manifest, Pixels(), overwrite=overwrite)


def test_an_edited_manifest_is_told_from_other_settings(manifest: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / MANIFEST, manifest)
    document = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**document, "images": 3}))
    with pytest.raises(UserError, match="is edited or damaged, it does not match its checksum"):
        check_settings(tmp_path, manifest, Pixels(), overwrite=False)
