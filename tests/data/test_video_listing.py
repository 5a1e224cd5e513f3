"""Folders of videos as people have them: empty classes, splits, links, listings of others."""

import os
import shutil
from pathlib import Path

import pytest

from data.clip_folder import ClipFolder
from data.video_listing import LISTING
from tests import video_files


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Two classes, with two videos of 12 and 9 frames, and with one of 12."""
    root = tmp_path / "frames"
    video_files.write_frames(root / "cat/a", range(1, 13), size=(10, 14))
    video_files.write_frames(root / "cat/b", range(20, 29), size=(10, 14))
    video_files.write_frames(root / "dog/a", range(30, 42), name="v_7_{}.jpg", size=(16, 9))
    return root


def test_a_class_without_videos_and_splits_are_refused(frames: Path) -> None:
    (frames / "bird").mkdir()
    with pytest.raises(ValueError, match="frames: the class folder bird has no video; remove it, or add videos"):
        ClipFolder(frames, 8, frames=4)
    (frames / "bird/a.avif").write_bytes(b"x")
    (frames / "bird/b.MTS").write_bytes(b"x")
    with pytest.raises(ValueError, match="class folder bird has no video; it has 1 .avif, 1 .mts; remove it"):
        ClipFolder(frames, 8, frames=4)
    shutil.rmtree(frames / "bird")
    for split in ("train", "val"):
        shutil.copytree(frames / "cat", frames / "splits" / split)  # videos without classes
        shutil.copytree(frames / "cat", frames / "deeper" / split / "cat")
    for name in ("splits", "deeper"):
        message = f"{name}: holds the splits train, val, not classes; give {frames / name / 'train'}"
        with pytest.raises(ValueError, match=message):
            ClipFolder(frames / name, 8, frames=4)


def test_numbers_as_class_names_are_said_to_sort_as_text(frames: Path) -> None:
    for before, after in (("cat", "9"), ("dog", "10")):
        (frames / before).rename(frames / after)
    with pytest.warns(UserWarning, match="class names are numbers, and are sorted as text: 10, 9, ..."):
        assert ClipFolder(frames, 8, frames=4).classes == ["10", "9"]


def test_links_and_what_is_neither_file_nor_folder(frames: Path) -> None:
    """Reading a pipe would wait for ever."""
    before = ClipFolder(frames, 8, frames=4).digest()
    links = {"cat/x": "nowhere", "cat/y.mp4": "nowhere.mp4", "cat/z": "z", "dog/up": "..", "w": "."}
    for name, target in links.items():
        (frames / name).symlink_to(target)
    os.mkfifo(frames / "dog/p.mp4")
    (frames / "dog/@eaDir").mkdir()
    (frames / "dog/a/@eaDir").mkdir()
    message = "left out 2 links to folders that hold them, 3 links to missing files, 1 pipes or devices; .mp4, "
    with pytest.warns(UserWarning, match=message):
        data = ClipFolder(frames, 8, frames=4)
    assert data.classes == ["cat", "dog"] and data.digest() == before
    os.mkfifo(frames / "cat/a/frame_0013.png")
    (frames / "dog/p.mp4").unlink()
    for name in links:
        (frames / name).unlink()
    for number in (1, 8):
        (frames / f"cat/a/frame_{number:04d}.png").unlink()
    (frames / "cat/a/frame_0008.png").symlink_to("nowhere")
    with pytest.warns(UserWarning, match="cat/a: frames are missing after number 7; .*, 6 of 10 frames"):
        assert ClipFolder(frames, 8, frames=6).path(0) == "cat/a"


def test_a_listing_of_others_and_a_folder_in_its_place_are_left_alone(frames: Path) -> None:
    listing = frames / LISTING
    listing.mkdir()
    with pytest.warns(UserWarning, match="listing cannot be kept"), pytest.warns(UserWarning, match="cannot be used"):
        ClipFolder(frames, 8, frames=4)
    listing.rmdir()
    for content in (b"[" * 100_000, b'{"format": 1}', b"\xff\xfe", b'{"format": 1, "videos": [[]], "digest": ""}'):
        listing.write_bytes(content)
        with pytest.warns(UserWarning, match="cannot be used .*all videos are opened again"):
            assert len(ClipFolder(frames, 8, frames=4)) == 3
