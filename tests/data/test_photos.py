"""All images of a folder: their order, what is left out, and how they are read."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import photos
from data.image_folder import UnreadableImageError, center_crop
from data.photos import Photos


def put(path: Path, size: tuple[int, int] = (6, 8), seed: int = 0, mode: str = "RGB", **options) -> np.ndarray:
    """An image of (H, W) pixels, each of another value; returns them."""
    pixels = np.random.RandomState(seed).randint(0, 256, (*size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return pixels


def names(root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in Photos(root).files]


def test_order_is_that_of_names_with_their_numbers_then_of_folders(tmp_path):
    for name in ("b/10.png", "b/9.png", "a/10.png", "a/deep/er/9.png", "2.png", "x1y.png", "x01.png"):
        put(tmp_path / name)
    assert names(tmp_path) == ["2.png", "a/deep/er/9.png", "b/9.png", "a/10.png", "b/10.png", "x01.png", "x1y.png"]


def test_numbered_files_in_folders_of_classes_keep_their_numbers_order(tmp_path):
    for i in range(12):
        put(tmp_path / f"class {i % 3}" / f"{i:06d}.png")
    assert [int(Path(name).stem) for name in names(tmp_path)] == list(range(12))


def test_what_is_no_image_is_counted_and_hidden_files_are_not_seen(tmp_path):
    for name in ("a.png", ".b.png", "__MACOSX/a.png", ".c/a.png"):
        put(tmp_path / name)
    for name in ("a.heic", "a.gif", "b.gif", "notes.txt"):
        (tmp_path / name).touch()
    assert names(tmp_path) == ["a.png"] and Photos(tmp_path).left_out == "2 .gif, 1 .heic"
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a folder without images: 2 \.gif, 1 \.heic; JPEG, PNG"):
        Photos(tmp_path)


def test_images_are_read_whole_or_cropped_as_in_adm(tmp_path):
    pixels = put(tmp_path / "a.png", (40, 23))
    assert np.array_equal(Photos(tmp_path).read(0), pixels)
    cropped = Photos(tmp_path).read(0, (8, 12))
    assert cropped.shape == (8, 12, 3) and cropped.dtype == np.uint8
    assert np.array_equal(cropped, np.asarray(center_crop(Image.fromarray(pixels), (8, 12))))
    put(tmp_path / "b.jpg", (40, 23), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    assert Photos(tmp_path).read(1).shape == (23, 40, 3)  # set upright


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "I;16"])
def test_images_of_all_modes_become_rgb(tmp_path, mode):
    if mode == "I;16":
        levels = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
        Image.fromarray(levels).save(tmp_path / "a.png")
        expected = np.rint(levels / 257).astype(np.uint8)[..., None].repeat(3, axis=-1)
    else:
        pixels = put(tmp_path / "a.png", mode=mode)
        expected = np.asarray(Image.fromarray(pixels).convert(mode).convert("RGB"))
    header, read = Photos(tmp_path).header(0), Photos(tmp_path).read(0)
    assert header.not_plain == f"is in mode {mode}" and header.size == (6, 8) and header.format == "PNG"
    assert read.dtype == np.uint8 and np.array_equal(read, expected)


def test_plain_pixels_are_known_from_the_header(tmp_path):
    put(tmp_path / "a.png")
    put(tmp_path / "b.jpg")
    put(tmp_path / "c.png", transparency=(0, 0, 0))
    photos = Photos(tmp_path)
    assert photos.header(0) == ((6, 8), "PNG", "") and photos.header(1) == ((6, 8), "JPEG", "")
    assert photos.header(2).not_plain == "has transparency, 16 bits or frames"


def test_damaged_images_are_named(tmp_path):
    put(tmp_path / "a.png", (40, 40))
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content[:-200])
    (tmp_path / "c.png").write_bytes(b"<html>")
    photos = Photos(tmp_path)
    assert photos.header(1).size == (40, 40)
    with pytest.raises(UnreadableImageError, match=r"/b\.png: damaged or cut short \(.*\); replace or remove it"):
        photos.read(1)
    with pytest.raises(UnreadableImageError, match=r"/c\.png: cannot be read: not an image of a known format"):
        photos.header(2)
    with pytest.raises(UnreadableImageError, match=r"/c\.png: damaged or cut short \(not an image"):
        photos.read(2)
    (tmp_path / "c.png").unlink()
    with pytest.raises(FileNotFoundError):
        photos.read(2)


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    put(tmp_path / "a.png", (40, 40))
    put(tmp_path / "b.png", (10, 10))
    opened = Photos(tmp_path)
    held = []
    real = photos.decode_image
    monkeypatch.setattr(photos, "LARGE", 1000)
    monkeypatch.setattr(photos, "decode_image", lambda *args: held.append(opened._one_large.locked()) or real(*args))
    assert [opened.read(i).shape[0] for i in range(2)] == [40, 10]
    assert held == [True, False] and not opened._one_large.locked()
